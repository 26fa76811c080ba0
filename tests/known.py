"""Releases with known answers: real files and a real manifest around a model that is small enough to write by hand.

A text's logit for a need is -2, and 4 more each time that the first syllable of
the need's name stands in the text, times the release's `strength`.
"""

import math
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from build.publish import FILES, Bucket, make_manifest, promote, publish
from training.files import read_json, write_json

DATA = Path("training/data")
LABELS = read_json(Path(__file__).parent.parent / DATA / "labels.json")
NAMES = [label["name"] for label in LABELS]
MAX_TOKENS = 64


def make_tokenizer() -> Tokenizer:
    """A token a character; what is no need's first syllable is unknown."""
    words = ["<unk>", "<s>", "</s>", *(name[0] for name in NAMES)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def make_model(strength: float, work: int = 0) -> bytes:
    """Sum a row of logits a token: int64 [1, T] to float32 [1, L].

    `work` products of [T, 512] and [512, 512], which come to nothing, take the time that a real model takes.
    """
    table = np.zeros((3 + len(NAMES), len(NAMES)), np.float32)
    table[1] = -2 * strength  # every text has one <s>
    table[3:] = 4 * strength * np.eye(len(NAMES))
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),  # [1, T, L]
        helper.make_node("ReduceSum", ["rows", "axis"], ["sum"], keepdims=0),
        helper.make_node("Gather", ["zeros", "input_ids"], ["x0"]),  # [1, T, 512]
        *(helper.make_node("MatMul", [f"x{i}", "square"], [f"x{i + 1}"]) for i in range(work)),
        helper.make_node("ReduceSum", [f"x{work}"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["sum", "nothing"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "known",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, len(NAMES)])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([1]), "axis"),
            numpy_helper.from_array(np.zeros((len(table), 512), np.float32), "zeros"),
            numpy_helper.from_array(np.zeros((512, 512), np.float32), "square"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def score_known(text: str, strength: float = 1.0) -> dict[str, float]:
    """What a known release answers to a text of one window."""
    logits = {name: strength * (4 * text.count(name[0]) - 2) for name in NAMES}
    return {name: round(1 / (1 + math.exp(-logit)), 4) for name, logit in logits.items()}


def write_known(folder: Path, strength: float = 1.0, work: int = 0) -> bytes:
    """The files of a release, and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_text(f"{name} {strength}", "utf-8")
    (folder / "model.onnx").write_bytes(make_model(strength, work))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    made = {"labels": LABELS, "max_tokens": MAX_TOKENS, "prefix": "", "provenance": {"base": "known"}}
    verified = {"thresholds": [0.5] * len(LABELS), "flips": 0.0, "logit_difference": 0.0}
    quantized = {"recipe": "none"}
    write_json(folder / "metrics.json", {"export": made, "verification": verified, "quantization": quantized})
    return write_manifest(folder)


def write_manifest(folder: Path) -> bytes:
    """The manifest of the files as they are now."""
    return make_manifest(folder, "inputs", "build", "commit")


def release_known(uri: str, folder: Path, strength: float = 1.0, work: int = 0) -> str:
    """Publish a known release and make it the current one."""
    bucket = Bucket(uri)
    release = publish(bucket, folder, write_known(folder, strength, work))
    promote(bucket, release)
    return release
