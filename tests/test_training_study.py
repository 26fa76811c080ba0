import sys

import pytest

from training import study
from training.bases import fetch_base
from training.files import read_json

pytestmark = pytest.mark.slow


def test_strategies_and_rivals_stand_in_one_table_and_what_is_done_is_kept(
    tiny_bases, tiny_data, tmp_path, monkeypatch, capsys
):
    fetch_base(f"dir:{tiny_bases['bert']}", tmp_path / "base", tmp_path)
    arguments = ["--base", str(tmp_path / "base"), "--data", str(tiny_data), "--output", str(tmp_path / "study")]
    arguments += ["--strategies", "lora", "--seeds", "1,2", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["study", *arguments])
    study.main()
    found = read_json(tmp_path / "study" / "study.json")
    assert {name: len(runs) for name, runs in found.items()} == {
        "character n-grams": 1,
        "static embeddings": 1,
        "lora": 2,
    }
    assert found["lora"][0]["trainable_parameters"] < found["lora"][0]["total_parameters"] / 2
    assert "macro-F1" in capsys.readouterr().out
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("model.safetensors")}
    study.main()
    assert trained == {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("model.safetensors")}
