"""The release now served: lazy load, refresh, and a bounded place to run it.

functions-framework imports the function before gunicorn forks its worker, and
an ONNX Runtime session does not survive a fork. So nothing is loaded at import:
one load starts in the worker, from the preload or from the first request, and
every request that comes meanwhile waits for that same load.

An instance's CPU stops between requests, so no timer can look for a newer
release: the request that finds a look due starts it and waits for it a while,
the others go on with the release that is there. A new one takes its place in
one assignment, once it has been verified and has answered; a request keeps the
one that it began with.
"""

import ctypes
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from function.errors import NeedsError, Overloaded, ReleaseRefused, ReleaseUnavailable
from function.manifest import MODEL, TOKENIZER, Manifest, Pointer, check_release_name, parse_pointer
from function.readers import open_reader
from function.settings import Settings
from function.store import fetch_files, keep_files, read_manifest, remove_others

if TYPE_CHECKING:
    import numpy as np

    from function.classifier import Classifier, Windows

REFRESH_WAIT_SECONDS = 5.0
"""How long the request that looks for a newer release waits for it."""
LONGEST_BACKOFF = 16
"""Times REFRESH_SECONDS, after looks that failed in transport."""
M_ARENA_MAX = -8
"""From malloc.h."""
DRAIN_SECONDS = 7.0
"""From SIGTERM to giving up what is not done: Cloud Run kills after 10."""
_MALLOPT, _TRIM = (getattr(ctypes.CDLL(None), name, None) for name in ("mallopt", "malloc_trim"))  # glibc's alone
_log = logging.getLogger("needs")


@dataclass(frozen=True)
class Served:
    """A release that has been loaded and has answered once."""

    manifest: Manifest
    classifier: "Classifier"
    pointer: Pointer | None
    """What named it, None where the release is pinned."""


