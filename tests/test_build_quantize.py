import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime import InferenceSession

from build.export import export
from build.exported import FP32, PLAIN
from build.graph import even_tokens, find_ffn_products, find_inner_products, smooth_channels, split_embeddings
from build.quantize import MAX_BYTES, Recipe, choose, quantize
from training.bases import fetch_base
from training.examples import read_labels
from training.model import load_checkpoint, new_checkpoint, save_checkpoint
from training.wide import WideBranch, spell_pieces

pytestmark = pytest.mark.slow

MAX_TOKENS = 32
WINDOWS = [np.array([[0, *range(5, 5 + n), 2]], np.int64) for n in range(3, 20)]


@pytest.fixture(scope="module")
def exported(tiny_bases, tiny_data, tmp_path_factory):
    """A tiny encoder with outliers in its activations, as fine-tuned ones have them, under a random head."""
    folder = tmp_path_factory.mktemp("quantize")
    fetch_base(f"dir:{tiny_bases['bert']}", folder / "base", folder)
    labels = read_labels(tiny_data / "labels.json")
    checkpoint = new_checkpoint(folder / "base", labels, MAX_TOKENS, seed=1)
    checkpoint.model.wide = WideBranch(len(labels), spell_pieces(checkpoint.tokenizer))
    for layer in checkpoint.model.encoder.encoder.layer:
        layer.intermediate.dense.weight.data[:3] *= 300
    save_checkpoint(checkpoint, folder / "checkpoint")
    export(load_checkpoint(folder / "checkpoint"), folder / "onnx", folder / "checkpoint")
    return folder / "onnx"


def run(model: onnx.ModelProto) -> np.ndarray:
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.stack([session.run(None, {"input_ids": ids})[0][0] for ids in WINDOWS])


def test_smoothing_and_evening_leave_the_fp32_function_as_it_was(exported):
    model = onnx.load(exported / FP32)
    before = run(model)
    products = find_ffn_products(model.graph)
    assert len(products) == 2
    inner = find_inner_products(model.graph)
    assert len(inner) == 4
    smooth_channels(model, products, WINDOWS, alpha=0.75)
    smooth_channels(model, inner, WINDOWS, alpha=0.5)
    even_tokens(model.graph, products)
    np.testing.assert_allclose(run(model), before, atol=1e-5)


def test_embeddings_by_row_are_nearer_than_one_scale_for_all(exported):
    model = onnx.load(exported / FP32)
    word = next(t for t in model.graph.initializer if "word_embeddings" in t.name)
    table = numpy_helper.to_array(word).copy()
    table[5] *= 40  # one token's vector sets the only scale
    word.CopyFrom(numpy_helper.from_array(table, word.name))
    before = run(model)
    step = np.abs(table).max() / 127
    word.CopyFrom(numpy_helper.from_array((np.round(table / step) * step).astype(np.float32), word.name))
    by_table = np.abs(run(model) - before).max()
    word.CopyFrom(numpy_helper.from_array(table, word.name))
    assert split_embeddings(model.graph, MAX_TOKENS)
    by_row = np.abs(run(model) - before).max()
    print(f"largest logit difference: a scale a row {by_row:.1e}, one for the table {by_table:.1e}")
    assert by_row < by_table / 3


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(alpha=0.75, by_token=True, by_row=True), Recipe(bits=8)], ids=str)
def test_no_weight_can_saturate_a_sum_of_two_products_in_16_bits(exported, tmp_path, recipe):
    quantize(exported / FP32, tmp_path / "model.onnx", WINDOWS, MAX_TOKENS, recipe)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    products = [value for name, value in tensors.items() if name.endswith("_quantized") and "embed" not in name.lower()]
    assert len(products) == 8  # of each of the two layers attention's two and the feed-forward block's two
    for value in products:
        if recipe.bits == 8:
            assert value.dtype == np.uint8  # the product of two unsigned numbers is widened first
        else:
            assert 2 * 255 * np.abs(value.astype(int)).max() < 2**15


def ask_engine(command: list[str], model: Path) -> list[list[float]]:
    command = [*command, sys.executable, "build/engines.py", "onnxruntime", str(model), "1"]
    lines = "".join(f"{ids.tolist()}\n" for ids in WINDOWS)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line)["logits"] for line in done.stdout.splitlines()[1:]]


@pytest.mark.skipif(
    shutil.which("qemu-x86_64") is None and not os.environ.get("CI"), reason="qemu-user is not installed: apt has it"
)
def test_a_cpu_without_vnni_gives_the_very_same_logits(exported, tmp_path):
    """On AVX2 two products are summed in 16 bits; weights of 7 bits leave nothing to saturate, in any layer."""
    path = tmp_path / "model.onnx"
    quantize(exported / FP32, path, WINDOWS, MAX_TOKENS, Recipe(alpha=0.75, by_row=True))
    here, older = ask_engine([], path), ask_engine(["qemu-x86_64", "-cpu", "Haswell"], path)
    difference = np.abs(np.array(here) - np.array(older)).max()
    print(f"largest logit difference between this CPU and a Haswell: {difference:.1e}")
    assert difference <= 1e-5


def test_smoothing_brings_int8_nearer_where_channels_have_outliers(exported, tmp_path):
    exact = run(onnx.load(exported / FP32))

    def distance(recipe: Recipe) -> float:
        quantize(exported / FP32, tmp_path / "model.onnx", WINDOWS, MAX_TOKENS, recipe)
        return float(np.abs(run(onnx.load(tmp_path / "model.onnx")) - exact).mean())

    plain, smooth = distance(Recipe()), distance(Recipe(alpha=0.75, by_row=True))
    print(f"mean logit difference: plain {plain:.1e}, smoothed {smooth:.1e}")
    assert smooth < plain


def test_a_graph_that_was_not_fused_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="expected integer products and attention, found"):
        quantize(exported / PLAIN, tmp_path / "model.onnx", WINDOWS, MAX_TOKENS, Recipe())
    assert not (tmp_path / "model.onnx").exists()


def test_the_smallest_wins_of_those_that_drift_least_among_the_small_and_fast():
    def row(drift: float, millions: float, milliseconds: float) -> dict:
        return {"drift": drift, "bytes": int(millions * 1e6), "milliseconds": milliseconds}

    plain, better, slow, large = row(0.02, 15, 3.0), row(0.006, 16, 3.2), row(0.001, 16, 3.6), row(0.0, 30, 3.0)
    hardly_better = row(0.0059, 25, 3.0)
    assert choose([plain, better, hardly_better, slow, large]) is better
    assert choose([large]) is large  # the gate refuses it, with its size
    assert row(0, MAX_BYTES / 1e6, 1)["bytes"] == MAX_BYTES
