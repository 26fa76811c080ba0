import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from known import release_known
from proxy import run_proxy

from build.local import BUCKET
from build.publish import (
    FILES,
    Bucket,
    PublishError,
    list_promotions,
    make_manifest,
    promote,
    publish,
    read_current,
)
from function.errors import ReleaseRefused
from function.manifest import canonical, name_release, parse_manifest, parse_pointer
from training.files import write_json

LABELS = [{"name": "기쁨", "id": "joy"}]


@pytest.fixture
def target(bucket) -> Bucket:
    return Bucket(f"gs://{BUCKET}/{uuid.uuid4().hex}/")


def make_release(folder, note: str) -> bytes:
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_text(f"{name} {note}", "utf-8")
    export = {"labels": LABELS, "max_tokens": 64, "prefix": "query: ", "provenance": {"base": note}}
    verification = {"thresholds": [0.4], "flips": 0.0, "logit_difference": 0.0}
    write_json(
        folder / "metrics.json", {"export": export, "verification": verification, "quantization": {"recipe": "none"}}
    )
    return make_manifest(folder, f"inputs {note}", "build", "commit")


def test_a_manifest_is_canonical_named_by_its_content_and_kept(tmp_path):
    stored = make_release(tmp_path / "r", "one")
    document = json.loads(stored)
    assert stored == canonical(document)
    rest = {key: value for key, value in document.items() if key != "release"}
    digest = hashlib.sha256(
        json.dumps(rest, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    ).hexdigest()
    assert document["release"].endswith("Z-" + digest[:12])
    assert make_manifest(tmp_path / "r", "inputs one", "build", "commit") == stored


def test_a_release_is_promoted_and_then_its_successor(target, tmp_path):
    first = publish(target, tmp_path / "a", make_release(tmp_path / "a", "one"))
    assert promote(target, first) | {"promoted": ""} == {
        "schema": 1,
        "release": first,
        "manifest_sha256": hashlib.sha256((tmp_path / "a" / "manifest.json").read_bytes()).hexdigest(),
        "sequence": 1,
        "promoted": "",
        "previous": None,
    }
    second = publish(target, tmp_path / "b", make_release(tmp_path / "b", "two"))
    pointer = promote(target, second)
    assert (pointer["sequence"], pointer["previous"]) == (2, first)
    assert promote(target, second) == pointer
    assert parse_pointer(target.read("current.json")[0]).release == second


def test_an_upload_that_was_cut_off_goes_on_and_a_changed_one_is_refused(target, tmp_path):
    manifest = make_release(tmp_path / "a", "one")
    release = json.loads(manifest)["release"]
    target.write(f"releases/{release}/{FILES[0]}", (tmp_path / "a" / FILES[0]).read_bytes(), generation=0)
    with pytest.raises(PublishError, match="found none; publish it first"):
        promote(target, release)
    assert publish(target, tmp_path / "a", manifest) == release
    (tmp_path / "a" / FILES[0]).write_text("other")
    with pytest.raises(PublishError, match="a release never changes"):
        publish(target, tmp_path / "a", manifest)


def test_of_two_promotions_at_once_one_wins(target, tmp_path):
    releases = [publish(target, tmp_path / n, make_release(tmp_path / n, n)) for n in "abcd"]

    def attempt(release: str) -> str:
        try:
            return promote(target, release, after=0)["release"]
        except PublishError as error:
            assert "another promotion came first" in str(error)
            return ""

    with ThreadPoolExecutor(4) as pool:
        won = [release for release in pool.map(attempt, releases) if release]
    pointer = parse_pointer(target.read("current.json")[0])
    assert (pointer.sequence, [pointer.release]) == (1, won)
    assert {name.split("/")[1] for name in target.list("releases/")} == set(releases)  # nothing is lost


@pytest.mark.parametrize("uri", ["", "needs", "file:///tmp/x", "gs://"])
def test_only_a_bucket_is_published_to(uri):
    with pytest.raises(PublishError, match="expected gs://bucket/prefix"):
        Bucket(uri)


@pytest.mark.parametrize(
    ("member", "value", "problem"),
    [
        ("schema", 2, "schema: expected 1"),
        ("activation", "softmax", "activation: expected sigmoid"),
        ("requires", {"onnxruntime": ">=99"}, "requires onnxruntime"),
        ("labels", [], "expected labels"),
        ("files", {}, "expected labels"),
    ],
)
def test_a_manifest_that_cannot_be_met_is_refused(tmp_path, member, value, problem):
    document = json.loads(make_release(tmp_path / "r", "one")) | {member: value}
    document["release"] = name_release(document)
    with pytest.raises(ReleaseRefused, match=problem):
        parse_manifest(canonical(document))


def test_a_tampered_manifest_is_refused(tmp_path):
    stored = make_release(tmp_path / "r", "one")
    with pytest.raises(ReleaseRefused, match="release: expected"):
        parse_manifest(stored.replace(b'"max_tokens":64', b'"max_tokens":65'))
    with pytest.raises(ReleaseRefused, match="its canonical form"):
        parse_manifest(stored + b"\n")


@pytest.mark.parametrize("stored", [b"", b"[]", b"{}", b'{"schema":1,"release":"../x","sequence":1}'])
def test_a_torn_pointer_is_refused(stored):
    with pytest.raises(ReleaseRefused, match=r"current\.json: expected"):
        parse_pointer(stored)


UPLOADS = len(FILES) + 5
"""The files, the manifest, the verdict, the note of the promotion before, the pointer, and its note."""


def run_publish(bucket, uri, folder, until=lambda: False, force=""):
    """Upload and promote as the pipeline does, in processes of their own; killed, and False, once `until` holds."""
    environment = {**os.environ, "STORAGE_EMULATOR_HOST": bucket}
    command = [sys.executable, "-m", "build.publish", "--model-uri", uri, "--release", str(folder)]
    command += ["--inputs", str(folder / "inputs.json"), "--verdict", str(folder / "gate.json")]
    for part in ([], ["--promote", "--force", force]):
        with subprocess.Popen([*command, *part], env=environment, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if until():
                    process.kill()
                time.sleep(0.02)
        if process.returncode:
            return False
    return True


@pytest.fixture
def judged(tmp_path):
    """A folder that the gate let pass."""
    make_release(tmp_path / "a", "one")
    write_json(tmp_path / "a" / "inputs.json", {"inputs": "inputs one"})
    write_json(tmp_path / "a" / "gate.json", {"passed": True, "sequence": 1, "reason": "", "bounds": []})
    return tmp_path / "a"


def test_what_the_gate_refused_is_published_and_promoted_only_by_force(bucket, judged):
    uri = f"gs://{BUCKET}/{uuid.uuid4().hex}"
    refusal = {"passed": False, "sequence": 0, "reason": "macro-F1: expected at least 0.5, found 0.1", "bounds": []}
    write_json(judged / "gate.json", refusal)
    assert not run_publish(bucket, uri, judged)
    assert Bucket(uri).read("current.json") == (None, 0)
    assert len(Bucket(uri).list("verdicts/")) == 1
    assert run_publish(bucket, uri, judged, force="the test split is wrong")
    assert read_current(Bucket(uri))[0]["forced"] == "the test split is wrong"


@pytest.mark.slow
def test_a_connection_cut_at_any_upload_changes_nothing_and_a_second_run_succeeds(bucket, judged, tmp_path):
    for cut in range(UPLOADS):
        uri = f"gs://{BUCKET}/{uuid.uuid4().hex}"
        before = release_known(uri, tmp_path / f"known-{cut}")
        with run_proxy(bucket, cut_writes=range(cut, 1000)) as proxy:
            assert not run_publish(proxy.address, uri, judged, until=lambda: proxy.writes > cut)  # noqa: B023
        promoted = read_current(Bucket(uri))[0]["release"] != before
        assert promoted == (cut == UPLOADS - 1)  # the last one cut is the note of a promotion that was
        assert run_publish(bucket, uri, judged)
        assert [pointer["sequence"] for pointer in list_promotions(Bucket(uri))] == [1, 2]
        assert len(Bucket(uri).list("promotions/")) == 2


@pytest.mark.slow
def test_a_lost_acknowledgement_of_any_upload_is_no_failure(bucket, judged, tmp_path):
    for cut in range(UPLOADS):
        uri = f"gs://{BUCKET}/{uuid.uuid4().hex}"
        release_known(uri, tmp_path / f"known-{cut}")
        with run_proxy(bucket, cut_writes=range(cut, cut + 1), cut_answers=True) as proxy:
            assert run_publish(proxy.address, uri, judged)
            assert proxy.writes > UPLOADS  # it was sent again
        assert read_current(Bucket(uri))[0]["sequence"] == 2


def test_twins_from_the_same_inputs_promote_once_and_the_other_says_so(bucket, tmp_path):
    uri = f"gs://{BUCKET}/{uuid.uuid4().hex}"
    for name in "ab":
        make_release(tmp_path / name, "same")
        made = json.loads((tmp_path / name / "manifest.json").read_text())
        made["provenance"]["build_id"] = name
        made["release"] = name_release(made)
        (tmp_path / name / "manifest.json").write_bytes(canonical(made))
        write_json(tmp_path / name / "inputs.json", {"inputs": "inputs same"})
        write_json(tmp_path / name / "gate.json", {"passed": True, "sequence": 0, "reason": "", "bounds": []})
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda name: run_publish(bucket, uri, tmp_path / name), "ab"))
    target = Bucket(uri)
    for name in "ab":  # a twin whose gate looked only after the other's promotion
        write_json(tmp_path / name / "gate.json", {"passed": True, "sequence": 1, "reason": "", "bounds": []})
        assert run_publish(bucket, uri, tmp_path / name)
    assert read_current(target)[0]["sequence"] == 1
    assert len({name.split("/")[1] for name in target.list("releases/")}) == 2  # nothing is lost
