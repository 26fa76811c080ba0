"""Verified files: a place where releases are in, checked bytes out.

`gs://bucket/prefix` is read with google-cloud-storage (which honours
STORAGE_EMULATOR_HOST), `file:///folder` from disk. Nothing is handed on before
its sha256 and size are those that the manifest names, whether it came from the
bucket or from the cache.
"""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from function.errors import ReleaseRefused, ReleaseUnavailable
from function.manifest import MODEL, TOKENIZER, File, Manifest, Pointer, parse_manifest, parse_pointer

CONNECT_READ_SECONDS = (5, 5)
Read = Callable[[str, float], bytes]
"""(object name under MODEL_URI, deadline on time.monotonic) to its bytes; ReleaseUnavailable where it fails."""
_log = logging.getLogger("needs")


def open_store(uri: str) -> Read:
    """How to read the objects under a MODEL_URI. Connects to nothing yet."""
    scheme, _, rest = uri.rstrip("/").partition("://")
    if scheme == "file":
        return _folder_reader(Path(unquote(urlsplit(uri).path)))
    bucket, _, prefix = rest.partition("/")
    return _bucket_reader(bucket, f"{prefix}/" if prefix else "")


def _folder_reader(folder: Path) -> Read:
    def read(name: str, deadline: float) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise ReleaseUnavailable(f"{name}: expected a file, found {error}; check MODEL_URI") from error

    return read


def _bucket_reader(bucket: str, prefix: str) -> Read:
    clients: list = []

    def read(name: str, deadline: float) -> bytes:
        # 0.3 s and 49 MB of imports: in the worker, while it loads, and not before the fork.
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY
        from requests import RequestException

        try:
            if not clients:
                clients.append(storage.Client(project="_"))
            blob = clients[0].bucket(bucket).blob(prefix + name)
            patience = DEFAULT_RETRY.with_timeout(max(0.1, deadline - time.monotonic()))
            content: bytes = blob.download_as_bytes(timeout=CONNECT_READ_SECONDS, retry=patience, checksum=None)
            return content
        except (GoogleAPIError, GoogleAuthError, RequestException, OSError) as error:
            raise ReleaseUnavailable(
                f"gs://{bucket}/{prefix}{name}: expected the object, found {error}; "
                "check MODEL_URI and the function's right to read it"
            ) from error

    return read


def read_pointer(read: Read, deadline: float) -> Pointer:
    """The release that is current now."""
    return parse_pointer(read("current.json", deadline))


def read_manifest(read: Read, release: str, sha256: str | None, deadline: float) -> Manifest:
    """A release's manifest, checked against the pointer's hash, or, pinned, against its id alone."""
    stored = read(f"releases/{release}/manifest.json", deadline)
    found = hashlib.sha256(stored).hexdigest()
    if sha256 is not None and found != sha256:
        raise ReleaseRefused(f"manifest.json: expected sha256 {sha256}, found {found}; promote a whole release")
    manifest = parse_manifest(stored)
    if manifest.release != release:
        raise ReleaseRefused(f"manifest.json: expected {release}, found {manifest.release}; publish it again")
    return manifest


def fetch_files(read: Read, manifest: Manifest, cache: Path, deadline: float) -> dict[str, bytes]:
    """The two files that the function needs, from the cache or the bucket."""
    return {
        name: _fetch_file(read, f"releases/{manifest.release}/{name}", manifest.files[name], cache, deadline)
        for name in (MODEL, TOKENIZER)
    }


def _fetch_file(read: Read, name: str, file: File, cache: Path, deadline: float) -> bytes:
    cached = cache / file.sha256
    try:
        content = cached.read_bytes()
        if _is_whole(content, file):
            return content
        _log.warning("%s: not what was written there; fetching it again", cached)
    except OSError:
        pass  # not cached yet
    content = read(name, deadline)
    if not _is_whole(content, file):
        found = f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}"
        raise ReleaseRefused(f"{name}: expected {file.bytes} bytes, sha256 {file.sha256}, found {found}; publish again")
    _write_cache(cached, content)
    return content


def _is_whole(content: bytes, file: File) -> bool:
    return len(content) == file.bytes and hashlib.sha256(content).hexdigest() == file.sha256


def _write_cache(cached: Path, content: bytes) -> None:
    """Keep a copy for the next process; memory serves where there is no room."""
    new = None
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        descriptor, new = tempfile.mkstemp(prefix=".new-", dir=cached.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(new, cached)
    except OSError as error:
        _log.warning("cache: expected to write %s, found %s; serving from memory", cached, error)
        if new:
            Path(new).unlink(missing_ok=True)
