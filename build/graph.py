"""Graph surgery: what integers cannot hold is evened out, what is slow is written out.

Each function changes an ONNX graph in place. All but `shrink_wide_table` and
`split_embeddings`, which round tables to int8, leave the fp32 function as it was:

- by channel: after GELU a few channels are fifty times the others. Each is
  divided by a factor that its row of weights is multiplied with (SmoothQuant,
  Xiao et al. 2022, https://arxiv.org/abs/2211.10438).
- by token: each token's row is divided by its largest value, and the row of the
  product multiplied with it, so that every token has all the bits.
- embeddings by row: a token's vector has its own scale, instead of one for the
  table, and the norm after it keeps its fp32 weights.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from tqdm import tqdm

SMALLEST = 1e-5
"""In place of a channel that was never active."""
SLOW = {"SkipLayerNormalization", "BiasGelu"}
"""Fused operators that `split_slow_fusions` writes out."""
GELU_LEAST = 0.17
"""No output of GELU is lower than minus this."""


def surround(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    before: Sequence[onnx.NodeProto] = (),
    after: Sequence[onnx.NodeProto] = (),
) -> None:
    """Put nodes right before and after one: a graph's nodes stand in the order in which they run."""
    at = list(graph.node).index(node)
    for one in reversed(after):
        graph.node.insert(at + 1, one)
    for one in reversed(before):
        graph.node.insert(at, one)


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
        surround(graph, node, before=new)
        graph.node.remove(node)


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
        cast = helper.make_node("Cast", [steps], [floats], name=floats, to=TensorProto.FLOAT)
        scale = helper.make_node("Mul", [floats, f"{tensor.name}_scales"], [found], name=found)
        surround(graph, node, after=[cast, scale])


def find_ffn_products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The products of GELU's output: each feed-forward block's second."""
    activated = {node.output[0] for node in graph.node if node.op_type == "BiasGelu"}
    return [node for node in graph.node if node.op_type == "MatMul" and node.input[0] in activated]


def find_inner_products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Attention's last product of each layer, and each feed-forward block's first."""
    weights = {tensor.name for tensor in graph.initializer}
    seconds = {node.name for node in find_ffn_products(graph)}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    return [node for node in products if node.name not in seconds]


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
        node.input[0] = smooth
        surround(graph, node, before=[scale])


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
        surround(graph, node, before, [after])
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
        surround(graph, node, before=new)
        graph.node.remove(node)
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
