"""Quantization: a fused fp32 ONNX file in, the best of several INT8 recipes out.

Weights become integers once, with a scale a channel; activations get one scale a
tensor at run time. No recipe may saturate: on a CPU without VNNI the product of
8-bit signed weights and activations overflows the 16-bit sums of AVX2's
`vpmaddubsw`. Weights of 7 bits cannot (`reduce_range`), nor can unsigned ones
of 8, for which ONNX Runtime takes a slower instruction
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
So the integers, and the scores, are the same on every CPU.

What one scale cannot hold is evened out beforehand, by factors that leave the
fp32 function as it was:

- by channel: after GELU a few channels are fifty times the others. Each is
  divided by a factor that its row of weights is multiplied with (SmoothQuant,
  Xiao et al. 2022, https://arxiv.org/abs/2211.10438).
- by token: each token's row is divided by its largest value, and the row of the
  product multiplied with it, so that every token has all the bits.
- embeddings by row: a token's vector has its own scale, instead of one for the
  table, and the norm after it keeps its fp32 weights.

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
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.onnx_model import OnnxModel
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tqdm import tqdm

from build.export import FP32
from function.classifier import Classifier
from training.evaluate import HALF, match_labels, summarize_scores
from training.examples import DataError, Dataset, Label, read_dataset
from training.files import read_json, write_json
from training.model import cut

INT8 = "model.onnx"
NOTE = "quantization.json"
OPERATORS = ["MatMul", "Attention", "Gather", "EmbedLayerNormalization"]
MAX_BYTES = 27_000_000
SLOWER = 0.15
"""Share of the fastest recipe's time that another may take more."""
ALIKE = 0.1
"""Share of the least drift that another recipe may drift more, if it is smaller."""
MAX_WINDOWS = 8
"""As the function's default."""
CALIBRATION_TEXTS = 200
TIMED_TEXTS = 60
SMALLEST = 1e-5
"""In place of a channel that was never active."""
SMALL = 1 << 16
"""A product of fewer weights stays in fp32."""
SLOW = {"SkipLayerNormalization", "BiasGelu"}
"""Fused operators that `split_slow_fusions` writes out."""
GELU_LEAST = 0.17
"""No output of GELU is lower than minus this."""


@dataclass(frozen=True)
class Recipe:
    """One way to quantize."""

    bits: int = 7
    """Of a weight: 7 signed, or 8 unsigned."""
    alpha: float | None = None
    """How much of the channels' difficulty moves from the activations into the weights, 0 to 1."""
    everywhere: bool = False
    """Smooth before every product, not only the feed-forward blocks' second."""
    by_token: bool = False
    by_row: bool = False
    exact: str = ""
    """What stays in fp32: "ffn" for each feed-forward block's second product, "embeddings", or nothing."""

    def __str__(self) -> str:
        parts = [f"{self.bits}-bit weights per channel"]
        parts += (
            [f"{'all' if self.everywhere else 'FFN'} channels smoothed, alpha {self.alpha:g}"]
            if self.alpha is not None
            else []
        )
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
    Recipe(alpha=0.5, everywhere=True, by_row=True),
    Recipe(alpha=0.65, everywhere=True, by_row=True),
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
    shrink_wide_table(model.graph)
    products = find_ffn_products(model.graph)
    if recipe.alpha is not None:
        smooth_channels(model, find_products(model.graph) if recipe.everywhere else products, windows, recipe.alpha)
    if recipe.by_token:
        even_tokens(model.graph, products)
    small = [node.name for node in model.graph.node if _is_small(node, model.graph)]
    exact = {*small, *(f"{name}_MatMul" for name in small)}  # as quantize_dynamic calls a Gemm that it rewrites
    if recipe.by_row:
        exact |= set(split_embeddings(model.graph, max_tokens))
        OnnxModel(model).prune_graph()  # segments and mask have no reader any more
    if recipe.exact == "ffn":
        exact |= {node.name for node in products}
    if recipe.exact == "embeddings":
        exact |= {node.name for node in model.graph.node if node.op_type in ("EmbedLayerNormalization", "Gather")}
    with tempfile.TemporaryDirectory() as scratch:
        prepared, new = Path(scratch) / "prepared.onnx", Path(scratch) / "new.onnx"
        onnx.save(model, prepared)
        logging.getLogger().setLevel(logging.ERROR)  # a hint to pre-process, which fused graphs have no use for
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
        kinds = {node.op_type for node in onnx.load(new).graph.node}
        if not {"MatMulInteger", "QAttention"} <= kinds:
            raise ValueError(
                f"quantization: expected integer products and attention, found {sorted(kinds)}; fuse first"
            )
        optimize_graph(new, output)
    left = {node.op_type for node in onnx.load(output).graph.node} & SLOW
    if left:
        raise ValueError(
            f"optimization: expected none of {sorted(SLOW)}, found {sorted(left)}; compare onnxruntime's version"
        )


