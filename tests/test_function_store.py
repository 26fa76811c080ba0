import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from known import write_known

from function import store
from function.errors import ReleaseRefused, ReleaseUnavailable, SettingError
from function.manifest import MODEL, TOKENIZER, File, Manifest, canonical, name_release
from function.readers import open_reader
from function.settings import read_settings
from function.store import fetch_files, keep_files, read_manifest, remove_others

CONTENT = {MODEL: b"model", TOKENIZER: b"tokenizer"}
RELEASE = "20260101T000000Z-0123456789ab"


@pytest.fixture
def folder(tmp_path):
    for name, content in CONTENT.items():
        path = tmp_path / "a b" / "releases" / RELEASE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "a b"


def make_manifest() -> Manifest:
    files = {name: File(hashlib.sha256(content).hexdigest(), len(content)) for name, content in CONTENT.items()}
    return Manifest(RELEASE, (), 64, "", files, {})


def fetch(folder, cache):
    read = open_reader(f"file://{str(folder).replace(' ', '%20')}/")
    files = fetch_files(read, make_manifest(), cache, time.monotonic() + 5)
    keep_files(files, make_manifest(), cache)
    return files


def test_files_are_cached_by_their_hash_and_read_from_there(folder, tmp_path):
    assert fetch(folder, tmp_path / "cache") == CONTENT
    for path in folder.rglob("*.*"):
        path.unlink(missing_ok=True) if path.is_file() else None
    assert fetch(folder, tmp_path / "cache") == CONTENT


def test_a_damaged_cache_is_fetched_again(folder, tmp_path):
    fetch(folder, tmp_path / "cache")
    (tmp_path / "cache" / hashlib.sha256(b"model").hexdigest()).write_bytes(b"modem")
    assert fetch(folder, tmp_path / "cache") == CONTENT


def test_a_cache_that_cannot_be_written_is_served_from_memory(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert fetch(folder, tmp_path / "file" / "cache") == CONTENT


def test_a_full_disk_is_served_from_memory_and_nothing_is_left_there(folder, tmp_path):
    """A process that may write no byte to a file, as on a full disk."""
    script = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_function_store import CONTENT, fetch
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
assert fetch(Path({str(folder)!r}), Path({str(tmp_path / "cache")!r})) == CONTENT
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "serving from memory" in done.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_read_only_place_is_served_from_memory(folder):
    assert fetch(folder, Path("/proc/needs")) == CONTENT


def test_what_a_killed_process_left_half_written_goes_once_it_is_old(folder, tmp_path):
    cache = tmp_path / "cache"
    fetch(folder, cache)
    for name, age in ((".new-old", 100), (".new-young", 0)):
        (cache / name).write_bytes(b"half")
        os.utime(cache / name, (time.time() - age,) * 2)
    other = cache / ("0" * 64)
    other.write_bytes(b"of another release")
    remove_others(make_manifest(), cache, seconds=30)
    kept = {hashlib.sha256(content).hexdigest() for content in CONTENT.values()}
    assert {path.name for path in cache.iterdir()} == kept | {".new-young"}


def test_what_cannot_be_removed_is_logged_and_what_is_gone_is_not(folder, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "needs")
    cache, said, handler = tmp_path / "cache", [], logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(store._log, "handlers", [handler])
    fetch(folder, cache)
    (cache / ("0" * 64)).mkdir()
    (cache / ".new-gone").symlink_to(cache / "nowhere")  # as one that another worker removes in between
    remove_others(make_manifest(), cache, seconds=30)
    (line,) = said
    assert line.startswith(f"cache: expected to remove {cache / ('0' * 64)}, found")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"labels": [{"name": "x"}]}, r"manifest.json: expected the members of schema 1, found KeyError\('id'\)"),
        ({"labels": []}, "manifest.json: expected labels, model.onnx and tokenizer.json, found less"),
        ({"files": {}}, "manifest.json: expected labels, model.onnx and tokenizer.json, found less"),
        ({}, "manifest.json: expected another, found 2"),
    ],
    ids=str,
)
def test_a_manifest_that_is_not_whole_or_another_releases_is_refused(tmp_path, change, problem):
    document = json.loads(write_known(tmp_path)) | change
    document["release"] = name_release(document)
    stored = canonical(document)
    name = document["release"] if change else "another"
    (tmp_path / "releases" / name).mkdir(parents=True)
    (tmp_path / "releases" / name / "manifest.json").write_bytes(stored)
    with pytest.raises(ReleaseRefused, match=problem):
        read_manifest(open_reader(f"file://{tmp_path}"), name, hashlib.sha256(stored).hexdigest(), time.monotonic() + 5)


@pytest.mark.parametrize("stored", [b"modem", b"mode", b""])
def test_a_file_other_than_the_manifests_is_refused(folder, tmp_path, stored):
    (folder / "releases" / RELEASE / MODEL).write_bytes(stored)
    with pytest.raises(ReleaseRefused, match="expected 5 bytes, sha256"):
        fetch(folder, tmp_path / "cache")


def test_a_missing_file_is_unavailable(tmp_path):
    with pytest.raises(ReleaseUnavailable, match="check MODEL_URI"):
        open_reader(f"file://{tmp_path}")("current.json", time.monotonic() + 5)


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"MODEL_URI": "s3://x"}, "MODEL_URI: expected gs://bucket/prefix or file:///folder, found 's3://x'"),
        ({"MODEL_URI": "gs://x", "MAX_TEXTS": "many"}, "MAX_TEXTS: expected a number of at least 1, found 'many'"),
        ({"MODEL_URI": "gs://x", "PRELOAD": "2"}, "PRELOAD: expected 0 or 1, found '2'"),
        ({"MODEL_URI": "gs://x", "LOAD_SECONDS": "nan"}, "LOAD_SECONDS: expected a number"),
        ({"MODEL_URI": "gs://x", "MAX_CONCURRENT": "2", "THREADS": "6"}, "THREADS: expected more than"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_expected(environment, problem):
    with pytest.raises(SettingError, match=problem):
        read_settings(environment)
