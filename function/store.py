"""Verified files: a place where releases are in, checked bytes out.

Nothing is handed on before its sha256 and size are those that the manifest
names, whether it came from the bucket or from the cache.
"""

import hashlib
import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from function.errors import ReleaseRefused
from function.manifest import MODEL, SHA256, TOKENIZER, File, Manifest, parse_manifest
from function.readers import Read

NEW = ".new-"
"""How the name of a file begins that is being written."""
_log = logging.getLogger("needs")


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
    """The two files that the function needs, from the cache or, both at once, from the bucket.

    Raises ReleaseRefused for other content than the manifest's, ReleaseUnavailable where there is none.
    """

    def fetch(name: str) -> bytes:
        return _fetch_file(read, f"releases/{manifest.release}/{name}", manifest.files[name], cache, deadline)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((MODEL, TOKENIZER), pool.map(fetch, (MODEL, TOKENIZER)), strict=True))


def _fetch_file(read: Read, name: str, file: File, cache: Path, deadline: float) -> bytes:
    cached = cache / file.sha256
    try:
        content = cached.read_bytes()
        if _is_whole(content, file):
            return content
        _log.warning("%s: not what was written there; fetching it again", cached)
        cached.unlink(missing_ok=True)
    except OSError:
        pass  # not cached yet
    content = read(name, deadline)
    if not _is_whole(content, file):
        found = f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}"
        raise ReleaseRefused(f"{name}: expected {file.bytes} bytes, sha256 {file.sha256}, found {found}; publish again")
    return content


def _is_whole(content: bytes, file: File) -> bool:
    return len(content) == file.bytes and hashlib.sha256(content).hexdigest() == file.sha256


def keep_files(files: dict[str, bytes], manifest: Manifest, cache: Path) -> None:
    """Keep copies for the next process; memory serves where there is no room."""
    for name, content in files.items():
        cached = cache / manifest.files[name].sha256
        if not cached.exists():
            _write_cache(cached, content)


def _write_cache(cached: Path, content: bytes) -> None:
    new = None
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        descriptor, new = tempfile.mkstemp(prefix=NEW, dir=cached.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(new, cached)
    except OSError as error:
        _log.warning("cache: expected to write %s, found %s; serving from memory", cached, error)
        if new:
            Path(new).unlink(missing_ok=True)


def remove_others(manifest: Manifest, cache: Path, seconds: float) -> None:
    """Remove what no process needs any more: files of other releases, and halves that killed ones left.

    A half is one that was begun longer ago than two loads may take, of `seconds` each.
    """
    needed = {manifest.files[name].sha256 for name in (MODEL, TOKENIZER)}
    for path in cache.glob("*"):
        try:
            if path.name.startswith(NEW):
                needless = time.time() - path.stat().st_mtime > 2 * seconds
            else:
                needless = SHA256.fullmatch(path.name) is not None and path.name not in needed
            if needless:
                path.unlink()
        except FileNotFoundError:
            pass  # another worker was faster
        except OSError as error:
            _log.warning("cache: expected to remove %s, found %s; it takes memory", path, error)
