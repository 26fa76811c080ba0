"""Exported models: a folder of `build.export` in, what the function's own classifier makes of it out.

Nothing here needs torch, so that what only asks a model starts fast.
"""

import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from function.classifier import Classifier
from function.settings import Settings
from training.files import read_json

PLAIN = "model.plain.onnx"
"""As PyTorch's exporter writes it: what `build.bench` gives the peers."""
FP32 = "model.fp32.onnx"
"""The same with fused operators."""
INT8 = "model.onnx"
SCORES = "scores.npz"
"""The INT8 model's probabilities on the validation and the test split."""


def read_windows(folder: Path, texts: list[str]) -> list[np.ndarray]:
    """int64 [1, T] token ids of texts as an exported model takes them."""
    made = read_json(folder / "export.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(made["max_tokens"])  # the closing token stays
    return [np.array([row.ids], np.int64) for row in tokenizer.encode_batch([made["prefix"] + text for text in texts])]


def load_classifier(
    folder: Path, model: Path, max_tokens: int | None = None, max_windows: int = Settings.max_windows
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
