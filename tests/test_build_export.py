import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_wordpiece
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from build.export import ExportError, check_fusion
from training.files import read_json

pytestmark = pytest.mark.slow

PIECES = 119_547  # of DistilBERT-multilingual


@pytest.fixture(scope="module")
def own_model(tmp_path_factory) -> Path:
    """What a person's own fine-tuning leaves: all layers and pieces, narrow, random weights, labels in its config."""
    folder = tmp_path_factory.mktemp("own")
    document = json.loads(make_wordpiece().to_str())
    vocabulary = document["model"]["vocab"]
    vocabulary |= {f"слово{i}": i for i in range(len(vocabulary), PIECES)}
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=PIECES,
        dim=192,
        hidden_dim=768,
        id2label={0: "소속감", 1: "joy"},
        label2id={"소속감": 0, "joy": 1},
        pad_token_id=vocabulary["[PAD]"],
    )
    model = DistilBertForSequenceClassification(config)
    model.classifier.weight.data *= 20  # away from 0.5, where a random model's decisions hang on nothing
    model.save_pretrained(folder)
    return folder


def run(module: str, *arguments: object) -> str:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_model_of_ones_own_is_trimmed_fused_quantized_and_verified(own_model, tiny_data, tmp_path):
    onnx = tmp_path / "onnx"
    said = run("build.export", "--checkpoint", f"dir:{own_model}", "--data", tiny_data, "--output", onnx)
    assert "'Attention': 6" in said
    run("build.quantize", "--onnx", onnx, "--data", tiny_data)
    run("build.verify", "--onnx", onnx, "--data", tiny_data)
    made, found = read_json(onnx / "export.json"), read_json(onnx / "verification.json")
    assert made["labels"] == [{"name": "소속감", "id": "label_0"}, {"name": "joy", "id": "joy"}]
    assert found["logit_difference"] <= 1e-4
    assert found["flips"] <= 0.2
    assert found["bytes"] < 4e6


def test_missing_fused_nodes_are_refused():
    assert check_fusion({"Attention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2, "Gelu": 0}, 2) == {
        "Attention": 2,
        "SkipLayerNormalization": 4,
        "BiasGelu": 2,
    }
    with pytest.raises(ExportError, match="found {'Attention': 1}"):
        check_fusion({"Attention": 1, "SkipLayerNormalization": 4, "BiasGelu": 2}, 2)


def test_a_checkpoint_that_is_none_is_named(tmp_path):
    command = [
        sys.executable,
        "-m",
        "build.export",
        "--checkpoint",
        f"dir:{tmp_path}/none",
        "--output",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "expected dir:<path> of a folder" in done.stderr
