"""Quantization: a fused fp32 ONNX file in, an INT8 one out.

Weights become 8-bit integers once; activations get one scale a tensor at run
time. On a CPU without VNNI the product of 8-bit weights and activations
saturates the 16-bit sums of AVX2's `vpmaddubsw`; weights of 7 bits cannot
(`reduce_range`,
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
Weight scales are per channel: one a tensor leaves too little of 7 bits.

What hurts most is the input of each feed-forward block's second product: after
GELU a few of its channels are fifty times the others, and one scale for all
leaves the others no bits. So each channel is divided there by a factor that its
row of weights is multiplied with (SmoothQuant, Xiao et al. 2022,
https://arxiv.org/abs/2211.10438): the fp32 function is the same, and the share
of decisions that INT8 flips was nearly halved on the validation split.

    python -m build.quantize --onnx .local/build/onnx --data training/data
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer
from tqdm import tqdm

from build.export import FP32
from training.examples import read_dataset
from training.files import read_json

INT8 = "model.onnx"
RECIPE = "dynamic INT8: 7-bit weights per channel (MatMul, Attention, embeddings); FFN activations smoothed, alpha 0.75"
OPERATORS = ["MatMul", "Attention", "Gather", "EmbedLayerNormalization"]
ALPHA = 0.75
"""How much of the difficulty moves from activations to weights; 0.75 flipped least of 0.5 to 1 on validation."""
CALIBRATION_TEXTS = 200
SMALLEST = 1e-5
"""In place of a channel that was never active."""


def quantize(source: Path, output: Path, windows: list[np.ndarray]) -> dict[str, int]:
    """Write the INT8 model; returns `bytes_before` and `bytes_after`.

    `windows` are int64 [1, T] token ids to find the channels' ranges with.
    Raises ValueError where nothing was quantized.
    """
    model = onnx.load(source)
    smooth_activations(model, windows)
    smoothed, new = (output.with_name(f".{output.name}.{kind}") for kind in ("smoothed", "new"))
    onnx.save(model, smoothed)
    logging.getLogger().setLevel(logging.ERROR)  # a hint to pre-process, which fused graphs have no use for
    quantize_dynamic(
        smoothed,
        new,
        op_types_to_quantize=OPERATORS,
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        # fused operators have no inferred types, so their inputs are declared
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        nodes_to_exclude=[node.name for node in model.graph.node if any("wide" in name for name in node.input)],
    )
    smoothed.unlink()
    kinds = {node.op_type for node in onnx.load(new).graph.node}
    if not {"MatMulInteger", "QAttention"} <= kinds:
        raise ValueError(f"quantization: expected integer products and attention, found {sorted(kinds)}; fuse first")
    optimize_graph(new, output)
    new.unlink()
    return {"bytes_before": source.stat().st_size, "bytes_after": output.stat().st_size}


def optimize_graph(source: Path, output: Path) -> None:
    """Let ONNX Runtime fuse what it would fuse at every cold start; the function loads the result as it is.

    Level "extended" is for any CPU, "all" would be for this one:
    https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html#offline-mode
    """
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(output)
    InferenceSession(source, options, providers=["CPUExecutionProvider"])


def smooth_activations(model: onnx.ModelProto, windows: list[np.ndarray]) -> None:
    """Put a `Mul` before every product of GELU's output, and its inverse into the weights, in place."""
    graph = model.graph
    activated = {node.output[0] for node in graph.node if node.op_type == "BiasGelu"}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[0] in activated]
    weights = {tensor.name: tensor for tensor in graph.initializer}
    largest = _find_largest(model, [node.input[0] for node in products], windows)
    for node in products:
        name, weight = node.input[0], numpy_helper.to_array(weights[node.input[1]])  # [channels, H]
        range_ = np.maximum(largest[name], SMALLEST)
        factors = range_**ALPHA / np.maximum(np.abs(weight).max(1), SMALLEST) ** (1 - ALPHA)  # [channels]
        weights[node.input[1]].CopyFrom(numpy_helper.from_array(weight * factors[:, None], node.input[1]))
        graph.initializer.append(numpy_helper.from_array(1 / factors, f"{name}_factors"))
        scale = helper.make_node("Mul", [name, f"{name}_factors"], [f"{name}_smooth"], name=f"{name}_smooth")
        graph.node.insert(list(graph.node).index(node), scale)
        node.input[0] = f"{name}_smooth"


def _find_largest(model: onnx.ModelProto, names: list[str], windows: list[np.ndarray]) -> dict[str, np.ndarray]:
    """float32 [channels]: each tensor's largest absolute value a channel, over all windows."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    session = InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = dict.fromkeys(names, np.float32(0))
    for ids in tqdm(windows, "calibrate", leave=False):
        for name, values in zip(names, session.run(names, {"input_ids": ids}), strict=True):  # [1, T, channels]
            largest[name] = np.maximum(largest[name], np.abs(values).max((0, 1)))
    return largest


def read_windows(folder: Path, texts: list[str]) -> list[np.ndarray]:
    """int64 [1, T] token ids of texts as an exported model takes them."""
    made = read_json(folder / "export.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encodings = tokenizer.encode_batch([made["prefix"] + text for text in texts])
    return [np.array([encoding.ids[: made["max_tokens"]]], np.int64) for encoding in encodings]


def main() -> None:
    """Quantize the exported model beside itself; ranges come from training texts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--onnx", type=Path, default=Path(".local/build/onnx"))
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    args = parser.parse_args()
    texts = read_dataset(args.data).train.texts[:CALIBRATION_TEXTS]
    sizes = quantize(args.onnx / FP32, args.onnx / INT8, read_windows(args.onnx, texts))
    print("quantized: {bytes_before:,} bytes before, {bytes_after:,} after".format(**sizes))


if __name__ == "__main__":
    main()
