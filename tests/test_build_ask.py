"""On a function with known answers: a need is there where its first syllable is."""

import io
import json

import pytest
from known import LABELS, NAMES
from rich.console import Console

from build import ask
from training.files import write_json


def show(address, folder, labels, *, probes):
    write_json(folder / "labels.json", labels)
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{label['name'][0]} {split}", "needs": [label["name"]]} for label in labels]
        rows += [{"text": f"하늘 {split} {i}", "needs": [], "source": "quiet"} for i in range(2)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    if probes:
        lines = [{"text": f"{name[0]} 바다", "need": name} for name in NAMES]
        (folder / "probes.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    said = io.StringIO()
    ask.show_release(address, folder, Console(file=said, width=200))
    return said.getvalue()


def test_a_release_is_shown_by_its_probes_and_its_test_split(address_of_known, tmp_path):
    said = show(address_of_known, tmp_path, LABELS, probes=True)
    assert "10 of 10 needs on top, 10 of them at 0.5 or more; the other 90 scores" in said
    assert "test split over HTTP, INT8, at 0.5: macro-F1 1.0000, micro-F1 1.0000\n" in said
    assert "0.0% of the texts without a need are given one, 0.0% of those in sources mostly without" in said


def test_without_probe_sentences_only_the_test_split_is_shown(address_of_known, tmp_path):
    assert "on top" not in show(address_of_known, tmp_path, LABELS, probes=False)


def test_of_data_with_other_labels_nothing_is_said(address_of_known, tmp_path):
    assert show(address_of_known, tmp_path, [{"name": "다른 것", "id": "other"}], probes=False) == ""


def test_a_problem_is_told_as_the_function_told_it(address_of_known):
    with pytest.raises(ask.AnswerError, match="expected 200, found 422: .*expected"):
        ask.post(address_of_known, {"text": " "})


def test_a_bar_is_as_long_as_its_score_and_marked_where_it_is_a_need():
    said = io.StringIO()
    Console(file=said, width=80).print(ask.make_bars({"needs": ["a"], "scores": {"a": 0.75, "b": 0.25}}))
    first, second = said.getvalue().splitlines()
    assert (first.count("█"), "●" in first, second.count("█"), "●" in second) == (30, True, 10, False)
