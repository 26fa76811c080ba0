"""On a model with known answers: a need is there where its first syllable is."""

import sys

import numpy as np
import pytest
from known import LABELS, MAX_TOKENS, NAMES, write_known

from build import behaviour
from build.exported import INT8, load_classifier
from training.examples import Examples
from training.files import write_json


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    write_known(folder)
    write_json(folder / "export.json", {"labels": LABELS, "max_tokens": MAX_TOKENS, "prefix": ""})
    return folder


def test_a_decision_turns_without_the_word_that_makes_it_and_not_without_others(onnx):
    without, short = "하늘 파란 바다 나무", "안 하늘"
    texts = ["하늘 안 파란 바다", "공 하늘 파란 바다 나무 구름", without, short]
    found = behaviour.compare_left_out(load_classifier(onnx, onnx / INT8), texts)
    assert found == {"decisions": 2, "highest": 1.0, "random": 0.0}


def test_what_only_a_later_window_says_is_lost_by_cutting(onnx):
    targets = np.eye(len(NAMES), dtype=np.float32)[:2]
    texts = ["하늘 " * 40 + "안", "하늘 " * 40 + "인"]  # 120 tokens
    found = behaviour.compare_windows(onnx, Examples(texts, targets, ["", ""]))
    cut, whole = "first alone (cut)", "highest"
    assert found[64, cut] < found[64, whole]
    assert found[256, cut] == found[256, whole] == found[64, whole]


def test_joined_texts_have_the_needs_of_all(onnx):
    targets = np.eye(len(NAMES), dtype=np.float32)
    joined = behaviour.join_texts(Examples(NAMES, targets, [""] * len(NAMES)))
    assert [row.sum() for row in joined.targets] == [behaviour.JOINED_TEXTS, len(NAMES) - behaviour.JOINED_TEXTS]
    for text, row in zip(joined.texts, joined.targets, strict=True):
        assert {NAMES[i] for i in np.flatnonzero(row)} == set(text.splitlines())


def test_the_command_prints_both_tables(onnx, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["behaviour", "--onnx", str(onnx), "--split", "validation"])
    behaviour.main()
    said = capsys.readouterr().out
    assert "60 joined (validation), macro-F1 at 0.5, INT8" in said
    assert "turn without the 2 highest words" in said
