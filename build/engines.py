"""Engines: the same weights behind each way to run them, one a process, asked line by line.

`build.bench` starts this file under the Python of the engine's own environment,
so it imports of the project only what an engine itself needs. A line
of JSON `[[ids]]` on standard input is a run; the answer is a line
`{"ms": …, "logits": […]}`.

    python build/engines.py onnxruntime .local/build/onnx/model.onnx 2
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]
"""int64 [1, T] token ids to float32 [L] logits."""
CALIBRATION_WINDOWS = 200


def load_torch(path: str, threads: int, *, compiled: bool = False) -> Run:
    """A checkpoint in PyTorch, eager or compiled."""
    import torch

    from training.model import load_checkpoint

    torch.set_num_threads(threads)
    model = load_checkpoint(Path(path)).model
    if compiled:
        model.compile(dynamic=True)

    def run(ids: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(ids)
        with torch.inference_mode():
            logits: np.ndarray = model(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits[0].numpy()
        return logits

    return run


def load_onnxruntime(path: str, threads: int) -> Run:
    """A file as it is, in ONNX Runtime at its default level of optimization."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, {"input_ids": ids})[0][0]


def load_served(path: str, threads: int) -> Run:
    """A release's model as `function.classifier` runs it."""
    from function.classifier import Classifier

    folder = Path(path)
    files = [(folder / name).read_bytes() for name in ("model.onnx", "tokenizer.json")]
    return Classifier(*files, prefix="", max_tokens=512, max_windows=1, threads=threads).run


def load_optimum(path: str, threads: int) -> Run:  # pragma: no cover, a peer: in an environment of its own
    """The encoder exported and quantized by optimum-onnx, both as they come; the head in numpy, no wide branch."""
    import tempfile

    import onnxruntime
    from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig
    from safetensors.numpy import load_file

    head = load_file(Path(path) / "head.safetensors")
    with tempfile.TemporaryDirectory() as scratch:
        model = ORTModelForFeatureExtraction.from_pretrained(path, export=True)
        model.save_pretrained(scratch)
        recipe = AutoQuantizationConfig.avx2(is_static=False)
        ORTQuantizer.from_pretrained(scratch).quantize(save_dir=scratch, quantization_config=recipe)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            f"{scratch}/model_quantized.onnx", options, providers=["CPUExecutionProvider"]
        )
    names = {node.name for node in session.get_inputs()}

    def run(ids: np.ndarray) -> np.ndarray:
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        hidden = session.run(None, {name: feeds[name] for name in names})[0][0]  # [T, H]
        logits: np.ndarray = hidden.mean(0) @ head["weight"].T + head["bias"]
        return logits

    return run


def load_openvino(path: str, threads: int, *, recipe: str = "") -> Run:  # pragma: no cover, as optimum
    """An ONNX file in OpenVINO: as it is, with INT8 weights, or quantized after training by NNCF.

    `windows.json` beside the file calibrates the latter.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if recipe:
        import nncf

        if recipe == "weights":
            model = nncf.compress_weights(model)
        else:
            windows = json.loads((Path(path).parent / "windows.json").read_text("utf-8"))[:CALIBRATION_WINDOWS]
            samples = nncf.Dataset([{"input_ids": np.array(ids, np.int64)} for ids in windows])
            model = nncf.quantize(model, samples, model_type=nncf.ModelType.TRANSFORMER)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    settings["INFERENCE_PRECISION_HINT"] = "f32"  # else bf16 where the CPU has it, and five times our flips
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda ids: request.infer({"input_ids": ids})[0][0].copy()


ENGINES: dict[str, Callable[[str, int], Run]] = {
    "torch": load_torch,
    "torch-compiled": lambda path, threads: load_torch(path, threads, compiled=True),
    "onnxruntime": load_onnxruntime,
    "served": load_served,
    "optimum": load_optimum,
    "openvino": load_openvino,
    "openvino-weights": lambda path, threads: load_openvino(path, threads, recipe="weights"),
    "openvino-nncf": lambda path, threads: load_openvino(path, threads, recipe="nncf"),
}


def main() -> None:
    """Answer each line until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints is no answer
    name, path, threads = sys.argv[1:4]
    run = ENGINES[name](path, int(threads))
    for line in sys.stdin:
        ids = np.array(json.loads(line), np.int64)
        started = time.perf_counter()
        logits = run(ids)
        took_ms = (time.perf_counter() - started) * 1000
        print(json.dumps({"ms": took_ms, "logits": logits.tolist()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
