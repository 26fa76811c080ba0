"""The release now served: lazy load, and a bounded place to run it.

functions-framework imports the function before gunicorn forks its worker, and
an ONNX Runtime session does not survive a fork. So nothing is loaded at import:
one load starts in the worker, from the preload or from the first request, and
every request that comes meanwhile waits for that same load.
"""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from function.errors import NeedsError, Overloaded, ReleaseUnavailable
from function.manifest import Manifest, check_release_name
from function.readers import Read, open_reader
from function.settings import Settings
from function.store import fetch_files, read_manifest, read_pointer

if TYPE_CHECKING:
    import numpy as np

    from function.classifier import Classifier, Windows

_log = logging.getLogger("needs")


@dataclass(frozen=True)
class Served:
    """A release that has been loaded and has answered once."""

    manifest: Manifest
    classifier: "Classifier"
    sequence: int | None
    """The pointer's, None where the release is pinned."""
    checked: str
    """When the pointer was last read, RFC 3339."""


@dataclass
class Timing:
    """Where a request's milliseconds went."""

    milliseconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("queue", "load", "tokenize", "infer"), 0.0)
    )

    @contextmanager
    def add(self, part: str) -> Iterator[None]:
        """Add the time that the block takes to one part."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.milliseconds[part] += (time.monotonic() - started) * 1000


class Serving:
    """Loads the release once and runs it for as many requests as the settings allow."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._lock = threading.Lock()
        self._served: Served | None = None
        self._loading: Future[Served] | None = None
        self._places = threading.BoundedSemaphore(settings.max_concurrent + settings.max_queue)
        self._slots = threading.BoundedSemaphore(settings.max_concurrent)

    def begin_load(self) -> "Future[Served]":
        """Start a load in a thread of its own, or join the one under way or done."""
        with self._lock:
            if self._loading is None:
                self._loading = Future()
                threading.Thread(target=self._load, args=(self._loading,), name="load", daemon=True).start()
            return self._loading

    def served(self, timing: Timing) -> Served:
        """The release now served, loaded first if need be.

        Raises ReleaseError where none can be had within LOAD_SECONDS.
        """
        if self._served is not None:
            return self._served
        with timing.add("load"):
            try:
                return self.begin_load().result(timeout=self._settings.load_seconds)
            except TimeoutError:
                raise ReleaseUnavailable(
                    f"release: expected it within LOAD_SECONDS = {self._settings.load_seconds:g}, "
                    "found it still loading; try again"
                ) from None

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A place among the requests that run or wait. Raises Overloaded at once where there is none."""
        if not self._places.acquire(blocking=False):
            waiting = self._settings.max_queue
            raise Overloaded(f"queue: expected fewer than {waiting} waiting requests, found it full; try again later")
        try:
            yield
        finally:
            self._places.release()

    def infer(self, classifier: "Classifier", windows: "Windows", timing: Timing) -> "np.ndarray":
        """float32 [L] probabilities of a text; a slot is taken for each window, so that short texts get between."""
        from function.classifier import combine

        logits = []
        for ids in windows.ids:
            with timing.add("queue"):
                self._slots.acquire()
            try:
                with timing.add("infer"):
                    logits.append(classifier.run(ids))
            finally:
                self._slots.release()
        return combine(logits)

    def _load(self, loading: "Future[Served]") -> None:
        started = time.monotonic()
        try:
            served = load_release(self._settings, started + self._settings.load_seconds)
        except BaseException as error:
            known = isinstance(error, NeedsError)
            _log.error("release not loaded: %s", error, exc_info=not known)
            with self._lock:
                self._loading = None  # the next request may start a new load
            loading.set_exception(error if known else ReleaseUnavailable(f"release: not loaded, {error!r}"))
            return
        self._served = served
        loading.set_result(served)
        _log.info("release %s loaded in %.0f ms", served.manifest.release, (time.monotonic() - started) * 1000)


def load_release(settings: Settings, deadline: float) -> Served:
    """Fetch, check, load and warm the release that the settings name.

    Raises ReleaseRefused or ReleaseUnavailable.
    """
    read = open_reader(settings.model_uri)
    checked = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if settings.release == "current":
        pointer = read_pointer(read, deadline)
        manifest = read_manifest(read, pointer.release, pointer.manifest_sha256, deadline)
        sequence: int | None = pointer.sequence
    else:
        manifest = read_manifest(read, check_release_name(settings.release), None, deadline)
        sequence = None
    return Served(manifest, _make_classifier(read, manifest, settings, deadline), sequence, checked)


def _make_classifier(read: Read, manifest: Manifest, settings: Settings, deadline: float) -> "Classifier":
    from function.classifier import Classifier
    from function.manifest import MODEL, TOKENIZER

    files = fetch_files(read, manifest, Path(settings.cache_dir), deadline)
    classifier = Classifier(
        files[MODEL],
        files[TOKENIZER],
        prefix=manifest.prefix,
        max_tokens=manifest.max_tokens,
        max_windows=settings.max_windows,
        threads=settings.inference_threads,
    )
    classifier.score("예열")  # the first run allocates what the later ones use
    return classifier
