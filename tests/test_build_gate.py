import json
import uuid

import numpy as np
import pytest
import yaml
from google.cloud.devtools.cloudbuild_v1 import Build
from google.protobuf.json_format import ParseDict, ParseError
from known import LABELS, NAMES, write_known, write_manifest

from build.fresh import find_same, gather_inputs
from build.gate import judge, parse_arguments
from build.local import BUCKET, PIPELINE
from build.parameters import find_problems, model_parameters, read_defaults
from build.publish import Bucket, PublishError, list_promotions, promote, publish, publish_verdict
from build.rollback import list_releases
from training.examples import Dataset, Examples, Label
from training.files import read_json, write_json

FLOORS = ["macro-F1", "flips of INT8", "PyTorch to ONNX, logits", "model, MB"]


@pytest.fixture
def target(bucket) -> Bucket:
    return Bucket(f"gs://{BUCKET}/{uuid.uuid4().hex}")


@pytest.fixture
def dataset() -> Dataset:
    """Texts that hold the first character of each need that they express, which is all that a known model knows."""
    targets = np.array([[(i + 3 * k) % 5 == 0 for k in range(len(NAMES))] for i in range(40)], np.float32)
    texts = [
        " ".join(name[0] for name, there in zip(NAMES, row, strict=True) if there) + f" x{i}"
        for i, row in enumerate(targets)
    ]
    examples = Examples(texts, targets, [""] * len(texts))
    return Dataset([Label(label["name"], label["id"]) for label in LABELS], examples, examples, examples)


def verdict_of(target, folder, dataset, *bounds, strength=1.0):
    """Judge a known release."""
    write_known(folder, strength)
    return judge(target, folder, dataset, parse_arguments(["--model-uri", target.uri, *bounds]))


def serve(target, folder, dataset, inputs="inputs", strength=1.0):
    verdict = verdict_of(target, folder, dataset, strength=strength)
    release = publish(target, folder, write_manifest(folder))
    publish_verdict(target, release, inputs, verdict)
    if verdict["passed"]:
        promote(target, release, after=verdict["sequence"])
    return release


def test_a_first_release_is_held_to_the_floors_alone(target, tmp_path, dataset):
    verdict = verdict_of(target, tmp_path / "a", dataset)
    assert (verdict["passed"], verdict["sequence"], verdict["reason"]) == (True, 0, "")
    assert [bound["name"] for bound in verdict["bounds"]] == FLOORS
    assert verdict["bounds"][0]["found"] == 1.0


def test_a_release_under_a_floor_is_refused_even_if_it_is_the_first(target, tmp_path, dataset):
    verdict = verdict_of(target, tmp_path / "a", dataset, strength=-1.0)
    assert not verdict["passed"]
    assert verdict["reason"].startswith("macro-F1: expected at least 0.5, found 0")


@pytest.mark.parametrize("flips", [0.5, float("inf")])
def test_a_release_whose_int8_is_not_its_fp32_is_refused(target, tmp_path, dataset, flips):
    write_known(tmp_path / "a")
    metrics = read_json(tmp_path / "a" / "metrics.json")
    metrics["verification"]["flips"] = flips
    (tmp_path / "a" / "metrics.json").write_text(json.dumps(metrics))
    verdict = judge(target, tmp_path / "a", dataset, parse_arguments(["--model-uri", target.uri]))
    assert verdict["reason"] == f"flips of INT8: expected at most 0.025, found {flips}"


def test_a_worse_release_is_refused_and_says_by_how_much_in_which_need(target, tmp_path, dataset):
    first = serve(target, tmp_path / "a", dataset)
    verdict = verdict_of(target, tmp_path / "b", dataset, "--min-macro-f1", "0", strength=-1.0)
    assert f"macro-F1, of {first} 1.0000: expected at least 0.99, found" in verdict["reason"]
    assert f"F1 of {NAMES[0]}: expected at least 0.92, found" in verdict["reason"]
    assert verdict["sequence"] == 1


def test_small_losses_do_not_add_up_because_the_best_of_the_last_five_counts(target, tmp_path, dataset):
    first = serve(target, tmp_path / "a", dataset)
    second = publish(target, tmp_path / "b", write_known(tmp_path / "b", strength=-1.0))
    promote(target, second, forced="to have a bad one in force")
    verdict = verdict_of(target, tmp_path / "c", dataset, "--min-macro-f1", "0", strength=-1.0)
    assert f"macro-F1, of {first} 1.0000: expected at least 0.99" in verdict["reason"]


def test_releases_with_other_labels_are_not_compared_with(target, tmp_path, dataset):
    serve(target, tmp_path / "a", dataset)
    renamed = [Label(f"{label.name}!", label.id) for label in dataset.labels]
    other = Dataset(renamed, dataset.train, dataset.validation, dataset.test)
    verdict = verdict_of(target, tmp_path / "b", other, strength=-1.0)
    assert [bound["name"] for bound in verdict["bounds"]] == FLOORS
    assert verdict["reason"] == "macro-F1: expected at least 0.5, found 0"  # nothing to measure it by


