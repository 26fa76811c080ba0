"""What the build's commands print and refuse; what they do is shown by the tests of their modules."""

import importlib
import io
import json
import sys
import uuid

import pytest
from known import write_known

from build import data, parameters, rollback, status
from build.local import BUCKET
from build.publish import Bucket, promote, publish
from function.manifest import MODEL
from training.files import write_json


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a module's command with these arguments; returns what it printed."""

    def run(module, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def target(bucket) -> Bucket:
    return Bucket(f"gs://{BUCKET}/{uuid.uuid4().hex}")


def make_release(target, folder, strength=1.0):
    return publish(target, folder, write_known(folder, strength))


def test_rollback_lists_and_goes_back_and_needs_a_reason_for_what_was_never_served(target, tmp_path, call):
    first, second, third = (make_release(target, tmp_path / str(i), 1.0 + i) for i in range(3))
    with pytest.raises(SystemExit, match="--to x: expected one that was served before, found none"):
        call(rollback, "--model-uri", target.uri, "--to", "x")
    promote(target, first)
    with pytest.raises(SystemExit, match="--to previous: expected an earlier promotion, found none"):
        call(rollback, "--model-uri", target.uri, "--to", "previous")
    promote(target, second)
    assert f"current: {first}, sequence 3" in call(rollback, "--model-uri", target.uri, "--to", "previous")
    with pytest.raises(SystemExit, match=f"--to {third}: expected one that was served before"):
        call(rollback, "--model-uri", target.uri, "--to", third)
    said = call(rollback, "--model-uri", target.uri, "--to", third, "--force", "tried by hand")
    assert f"current: {third}, sequence 4" in said
    listed = call(rollback, "--model-uri", target.uri)
    assert all(release in listed for release in (first, second, third))
    assert "served (forced: tried by hand)" in listed


def test_status_says_what_is_served_or_that_nothing_is(target, tmp_path, call):
    assert "nothing is served yet" in call(status, "--model-uri", target.uri)
    release = make_release(target, tmp_path)
    promote(target, release)
    assert f"served: {release}, promotion 1, since 20" in call(status, "--model-uri", target.uri)


@pytest.mark.parametrize("name", ["rollback", "status", "gate", "fresh", "publish"])
def test_an_address_that_is_none_ends_a_command_with_what_was_expected(name, call, tmp_path):
    write_json(tmp_path / "base" / "base.json", {"base": "dir:x", "revision": "1", "prefix": ""})
    (tmp_path / "data").mkdir()
    more = {"gate": ["--data", "training/data"], "fresh": ["--build", str(tmp_path)]}
    with pytest.raises(SystemExit, match=r"--model-uri: expected gs://bucket/prefix, found 's3://x'"):
        call(importlib.import_module(f"build.{name}"), "--model-uri", "s3://x", *more.get(name, []))


def test_data_comes_from_a_folder_or_a_bucket_and_what_cannot_be_used_leaves_the_old(target, tiny_data, tmp_path, call):
    output = tmp_path / "data"
    for path in tiny_data.iterdir():
        target.write(path.name, path.read_bytes(), generation=0)
    target.write("releases/x.json", b"{}", generation=0)
    for source in (str(tiny_data), target.uri):
        assert "2 labels: 소속감, 즐거움" in call(data, "--data", source, "--output", str(output))
        assert {path.name for path in output.iterdir()} == {path.name for path in tiny_data.iterdir()}
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "labels.json").write_text(json.dumps([{"name": "가", "id": "a"}]))
    (tmp_path / "broken" / "texts.jsonl").write_text('{"text": "x", "needs": ["나"]}')
    for source, problem in (
        (tmp_path / "empty", "expected labels.json and texts there, found neither"),
        (tmp_path / "none", "expected labels.json and texts there, found neither"),
        (tmp_path / "broken", "texts.jsonl:1"),
    ):
        with pytest.raises(SystemExit, match=problem):
            call(data, "--data", str(source), "--output", str(output))
    assert "2 labels" in call(data, "--data", str(output), "--output", str(tmp_path / "again"))


def test_the_first_step_takes_the_environment_and_removes_what_an_earlier_build_left(call, monkeypatch, tmp_path):
    pipeline = parameters.PIPELINE.resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cloudbuild.yaml").write_bytes(pipeline.read_bytes())
    (tmp_path / ".local/build").mkdir(parents=True)
    (tmp_path / ".local/build/nothing-new").touch()
    monkeypatch.setattr(sys, "stdin", io.StringIO("PATH=/bin\0_EPOCHS=2\0"))
    assert "parameters, all known" in call(parameters)
    assert not (tmp_path / ".local/build/nothing-new").exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("_EPOCH=2\0_STRATEGY=half"))
    with pytest.raises(
        SystemExit, match=r"_EPOCH: expected one of _MODEL_URI(.|\n)*_STRATEGY: expected one of partial"
    ):
        call(parameters)


def test_the_gate_does_not_compare_with_a_release_that_is_not_whole(target, tmp_path, call):
    release = make_release(target, tmp_path)
    promote(target, release)
    name = f"releases/{release}/{MODEL}"
    target.write(name, b"other bytes", target.read(name)[1])
    gate = importlib.import_module("build.gate")
    options = ["--release", str(tmp_path), "--data", "training/data", "--output", str(tmp_path / "gate.json")]
    said = call(gate, "--model-uri", target.uri, "--min-macro-f1", "0", *options)
    assert f"not compared with {release}: {release}/{MODEL}: expected its sha256, found another" in said.replace(
        "\n", ""
    )
    assert "passed: to be promoted" in said
