"""Quantization: a fused fp32 ONNX file in, an INT8 one out.

Dynamic quantization: weights become 8-bit integers once, activations get their
scale at run time, so no calibration data is needed. On a CPU without VNNI the
product of 8-bit weights and activations saturates the 16-bit sums of AVX2's
`vpmaddubsw`; weights of 7 bits cannot (`reduce_range`,
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
Scales are per channel: a scale per tensor leaves too little of 7 bits.

    python -m build.quantize --onnx .local/build/onnx
"""

import argparse
import logging
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from build.export import FP32

INT8 = "model.onnx"
RECIPE = "dynamic INT8: 7-bit weights per channel, MatMul, Attention and embeddings"
OPERATORS = ["MatMul", "Attention", "Gather", "EmbedLayerNormalization"]


def quantize(source: Path, output: Path) -> dict[str, int]:
    """Write the INT8 model; returns `bytes_before` and `bytes_after`.

    Raises ValueError where nothing was quantized.
    """
    new = output.with_name(f".{output.name}.new")
    logging.getLogger().setLevel(logging.ERROR)  # a hint to pre-process, which fused graphs have no use for
    quantize_dynamic(
        source,
        new,
        op_types_to_quantize=OPERATORS,
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        # fused operators have no inferred types, so their inputs are declared
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    kinds = {node.op_type for node in onnx.load(new, load_external_data=False).graph.node}
    if not kinds & {"MatMulInteger", "DynamicQuantizeMatMul", "QAttention"}:
        raise ValueError(f"quantization: expected integer matrix products, found {sorted(kinds)}; name its operators")
    new.replace(output)
    return {"bytes_before": source.stat().st_size, "bytes_after": output.stat().st_size}


def main() -> None:
    """Quantize the exported model beside itself."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--onnx", type=Path, default=Path(".local/build/onnx"))
    args = parser.parse_args()
    sizes = quantize(args.onnx / FP32, args.onnx / INT8)
    print("quantized: {bytes_before:,} bytes before, {bytes_after:,} after".format(**sizes))


if __name__ == "__main__":
    main()
