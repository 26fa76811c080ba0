import json
from pathlib import Path

import numpy as np
import pytest

from training.examples import DataError, read_dataset, split_of
from training.files import write_json

LABELS = [{"name": "기쁨", "id": "joy"}, {"name": "평온", "id": "calm"}]


def write_splits(folder: Path, **lines: list[object]) -> Path:
    write_json(folder / "labels.json", LABELS)
    plain = {split: [{"text": f"{split} 글", "needs": []}] for split in ("train", "validation", "test")}
    for split, records in {**plain, **lines}.items():
        text = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in records]
        (folder / f"{split}.jsonl").write_text("\n".join(text), "utf-8")
    return folder


def test_the_sample_data_is_whole():
    dataset = read_dataset(Path("training/data"))
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [30663, 914, 840]
    assert [label.id for label in dataset.labels][:2] == ["security", "recognition"]
    assert len(dataset.probes) == 10


def test_needs_are_a_list_or_a_map_of_soft_labels(tmp_path):
    rows = [{"text": "하나", "needs": ["평온"]}, {"text": "둘", "needs": {"기쁨": 0.25}}]
    dataset = read_dataset(write_splits(tmp_path, train=rows))
    assert dataset.train.targets.tolist() == [[0, 1], [0.25, 0]]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{not json", "train.jsonl:2: expected one JSON object"),
        ("[]", "train.jsonl:2: expected a JSON object"),
        ({"text": "  ", "needs": []}, "train.jsonl:2: text: expected a non-empty string"),
        ({"text": "글"}, "train.jsonl:2: needs: expected a list or a map"),
        ({"text": "글", "needs": ["분노"]}, "found '분노'; mend it or labels.json"),
        ({"text": "글", "needs": ["기쁨", "기쁨"]}, "expected each label once"),
        ({"text": "글", "needs": {"기쁨": 1.5}}, "expected 기쁨 from 0 to 1, found 1.5"),
        ({"text": "글", "needs": {"기쁨": True}}, "expected 기쁨 from 0 to 1, found True"),
        ({"text": "train 글", "needs": []}, "train.jsonl:2: expected a new text, found that of"),
        ({"text": "test 글", "needs": []}, "leaks from test into train"),
        ({"text": "test  글", "needs": []}, "leaks from test into train"),
    ],
)
def test_a_bad_line_is_named_with_its_remedy(tmp_path, line, problem):
    with pytest.raises(DataError, match=r"; (mend|remove|write)") as caught:
        read_dataset(write_splits(tmp_path, train=[{"text": "train 글", "needs": []}, line]))
    assert problem in str(caught.value)


def test_every_bad_line_is_named_up_to_a_screenful(tmp_path):
    with pytest.raises(DataError) as caught:
        read_dataset(write_splits(tmp_path, train=["oops"] * 30))
    assert str(caught.value).count("train.jsonl:") == 20
    assert "and 10 more" in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    write_splits(tmp_path)
    (tmp_path / "test.jsonl").write_bytes(b'{"text": "\xb0\xa1", "needs": []}')
    with pytest.raises(DataError, match="expected UTF-8"):
        read_dataset(tmp_path)


def test_a_csv_has_a_column_a_label_and_is_split_by_its_texts(tmp_path):
    write_json(tmp_path / "labels.json", LABELS)
    rows = [f'"글, {i}",{i % 2},0.5' for i in range(200)]
    (tmp_path / "mine.csv").write_text("\ufefftext,기쁨,평온\n" + "\n".join(rows), "utf-8")
    dataset = read_dataset(tmp_path)
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 200
    assert 5 < len(dataset.test) < 40
    at = dataset.train.texts.index(next(text for text in dataset.train.texts if text.endswith("1")))
    assert dataset.train.targets[at].tolist() == [1, 0.5]


@pytest.mark.parametrize(
    ("csv", "problem"),
    [("text,기쁨\n글,1", "expected the columns text, 기쁨, 평온"), ("text,기쁨,평온\n글,많이,0", "mine.csv:2: needs")],
)
def test_a_bad_csv_is_named(tmp_path, csv, problem):
    write_json(tmp_path / "labels.json", LABELS)
    (tmp_path / "mine.csv").write_text(csv, "utf-8")
    with pytest.raises(DataError, match=problem):
        read_dataset(tmp_path)


def test_a_text_keeps_its_split_for_ever():
    assert [split_of(text) for text in ("글 0", "글 7", "글 12", "글 21")] == ["train", "train", "train", "train"]
    composed, decomposed = "\uac00\ub098", "\u1100\u1161\u1102\u1161"
    assert split_of(composed) == split_of(decomposed)
    shares = np.mean([[split_of(f"글 {i}") == split for split in ("validation", "test")] for i in range(3000)], axis=0)
    assert np.abs(shares - 0.1).max() < 0.02


@pytest.mark.parametrize("labels", ["[]", '["기쁨"]', "{", '[{"name": "a", "id": "x"}, {"name": "b", "id": "x"}]'])
def test_bad_labels_are_refused(tmp_path, labels):
    write_splits(tmp_path)
    (tmp_path / "labels.json").write_text(labels, "utf-8")
    with pytest.raises(DataError, match=r"labels\.json: expected"):
        read_dataset(tmp_path)


def test_some_splits_without_the_others_are_refused(tmp_path):
    write_splits(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match="found only train, validation"):
        read_dataset(tmp_path)