def optimize_graph(source: Path, output: Path) -> None:
    """Let ONNX Runtime fuse what it would fuse at every cold start, but for `SLOW`; the function loads the result.

    Level "extended" is for any CPU, "all" would be for this one:
    https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html#offline-mode
    """
    model = onnx.load(source)
    split_slow_fusions(model.graph)
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(output)
    InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion", "BiasGeluFusion"],
    )


def split_slow_fusions(graph: onnx.GraphProto) -> None:
    """Write out, in place, the two fused operators that are slower than their parts.

    On 128 tokens ONNX Runtime 1.32 takes 307 µs for SkipLayerNormalization and 40
    for Add and LayerNormalization, 227 for BiasGelu and 125 for Gelu, whose bias
    goes into the product before it. (`make bench` shows what the model gains.)
    """
    for node in [node for node in graph.node if node.op_type in SLOW]:
        inputs, (output, name) = list(node.input), (node.output[0], node.name)
        if node.op_type == "BiasGelu":
            product, bias = inputs
            new = [helper.make_node("Gelu", [f"{name}_biased"], [output], name=name, domain="com.microsoft")]
        else:
            product, skip, gamma, beta, bias = [*inputs, ""][:5]
            epsilon = next(item.f for item in node.attribute if item.name == "epsilon")
            summed, summands = f"{name}_summed", [f"{name}_biased" if bias else product, skip]
            new = [
                helper.make_node("Add", summands, [summed], name=summed),
                helper.make_node("LayerNormalization", [summed, gamma, beta], [output], name=name, epsilon=epsilon),
            ]
        if bias:
            new.insert(0, helper.make_node("Add", [product, bias], [f"{name}_biased"], name=f"{name}_biased"))
        at = list(graph.node).index(node)
        graph.node.remove(node)
        for i, one in enumerate(new):
            graph.node.insert(at + i, one)


