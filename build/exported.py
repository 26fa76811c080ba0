"""Exported models, asked as the function asks: a folder of `build.export` in, probabilities and times out."""

import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from function.classifier import Classifier
from function.settings import Settings
from training.files import read_json
from training.model import cut


def read_windows(folder: Path, texts: list[str]) -> list[np.ndarray]:
    """int64 [1, T] token ids of texts as an exported model takes them."""
    made = read_json(folder / "export.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [encoding.ids for encoding in tokenizer.encode_batch([made["prefix"] + text for text in texts])]
    return [np.array([cut(row, made["max_tokens"])], np.int64) for row in rows]


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