def test_a_promotion_that_another_overtook_since_the_gate_is_refused(target, tmp_path, dataset):
    early = verdict_of(target, tmp_path / "a", dataset)
    mine = publish(target, tmp_path / "a", write_manifest(tmp_path / "a"))
    theirs = serve(target, tmp_path / "b", dataset, strength=1.1)
    with pytest.raises(PublishError, match=f"found promotion 1 of {theirs}; another promotion came first"):
        promote(target, mine, after=early["sequence"])
    assert promote(target, mine, forced="ours after all")["forced"] == "ours after all"
    assert [pointer["release"] for pointer in list_promotions(target)] == [theirs, mine]


def test_every_promotion_is_noted_also_one_that_was_cut_off_before_its_note(target, tmp_path, dataset):
    first = serve(target, tmp_path / "a", dataset)
    for blob in target._bucket.list_blobs(prefix=target._prefix + "promotions/"):
        blob.delete()
    assert [pointer["release"] for pointer in list_promotions(target)] == [first]
    second = serve(target, tmp_path / "b", dataset, strength=1.1)
    assert [pointer["release"] for pointer in list_promotions(target)] == [first, second]
    assert target.list("promotions/") == ["promotions/000001.json", "promotions/000002.json"]


def test_the_list_of_releases_says_what_became_of_each(target, tmp_path, dataset):
    first = serve(target, tmp_path / "a", dataset)
    second = serve(target, tmp_path / "b", dataset, strength=1.1)
    refused = serve(target, tmp_path / "c", dataset, strength=-1.0)
    promote(target, first)
    rows = {row["release"]: row for row in list_releases(target)}
    assert rows.keys() == {first, second, refused}
    assert [len(rows[name]["promoted"]) for name in (first, second, refused)] == [2, 1, 0]
    assert rows[refused]["refused"].startswith("macro-F1: expected at least 0.5")
    assert [rows[name]["served"] for name in (first, second, refused)] == [True, False, False]


def test_the_same_inputs_are_nothing_new_where_they_are_served_were_served_or_were_refused(target, tmp_path, dataset):
    assert find_same(target, "one") == ""
    first = serve(target, tmp_path / "a", dataset, "one")
    assert "which was served once" in find_same(target, "one")  # by its verdict
    assert f"{first}, which is served" in find_same(target, "inputs")  # by its manifest
    serve(target, tmp_path / "b", dataset, "two", strength=1.1)
    assert f"{first}, which was served once" in find_same(target, "one")
    serve(target, tmp_path / "c", dataset, "three", strength=-1.0)
    assert "was refused: macro-F1: expected at least 0.5" in find_same(target, "three")
    assert find_same(target, "three", forced=True) == ""
    promote(target, first)
    assert find_same(target, "three") == ""  # another is served now, so it may be judged again
    assert find_same(target, "four") == ""


def test_inputs_change_with_data_code_base_and_model_parameters_and_with_nothing_else(tmp_path, tiny_data):
    def inputs(commit="c", **given):
        return gather_inputs(tmp_path, commit, given)["inputs"]

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("x")
    write_json(tmp_path / "base" / "base.json", {"base": "dir:x", "revision": "1", "prefix": ""})
    before = inputs()
    assert inputs(_MODEL_URI="gs://x/y", _DEPLOY="--x", _TRAIN_ON="vertex") == before
    assert inputs(_EPOCHS="9") != before
    assert inputs(commit="d") != before
    assert inputs(commit="") != before
    assert inputs(_CHECKPOINT=f"dir:{tiny_data}") != before
    write_json(tmp_path / "base" / "base.json", {"base": "dir:x", "revision": "2", "prefix": ""})
    assert inputs() != before
    write_json(tmp_path / "base" / "base.json", {"base": "dir:x", "revision": "1", "prefix": ""})
    assert inputs() == before
    (tmp_path / "data" / "a.csv").write_text("y")
    assert inputs() != before


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"_EPOCH": "1"}, "_EPOCH: expected one of _MODEL_URI, "),
        ({"_EPOCHS": " "}, "_EPOCHS: expected a value such as 4, found none"),
        ({"_TRAIN_ON": "moon"}, "_TRAIN_ON: expected one of build, vertex, found moon"),
    ],
)
def test_an_unknown_or_empty_parameter_is_a_problem(given, problem):
    (found,) = find_problems(given, read_defaults())
    assert found.startswith(problem)


def test_the_pipeline_is_what_the_api_takes():
    pipeline = yaml.safe_load(PIPELINE.read_text("utf-8"))
    ParseDict(pipeline, Build.pb(Build()))
    with pytest.raises(ParseError, match="unknown"):
        ParseDict(pipeline | {"unknown": 1}, Build.pb(Build()))


def test_empty_is_right_where_the_default_is_and_other_variables_are_no_parameters():
    assert find_problems({"_FORCE": "", "_": "x", "PATH": "", "__A": ""}, read_defaults()) == []
    assert "_FORCE" not in model_parameters({"_FORCE": "x"}, read_defaults())
