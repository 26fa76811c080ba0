"""Quantization: a fused fp32 ONNX file in, the best of several INT8 recipes out.

Weights become integers once, with a scale a channel; activations get one scale a
tensor at run time. No recipe may saturate: on a CPU without VNNI the product of
8-bit signed weights and activations overflows the 16-bit sums of AVX2's
`vpmaddubsw`. Weights of 7 bits cannot (`reduce_range`), nor can unsigned ones
of 8, for which ONNX Runtime takes a slower instruction
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
So the integers, and the scores, are the same on every CPU.

What one scale cannot hold `build.graph` evens out beforehand.

The recipes are judged on the validation split through the function's own
classifier. Of those within `MAX_BYTES` and at most `SLOWER` slower than the
fastest, the smallest is released whose probabilities drift from fp32 by no more
than `ALIKE` beyond the least: the flips of decisions that follow are too few to
choose by.

    python -m build.quantize --onnx .local/build/onnx --data training/data
"""

import argparse
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.onnx_model import OnnxModel
from rich.console import Console
from rich.table import Table

from build.exported import FP32, INT8, load_classifier, measure_in_turn, read_windows, score_texts
from build.graph import (
    SLOW,
    even_tokens,
    find_ffn_products,
    find_inner_products,
    optimize_graph,
    shrink_wide_table,
    smooth_channels,
    split_embeddings,
)
from training.examples import Dataset, Label, demand_dataset
from training.files import read_json, write_json
from training.metrics import HALF, match_labels, summarize_scores

NOTE = "quantization.json"
OPERATORS = ["MatMul", "Attention", "Gather", "EmbedLayerNormalization"]
MAX_BYTES = 27_000_000
SLOWER = 0.15
"""Share of the fastest recipe's time that another may take more."""
ALIKE = 0.1
"""Share of the least drift that another recipe may drift more, if it is smaller."""
CALIBRATION_TEXTS = 200
TIMED_TEXTS = 60
SMALL = 1 << 16
"""A product of fewer weights stays in fp32."""


@dataclass(frozen=True)
class Recipe:
    """One way to quantize."""

    bits: int = 7
    """Of a weight: 7 signed, or 8 unsigned."""
    alpha: float | None = None
    """How much of the channels' difficulty moves into the weights of each FFN's second product, 0 to 1."""
    inner: float | None = None
    """The same of its first product, and of attention's last."""
    by_token: bool = False
    by_row: bool = False
    exact: str = ""
    """What stays in fp32: "ffn" for each feed-forward block's second product, "embeddings", or nothing."""

    def __str__(self) -> str:
        parts = [f"{self.bits}-bit weights per channel"]
        parts += [f"FFN channels smoothed, alpha {self.alpha:g}"] if self.alpha is not None else []
        parts += [f"inner ones {self.inner:g}"] if self.inner is not None else []
        parts += ["FFN tokens evened"] if self.by_token else []
        parts += ["embeddings per row"] if self.by_row else []
        parts += [f"{self.exact} in fp32"] if self.exact else []
        return ", ".join(parts)


RECIPES = (
    Recipe(),
    Recipe(alpha=0.5),
    Recipe(alpha=0.75),
    Recipe(alpha=0.75, by_row=True),
    Recipe(alpha=0.75, by_token=True),
    Recipe(alpha=0.5, by_token=True, by_row=True),
    Recipe(alpha=0.75, by_token=True, by_row=True),
    Recipe(alpha=0.75, inner=0.5, by_token=True),
    Recipe(alpha=0.75, inner=0.65, by_token=True),
    Recipe(alpha=0.75, inner=0.65, by_token=True, by_row=True),
    Recipe(alpha=0.75, exact="embeddings"),
    Recipe(exact="ffn"),
    Recipe(bits=8, alpha=0.75, by_token=True, by_row=True),
)


def quantize(source: Path, output: Path, windows: list[np.ndarray], max_tokens: int, recipe: Recipe) -> None:
    """Write the INT8 model of one recipe.

    `windows` are int64 [1, T] token ids to find the channels' ranges with; no
    window has more than `max_tokens`. Raises ValueError where nothing was quantized.
    """
    model = onnx.load(source)
    exact = prepare(model, windows, max_tokens, recipe)
    with tempfile.TemporaryDirectory() as scratch:
        prepared, new = Path(scratch) / "prepared.onnx", Path(scratch) / "new.onnx"
        onnx.save(model, prepared)
        logging.getLogger().addFilter(_is_no_hint)
        quantize_dynamic(
            prepared,
            new,
            op_types_to_quantize=OPERATORS,
            per_channel=True,
            reduce_range=recipe.bits == 7,
            weight_type=QuantType.QInt8 if recipe.bits == 7 else QuantType.QUInt8,
            # fused operators have no inferred types, so their inputs are declared
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
            nodes_to_exclude=sorted(exact),
        )
        kinds = _kinds(new)
        if not {"MatMulInteger", "QAttention"} <= kinds:
            raise ValueError(
                f"quantization: expected integer products and attention, found {sorted(kinds)}; fuse first"
            )
        optimize_graph(new, output)
    if left := _kinds(output) & SLOW:
        raise ValueError(
            f"optimization: expected none of {sorted(SLOW)}, found {sorted(left)}; compare onnxruntime's version"
        )