def _is_small(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    """The head and the n-grams' table: nothing to gain, and the logits come right after them."""
    sizes = [np.prod(tensor.dims) for tensor in graph.initializer if tensor.name in node.input]
    return any("wide" in name for name in node.input) or (node.op_type == "Gemm" and max(sizes, default=0) < SMALL)


def shrink_wide_table(graph: onnx.GraphProto) -> None:
    """Keep the n-grams' table [rows, L+1] as int8 with a scale a column, in place: it is looked up, then summed."""
    tensors = {tensor.name: tensor for tensor in graph.initializer if "wide" in tensor.name}
    for node in [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tensors]:
        tensor, found = tensors[node.input[0]], node.output[0]
        if tensor.data_type != TensorProto.FLOAT:
            continue  # the spelling
        table = numpy_helper.to_array(tensor)
        scales = np.maximum(np.abs(table).max(0) / 127, SMALLEST).astype(np.float32)  # [L+1]
        tensor.CopyFrom(numpy_helper.from_array(np.round(table / scales).astype(np.int8), tensor.name))
        graph.initializer.append(numpy_helper.from_array(scales, f"{tensor.name}_scales"))
        steps, floats = f"{found}_steps", f"{found}_floats"
        node.output[0] = steps
        at = list(graph.node).index(node) + 1
        graph.node.insert(at, helper.make_node("Mul", [floats, f"{tensor.name}_scales"], [found], name=found))
        graph.node.insert(at, helper.make_node("Cast", [steps], [floats], name=floats, to=TensorProto.FLOAT))


def find_ffn_products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The products of GELU's output: each feed-forward block's second."""
    activated = {node.output[0] for node in graph.node if node.op_type == "BiasGelu"}
    return [node for node in graph.node if node.op_type == "MatMul" and node.input[0] in activated]


def find_products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """All products of the encoder with weights: attention's and the feed-forward blocks'."""
    weights = {tensor.name for tensor in graph.initializer}
    return [node for node in graph.node if node.op_type in ("MatMul", "Attention") and node.input[1] in weights]


def smooth_channels(
    model: onnx.ModelProto, products: list[onnx.NodeProto], windows: list[np.ndarray], alpha: float
) -> None:
    """Put a `Mul` a channel before every product, and its inverse into the weights, in place."""
    graph, weights = model.graph, {tensor.name: tensor for tensor in model.graph.initializer}
    largest = _find_largest(model, [node.input[0] for node in products], windows)
    for node in products:
        name, weight = node.input[0], numpy_helper.to_array(weights[node.input[1]])  # [channels, outputs]
        smooth = f"{node.name}_smooth"
        range_ = np.maximum(largest[name], SMALLEST)
        factors = range_**alpha / np.maximum(np.abs(weight).max(1), SMALLEST) ** (1 - alpha)  # [channels]
        weights[node.input[1]].CopyFrom(numpy_helper.from_array(weight * factors[:, None], node.input[1]))
        graph.initializer.append(numpy_helper.from_array(1 / factors, f"{smooth}_factors"))
        scale = helper.make_node("Mul", [name, f"{smooth}_factors"], [smooth], name=smooth)
        graph.node.insert(list(graph.node).index(node), scale)
        node.input[0] = smooth


def even_tokens(graph: onnx.GraphProto, products: list[onnx.NodeProto]) -> None:
    """Divide each token's row [1, T, channels] by its largest value, and multiply the product with it, in place."""
    for node in products:
        name, product = node.input[0], node.output[0]
        before = [
            helper.make_node("ReduceMax", [name], [f"{name}_top"], name=f"{name}_top", axes=[-1], keepdims=1),
            helper.make_node("Max", [f"{name}_top", "least"], [f"{name}_peak"], name=f"{name}_peak"),  # [1, T, 1]
            helper.make_node("Div", [name, f"{name}_peak"], [f"{name}_even"], name=f"{name}_even"),
        ]
        after = helper.make_node("Mul", [f"{product}_even", f"{name}_peak"], [product], name=f"{product}_even")
        node.input[0], node.output[0] = f"{name}_even", f"{product}_even"
        at = list(graph.node).index(node)
        graph.node.insert(at + 1, after)
        for i, new in enumerate(before):
            graph.node.insert(at + i, new)
    graph.initializer.append(numpy_helper.from_array(np.array(GELU_LEAST, np.float32), "least"))


def split_embeddings(graph: onnx.GraphProto, positions: int) -> list[str]:
    """Write the embeddings' fused node out, its word table as int8 rows with a scale each, in place.

    Returns the names of the new nodes; none where a graph has no such node.
    """
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "EmbedLayerNormalization":
            continue
        ids, _, word, position, segment, gamma, beta = node.input[:7]
        table = tensors[word]  # [V, H]
        scales = np.maximum(np.abs(table).max(1, keepdims=True) / 127, SMALLEST).astype(np.float32)  # [V, 1]
        places = tensors[position][:positions] + (tensors[segment][:1] if segment else 0)  # [positions, H]
        made = {
            "rows": np.round(table / scales).astype(np.int8),
            "row_scales": scales,
            "places": places.astype(np.float32),
            "one": np.array([1]),
            "zero": np.array([0]),
        }
        for name, value in made.items():
            graph.initializer.append(numpy_helper.from_array(value, f"embed_{name}"))
        epsilon = next(item.f for item in node.attribute if item.name == "epsilon")
        new = list(_embedding_nodes(ids, gamma, beta, node.output[0], epsilon))
        at = list(graph.node).index(node)
        graph.node.remove(node)
        for i, one in enumerate(new):
            graph.node.insert(at + i, one)
        for tensor in [t for t in graph.initializer if t.name in (word, position, segment)]:
            graph.initializer.remove(tensor)
        for attention in graph.node:
            if attention.op_type == "Attention":
                attention.input[3] = ""  # the length of the text, which the fused node counted: nothing is padding
        return [one.name for one in new]
    return []


def _embedding_nodes(ids: str, gamma: str, beta: str, output: str, epsilon: float) -> Iterator[onnx.NodeProto]:
    def node(kind: str, inputs: list[str], output: str, domain: str = "", **attributes: int | float) -> onnx.NodeProto:
        names = [name if name in (ids, gamma, beta) else f"embed_{name}" for name in inputs]
        made: onnx.NodeProto = helper.make_node(kind, names, [output], name=output, domain=domain, **attributes)  # type: ignore[arg-type]
        return made

    yield node("Gather", ["rows", ids], "embed_bytes")  # int8 [1, T, H]
    yield node("Cast", ["bytes"], "embed_floats", to=TensorProto.FLOAT)
    yield node("Gather", ["row_scales", ids], "embed_scale")  # [1, T, 1]
    yield node("Mul", ["floats", "scale"], "embed_word")
    yield node("Shape", [ids], "embed_tokens", start=1)  # [1]
    yield node("Slice", ["places", "zero", "tokens", "zero"], "embed_place")  # [T, H]
    yield node("Unsqueeze", ["place", "zero"], "embed_placed")  # [1, T, H]
    yield node(
        "SkipLayerNormalization", ["word", "placed", gamma, beta], output, domain="com.microsoft", epsilon=epsilon
    )


def _find_largest(model: onnx.ModelProto, names: list[str], windows: list[np.ndarray]) -> dict[str, np.ndarray]:
    """float32 [channels]: each tensor's largest absolute value a channel, over all windows."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = dict.fromkeys(names, np.zeros(1, np.float32))
    for ids in tqdm(windows, "calibrate", leave=False):
        for name, values in zip(names, session.run(names, {"input_ids": ids}), strict=True):  # [1, T, channels]
            largest[name] = np.maximum(largest[name], np.abs(values).max((0, 1)))
    return largest


def read_windows(folder: Path, texts: list[str]) -> list[np.ndarray]:
    """int64 [1, T] token ids of texts as an exported model takes them."""
    made = read_json(folder / "export.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [encoding.ids for encoding in tokenizer.encode_batch([made["prefix"] + text for text in texts])]
    return [np.array([cut(row, made["max_tokens"])], np.int64) for row in rows]


def load_classifier(
    folder: Path, model: Path, max_tokens: int | None = None, max_windows: int = MAX_WINDOWS
) -> Classifier:
    """The function's own classifier, on one thread, with one of the models that were exported into `folder`."""
    made = read_json(folder / "export.json")
    return Classifier(
        model.read_bytes(),
        (folder / "tokenizer.json").read_bytes(),
        prefix=made["prefix"],
        max_tokens=max_tokens or made["max_tokens"],
        max_windows=max_windows,
        threads=1,
    )


def score_texts(classifier: Classifier, texts: list[str], name: str) -> np.ndarray:
    """float32 [B, L] probabilities, each text run alone."""
    return np.stack([classifier.score(text) for text in tqdm(texts, name, leave=False)])


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


def measure_in_turn(classifiers: list[Classifier], texts: list[str]) -> list[float]:
    """Each classifier's median milliseconds a text; of each text the faster of two."""
    times: list[list[float]] = [[] for _ in classifiers]
    for text in tqdm(texts, "latency", leave=False):
        for classifier, took in zip(classifiers, times, strict=True):
            pair = []
            for _ in range(2):
                started = time.perf_counter()
                classifier.score(text)
                pair.append((time.perf_counter() - started) * 1000)
            took.append(min(pair))
    return [float(np.median(took)) for took in times]


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
    try:
        dataset = read_dataset(args.data)
    except DataError as error:
        raise SystemExit(f"The data cannot be used:\n{error}") from None
    with tempfile.TemporaryDirectory(dir=args.onnx) as scratch:
        rows = search(args.onnx, dataset, Path(scratch))
        chosen = choose(rows)
        Path(chosen["path"]).replace(args.onnx / INT8)
    Console(width=160).print(make_table(rows, chosen))
    noted = [{**row, "recipe": str(row["recipe"]), "options": asdict(row["recipe"])} for row in rows]
    for row in noted:
        del row["path"]
    write_json(args.onnx / NOTE, {"recipe": str(chosen["recipe"]), "searched": noted})
    before = (args.onnx / FP32).stat().st_size
    print(f"quantized: {before:,} bytes before, {chosen['bytes']:,} after; {chosen['recipe']}")


if __name__ == "__main__":
    main()
