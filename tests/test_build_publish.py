import hashlib
import json
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from build.local import BUCKET
from build.publish import FILES, Bucket, PublishError, make_manifest, promote, publish
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
            return promote(target, release)["release"]
        except PublishError as error:
            assert "another promotion came first" in str(error)
            return ""

    with ThreadPoolExecutor(4) as pool:
        won = [release for release in pool.map(attempt, releases) if release]
    pointer = parse_pointer(target.read("current.json")[0])
    assert pointer.sequence == len(won)
    assert pointer.release in won


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
