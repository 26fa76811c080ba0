"""Verification: an exported and quantized model in, what it does beside PyTorch and fp32 out.

Everything is asked through `function.classifier`, the code that serves: how far
PyTorch and fp32 ONNX differ on a logit, and fp32 and INT8 on decisions. What
that may be, `build.gate` knows. The
thresholds of the release are chosen here, on the validation split, from the
probabilities of the INT8 model itself.

    python -m build.verify --onnx .local/build/onnx
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from build.bench import LENGTHS, list_engines, measure_latency
from build.exported import FP32, INT8, SCORES, load_classifier, read_windows, score_texts
from build.graph import optimize_graph
from function.classifier import Classifier
from training.examples import Dataset, Label, read_dataset
from training.files import read_json, write_json
from training.metrics import (
    HALF,
    calibration_error,
    choose_thresholds,
    match_labels,
    share_claimed,
    summarize_probes,
    summarize_scores,
)
from training.model import Checkpoint, encoder_of, load_checkpoint

NOTE = "verification.json"
PARITY_TEXTS = 200
LATENCY_RUNS = 15


def verify(folder: Path, dataset: Dataset) -> dict:
    """Compare PyTorch, fp32 and INT8 on the data, and choose thresholds; scores.npz gets the INT8 model's scores."""
    made = read_json(folder / "export.json")
    labels = [Label(**label) for label in made["labels"]]
    matched = match_labels(dataset, labels)
    known = matched or dataset
    with tempfile.TemporaryDirectory() as scratch:  # fp32 as fast as it can be, as the INT8 model is
        optimized = Path(scratch) / FP32
        optimize_graph(folder / FP32, optimized)
        fp32, int8 = load_classifier(folder, optimized), load_classifier(folder, folder / INT8)
    source = Path(made["checkpoint"])
    checkpoint = load_checkpoint(source)
    parts = [known.validation.texts, known.test.texts, [probe["text"] for probe in known.probes]]
    exact, quantized = (_score_parts(model, parts, name) for model, name in ((fp32, "fp32"), (int8, "INT8")))
    found = {
        "logit_difference": compare_logits(checkpoint, fp32, known.test.texts[:PARITY_TEXTS]),
        "flips": float(np.mean([(a >= HALF) != (b >= HALF) for a, b in zip(exact[1], quantized[1], strict=True)])),
        "bytes": (folder / INT8).stat().st_size,
        "latency_ms": measure_engines(folder, checkpoint, source, known.validation.texts),
        "tokenizer_ms": measure_tokenizer(folder / "tokenizer.json"),
        "thresholds": [HALF] * len(labels),
    }
    if matched:
        found |= _judge(matched, exact, quantized)
        np.savez(folder / SCORES, validation=quantized[0], test=quantized[1])
    return found


def _score_parts(classifier: Classifier, parts: list[list[str]], name: str) -> list[np.ndarray]:
    scores = score_texts(classifier, [text for part in parts for text in part], name)  # [B, L]
    return np.split(scores, np.cumsum([len(part) for part in parts])[:-1])


def compare_logits(checkpoint: Checkpoint, fp32: Classifier, texts: list[str]) -> float:
    """The largest difference between PyTorch's and ONNX's logits on the same windows."""
    largest = 0.0
    with torch.inference_mode():
        for text in tqdm(texts, "parity", leave=False):
            for ids in fp32.split(text).ids:
                tensor = torch.from_numpy(ids)  # [1, T]
                expected = checkpoint.model(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits[0]
                largest = max(largest, float(np.abs(expected.numpy() - fp32.run(ids)).max()))
    return largest


def measure_engines(
    folder: Path, checkpoint: Checkpoint, source: Path, texts: list[str]
) -> dict[str, dict[int, float]]:
    """Median milliseconds of a run in each engine that needs no environment of its own, by tokens."""
    limit = min(checkpoint.max_tokens, encoder_of(checkpoint.model).config.max_position_embeddings - 2)
    lengths = [length for length in LENGTHS if length <= limit]
    engines = [engine for engine in list_engines(source, folder) if engine.kind != "torch-compiled"]
    with ExitStack() as running:
        for engine in engines:
            running.enter_context(engine.started(threads=1))
        measure_latency(engines, read_windows(folder, texts), lengths, LATENCY_RUNS)
    return {engine.name: {n: round(engine.median(n), 2) for n in lengths} for engine in engines}


def measure_tokenizer(path: Path, runs: int = 5) -> float:
    """Median milliseconds to load the tokenizer."""
    content, times = path.read_text("utf-8"), []
    for _ in range(runs):
        started = time.perf_counter()
        Tokenizer.from_str(content)
        times.append((time.perf_counter() - started) * 1000)
    return round(float(np.median(times)), 1)


def _judge(dataset: Dataset, exact: list[np.ndarray], quantized: list[np.ndarray]) -> dict:
    thresholds = choose_thresholds(quantized[0], dataset.validation.targets)
    judged: dict = {
        "fp32": summarize_scores(exact[1], dataset.test.targets),
        "int8": summarize_scores(quantized[1], dataset.test.targets),
        "int8_at_thresholds": summarize_scores(quantized[1], dataset.test.targets, thresholds),
        "thresholds": [float(threshold) for threshold in thresholds],
        "calibration_error": calibration_error(quantized[1], dataset.test.targets),
        "neutral_claimed": share_claimed(quantized[1], dataset.test.targets),
    }
    judged["macro_f1_loss"] = judged["fp32"]["macro_f1"] - judged["int8"]["macro_f1"]
    if dataset.probes:
        judged["probes"] = summarize_probes(dataset.probes, quantized[2], dataset.labels)
        judged["probe_scores"] = [[round(float(p), 4) for p in row] for row in quantized[2]]
    return judged


def main() -> None:
    """Verify the exported models and write verification.json beside them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--onnx", type=Path, default=Path(".local/build/onnx"))
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    args = parser.parse_args()
    (args.onnx / NOTE).unlink(missing_ok=True)
    try:
        found = verify(args.onnx, read_dataset(args.data))
    except ValueError as error:  # DataError among them
        raise SystemExit(str(error)) from None
    write_json(args.onnx / NOTE, found)
    print(f"PyTorch to ONNX: largest logit difference {found['logit_difference']:.2e}")
    print(f"fp32 to INT8: {found['flips']:.2%} of decisions flip, {found['bytes']:,} bytes")
    print(f"tokenizer: loads in {found['tokenizer_ms']:g} ms")
    if "int8" in found:
        print(f"macro-F1 at 0.5: fp32 {found['fp32']['macro_f1']:.4f}, INT8 {found['int8']['macro_f1']:.4f}")


if __name__ == "__main__":
    main()
