import sys

import numpy as np
import pytest

from training import choose, distill
from training.bases import fetch_base
from training.examples import read_dataset
from training.files import read_json
from training.finetune import finetune, parse_options
from training.metrics import sigmoid
from training.model import encoder_layers, load_checkpoint, predict_logits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(tiny_bases, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    fetch_base(f"dir:{tiny_bases['bert']}", folder / "base", folder)
    options = parse_options(["--epochs", "2", "--max-tokens", "64", "--learning-rate", "1e-3"])
    finetune(folder / "base", read_dataset(tiny_data), folder / "teacher", options)
    return folder / "teacher"


def test_a_softened_target_lies_between_the_label_and_the_teacher(teacher, tiny_data):
    dataset = read_dataset(tiny_data)
    softened = distill.soften(dataset, [teacher], trust=0.25, unlabelled=10, seed=1).train
    known = len(dataset.train)
    said = sigmoid(predict_logits(load_checkpoint(teacher), softened.texts))
    np.testing.assert_allclose(softened.targets[:known], 0.25 * said[:known] + 0.75 * dataset.train.targets, atol=1e-5)
    np.testing.assert_allclose(softened.targets[known:], said[known:], atol=1e-5)
    assert softened.sources[known:] == ["unlabelled"] * (len(softened) - known)


def test_unlabelled_texts_are_new_and_none_twice(tiny_data):
    train = read_dataset(tiny_data).train
    made = distill.make_unlabelled(train, 20, seed=1)
    assert made == distill.make_unlabelled(train, 20, seed=1)
    assert 0 < len(made) == len(set(made)) <= 20
    assert not set(made) & set(train.texts)


def test_a_student_has_the_lowest_layers_and_the_smallest_of_near_equals_is_chosen(
    teacher, tiny_data, tmp_path, monkeypatch, capsys
):
    student, output = tmp_path / "student", tmp_path / "checkpoint"
    common = ["--data", str(tiny_data)]
    arguments = ["--base", str(teacher.parent / "base"), "--teachers", str(teacher), "--output", str(student)]
    arguments += ["--layers", "1", "--epochs", "1", "--max-tokens", "64", "--unlabelled", "5"]
    monkeypatch.setattr(sys, "argv", ["distill", *common, *arguments])
    distill.main()
    assert len(encoder_layers(load_checkpoint(student).model.encoder)) == 1
    monkeypatch.setattr(
        sys, "argv", ["choose", *common, "--candidates", f"{student},{teacher}", "--output", str(output)]
    )
    choose.main()
    noted = read_json(output / "candidates.json")
    expected = choose.choose(noted["candidates"])["name"]
    assert noted["chosen"] == expected
    assert len(encoder_layers(load_checkpoint(output).model.encoder)) == (1 if expected == "student" else 2)
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize(("small", "expected"), [(0.7951, "small"), (0.7949, "large")])
def test_half_a_point_is_what_size_may_cost(small, expected):
    candidates = [
        {"name": "small", "parameters": 1, "macro_f1": small},
        {"name": "large", "parameters": 2, "macro_f1": 0.8},
    ]
    assert choose.choose(candidates)["name"] == expected


def test_more_layers_than_the_base_has_are_refused(teacher, tiny_data, tmp_path):
    options = parse_options(["--layers", "3"])
    with pytest.raises(ValueError, match="expected 0 .all. to 2, found 3"):
        finetune(teacher.parent / "base", read_dataset(tiny_data), tmp_path / "out", options)