@dataclass
class Timing:
    """Where a request's milliseconds went, and how many texts it had."""

    milliseconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("queue", "load", "tokenize", "infer"), 0.0)
    )
    texts: int = 0

    @contextmanager
    def add(self, part: str) -> Iterator[None]:
        """Add the time that the block takes to one part."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.note(part, started)

    def note(self, part: str, started: float) -> None:
        """Add the time since `started`, on time.monotonic."""
        self.milliseconds[part] = self.milliseconds.get(part, 0.0) + (time.monotonic() - started) * 1000


@dataclass
class _Load:
    """One load under way: until when, how long each part took, and the files of a release not served before."""

    deadline: float
    parts: Timing = field(default_factory=lambda: Timing({}))
    files: dict[str, bytes] = field(default_factory=dict)


class Slots:
    """So many may hold one at once; who waits longest is next.

    A semaphore would be handed to whoever asks first after a release, which is
    the very thread that released it: a short text would wait for a long one's end.
    """

    def __init__(self, count: int):
        self._lock, self._free = threading.Lock(), count
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # the slot goes on from hand to hand
            else:
                self._free += 1


class Serving:
    """Loads the release, keeps it fresh and runs it for as many requests as the settings allow."""

    def __init__(self, settings: Settings):
        if _MALLOPT:
            _MALLOPT(M_ARENA_MAX, 1)  # one for all threads: glibc makes one for each, and each keeps what it once held
        self._settings = settings
        self._read = open_reader(settings.model_uri)
        self._lock = threading.Lock()
        self._served: Served | None = None
        self._loading: Future[Served] | None = None
        self._next_check = 0.0
        self._failures = 0
        self._refusal: tuple[bytes, str] | None = None
        self._logged: set[str] = set()
        self.checked: str | None = None
        """When the pointer was last read, RFC 3339; when the pinned release was loaded."""
        self.refused: str | None = None
        """Why the newest pointer is not served."""
        self._places = threading.BoundedSemaphore(settings.max_concurrent + settings.max_queue)
        self._slots = Slots(settings.max_concurrent)
        self._stopped: float | None = None

    def begin_load(self) -> "Future[Served]":
        """Start a load in a thread of its own, or join the one under way."""
        with self._lock:
            if self._loading is None:
                self._loading = Future()
                threading.Thread(target=self._load, args=(self._loading,), name="load", daemon=True).start()
            return self._loading

    def served(self, timing: Timing) -> Served:
        """The release now served: loaded first if need be, a newer one looked for if that is due.

        Raises ReleaseError where none can be had within LOAD_SECONDS.
        """
        if self._served is None:
            with timing.add("load"):
                return self._wait(self._settings.load_seconds)
        if self._claim_check():
            with timing.add("load"), suppress(NeedsError):  # it was logged, and the old release serves
                self._wait(min(REFRESH_WAIT_SECONDS, self._settings.load_seconds))
        return self._served

    def _wait(self, seconds: float) -> Served:
        try:
            return self.begin_load().result(timeout=seconds)
        except TimeoutError:
            raise ReleaseUnavailable(
                f"release: expected it within LOAD_SECONDS = {seconds:g}, found it still loading; try again"
            ) from None

    def _claim_check(self) -> bool:
        """Whether a look at the pointer is due, for one request alone."""
        every = self._settings.refresh_seconds
        if not every or self._settings.release != "current" or time.monotonic() < self._next_check:
            return False
        with self._lock:
            due = self._loading is None and time.monotonic() >= self._next_check
            self._next_check = time.monotonic() + every if due else self._next_check
            return due

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
        """float32 [L] probabilities of a text; a slot is taken for each window, so that short texts get between.

        Raises Overloaded where the process must stop first.
        """
        from function.classifier import combine

        logits = []
        for ids in windows.ids:
            self.check_time_left()
            asked = time.monotonic()
            with self._slots:
                timing.note("queue", asked)
                with timing.add("infer"):
                    logits.append(classifier.run(ids))
        return combine(logits)

    def check_time_left(self) -> None:
        """Raises Overloaded where the process was told to stop DRAIN_SECONDS ago."""
        worker = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)  # gunicorn's, in its worker
        if getattr(worker, "alive", True):
            return
        self._stopped = self._stopped or time.monotonic()
        if time.monotonic() > self._stopped + DRAIN_SECONDS:
            raise Overloaded("instance: expected to finish before it stops, found too much left; try again")

    def _load(self, loading: "Future[Served]") -> None:
        """Bring the release up to date, and settle all who wait for it."""
        load = _Load(time.monotonic() + self._settings.load_seconds)
        threading.Thread(target=import_module, args=("function.classifier",), daemon=True).start()  # beside the bucket
        try:
            served = self._find_newest(load)
        except BaseException as error:
            self._note_failure(error)
            with self._lock:
                self._loading = None  # the next request may start a new load
            known = isinstance(error, NeedsError)
            loading.set_exception(error if known else ReleaseUnavailable(f"release: not loaded, {error!r}"))
            return
        self.refused, self._refusal, self._failures = None, None, 0
        self._logged.clear()
        self._next_check = time.monotonic() + self._settings.refresh_seconds
        self._served = served
        with self._lock:
            self._loading = None
        loading.set_result(served)
        if load.files:
            took = {"milliseconds": {name: round(ms, 2) for name, ms in load.parts.milliseconds.items()}}
            _log.info("release %s loaded", served.manifest.release, extra={"known": took})
            self._tidy(served.manifest, load.files)  # now that no answer waits for it

    def _note_failure(self, error: BaseException) -> None:
        """A refused pointer waits for the next one; what failed in transport is tried again, ever less often."""
        self.refused = str(error)
        if self.refused not in self._logged:
            _log.error("release not loaded: %s", error, exc_info=not isinstance(error, NeedsError))
            self._logged.add(self.refused)
        if not isinstance(error, ReleaseRefused):
            wait = self._settings.refresh_seconds * min(2**self._failures, LONGEST_BACKOFF)
            self._next_check, self._failures = time.monotonic() + wait, self._failures + 1

    def _find_newest(self, load: _Load) -> Served:
        """What the pointer, or RELEASE, names; what is served already where that is the same.

        Raises ReleaseRefused or ReleaseUnavailable.
        """
        if self._settings.release != "current":
            with load.parts.add("manifest"):
                manifest = read_manifest(self._read, check_release_name(self._settings.release), None, load.deadline)
            self.checked = _now()
            return self._load_release(manifest, None, load)
        with load.parts.add("pointer"):
            stored = self._read("current.json", load.deadline)
        self.checked = _now()
        if self._refusal and stored == self._refusal[0]:
            raise ReleaseRefused(self._refusal[1])
        try:
            pointer = parse_pointer(stored)
            if self._served and not _is_newer(pointer, self._served):
                return self._served
            with load.parts.add("manifest"):
                manifest = read_manifest(self._read, pointer.release, pointer.manifest_sha256, load.deadline)
            return self._load_release(manifest, pointer, load)
        except ReleaseRefused as error:
            self._refusal = stored, str(error)
            raise

    def _load_release(self, manifest: Manifest, pointer: Pointer | None, load: _Load) -> Served:
        """Fetch, verify, load and warm a release."""
        with load.parts.add("files"):
            load.files |= fetch_files(self._read, manifest, Path(self._settings.cache_dir), load.deadline)
        with load.parts.add("imports"):
            import_module("function.classifier")
        with load.parts.add("session"):
            classifier = _make_classifier(load.files, manifest, self._settings)
        with load.parts.add("first_run"):
            _warm(classifier, manifest)
        return Served(manifest, classifier, pointer)

    def _tidy(self, manifest: Manifest, files: dict[str, bytes]) -> None:
        """Write the cache, and give back what loading and the release before took of disk and memory."""
        cache = Path(self._settings.cache_dir)
        keep_files(files, manifest, cache)
        files.clear()
        remove_others(manifest, cache, self._settings.load_seconds)
        if _TRIM:
            _TRIM(0)


def _is_newer(pointer: Pointer, served: Served) -> bool:
    """Raises ReleaseRefused for a pointer that goes back, or names another release with the same sequence."""
    known = served.pointer
    if known is None or pointer.sequence > known.sequence:
        return True
    if pointer == known:
        return False
    raise ReleaseRefused(
        f"current.json: expected a sequence above {known.sequence}, found {pointer.sequence} for {pointer.release}; "
        "promote it anew"
    )


def _make_classifier(files: dict[str, bytes], manifest: Manifest, settings: Settings) -> "Classifier":
    from function.classifier import Classifier

    with _refusing():
        return Classifier(
            files[MODEL],
            files[TOKENIZER],
            prefix=manifest.prefix,
            max_tokens=manifest.max_tokens,
            max_windows=settings.max_windows,
            threads=settings.inference_threads,
        )


def _warm(classifier: "Classifier", manifest: Manifest) -> None:
    """Answer once: the first run allocates what the later ones use, and shows that there is a score a label."""
    with _refusing():
        scores = classifier.score("예열")
    if scores.shape != (len(manifest.labels),):
        raise ReleaseRefused(f"model.onnx: expected {len(manifest.labels)} scores, found {scores.shape}; publish again")


@contextmanager
def _refusing() -> Iterator[None]:
    """Whatever fails here is the release's fault: onnxruntime and tokenizers have no common error of their own."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ReleaseRefused(f"release: expected a model that runs here, found {error!r}; publish another") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