def prepare(model: onnx.ModelProto, windows: list[np.ndarray], max_tokens: int, recipe: Recipe) -> set[str]:
    """Do to the graph, in place, what a recipe asks for; returns the names of the nodes that stay in fp32."""
    graph = model.graph
    shrink_wide_table(graph)
    seconds, inner = find_ffn_products(graph), find_inner_products(graph)
    if recipe.alpha is not None:
        smooth_channels(model, seconds, windows, recipe.alpha)
    if recipe.inner is not None:
        smooth_channels(model, inner, windows, recipe.inner)
    if recipe.by_token:
        even_tokens(graph, seconds)
    small = [node.name for node in graph.node if _is_small(node, graph)]
    exact = {*small, *(f"{name}_MatMul" for name in small)}  # as quantize_dynamic calls a Gemm that it rewrites
    if recipe.by_row:
        exact |= set(split_embeddings(graph, max_tokens))
        OnnxModel(model).prune_graph()  # segments and mask have no reader any more
    if recipe.exact == "ffn":
        exact |= {node.name for node in seconds}
    if recipe.exact == "embeddings":
        exact |= {node.name for node in graph.node if node.op_type in ("EmbedLayerNormalization", "Gather")}
    return exact


def _is_no_hint(record: logging.LogRecord) -> bool:
    """Not ONNX Runtime's hint to pre-process first, which fused graphs have no use for."""
    return "pre-processing" not in record.getMessage()


def _kinds(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def _is_small(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    """The head and the n-grams' table: nothing to gain, and the logits come right after them."""
    sizes = [np.prod(tensor.dims) for tensor in graph.initializer if tensor.name in node.input]
    return any("wide" in name for name in node.input) or (node.op_type == "Gemm" and max(sizes, default=0) < SMALL)


def search(folder: Path, dataset: Dataset, scratch: Path, recipes: tuple[Recipe, ...] = RECIPES) -> list[dict]:
    """Quantize by every recipe into `scratch` and judge it on validation.

    A row has `recipe`, `path`, `bytes`, `drift` (mean difference of probabilities),
    `flips`, `milliseconds` (median, all in turn on the same texts) and, where the
    labels are the data's, `macro_f1` and `f1`.
    """
    labels = [Label(**label) for label in read_json(folder / "export.json")["labels"]]
    matched = match_labels(dataset, labels)
    validation = (matched or dataset).validation
    max_tokens = read_json(folder / "export.json")["max_tokens"]
    windows = read_windows(folder, dataset.train.part(CALIBRATION_TEXTS, seed=0).texts)
    optimize_graph(folder / FP32, scratch / FP32)
    exact = score_texts(load_classifier(folder, scratch / FP32), validation.texts, "fp32")  # [B, L]
    rows, classifiers = [], []
    for i, recipe in enumerate(recipes):
        path = scratch / f"{i}.onnx"
        quantize(folder / FP32, path, windows, max_tokens, recipe)
        classifiers.append(load_classifier(folder, path))
        scores = score_texts(classifiers[-1], validation.texts, str(recipe))
        row = {"recipe": recipe, "path": path, "bytes": path.stat().st_size}
        row["drift"] = float(np.abs(scores - exact).mean())
        row["flips"] = float(((scores >= HALF) != (exact >= HALF)).mean())
        if matched:
            row |= {key: summarize_scores(scores, validation.targets)[key] for key in ("macro_f1", "f1")}
        rows.append(row)
    for row, milliseconds in zip(rows, measure_in_turn(classifiers, validation.texts[:TIMED_TEXTS]), strict=True):
        row["milliseconds"] = milliseconds
    return rows


def choose(rows: list[dict]) -> dict:
    """The smallest row of those that hardly drift more than the least, of those fast and small enough.

    Where none is small enough, it is the smallest of all.
    """
    small = [row for row in rows if row["bytes"] <= MAX_BYTES] or [min(rows, key=lambda row: row["bytes"])]
    fastest = min(row["milliseconds"] for row in small)
    fast = [row for row in small if row["milliseconds"] <= fastest * (1 + SLOWER)]
    least = min(row["drift"] for row in fast)
    alike = [row for row in fast if row["drift"] <= least * (1 + ALIKE)]
    return min(alike, key=lambda row: (row["bytes"], row["drift"]))


def make_table(rows: list[dict], chosen: dict) -> Table:
    """The recipes side by side."""
    table = Table("", "recipe", "drift", "flips", "macro-F1", "MB", "ms a text")
    for row in rows:
        f1 = f"{row['macro_f1']:.4f}" if "macro_f1" in row else ""
        figures = [
            f"{row['drift']:.5f}",
            f"{row['flips']:.2%}",
            f1,
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['milliseconds']:.2f}",
        ]
        table.add_row("▶" if row is chosen else "", str(row["recipe"]), *figures)
    return table


def main() -> None:
    """Search the recipes and keep the best one's model beside the exported one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--onnx", type=Path, default=Path(".local/build/onnx"))
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    args = parser.parse_args()
    dataset = demand_dataset(args.data)
    with tempfile.TemporaryDirectory(dir=args.onnx) as scratch:
        rows = search(args.onnx, dataset, Path(scratch))
        chosen = choose(rows)
        Path(chosen["path"]).replace(args.onnx / INT8)
    Console(width=160).print(make_table(rows, chosen))
    noted = [{**row, "recipe": str(row["recipe"]), "options": asdict(row["recipe"])} for row in rows]
    for row in noted:
        del row["path"]
    write_json(args.onnx / NOTE, {"recipe": str(chosen["recipe"]), "searched": noted})
    before, nodes = (args.onnx / FP32).stat().st_size, len(onnx.load(args.onnx / INT8).graph.node)
    print(f"quantized: {before:,} bytes before, {chosen['bytes']:,} after, {nodes} nodes; {chosen['recipe']}")


if __name__ == "__main__":
    main()
