"""Evaluation: a checkpoint and its rivals in, what they are worth on the test split out.

The encoder before fine-tuning (under a new head), after it, alone and with its
n-grams, and the character n-grams of `training.baseline`; thresholds are chosen
on validation alone.

    python -m training.evaluate --base .local/build/trimmed --checkpoint .local/build/checkpoint
"""

import argparse
from pathlib import Path

import numpy as np

from training.baseline import predict_baseline
from training.examples import Dataset, demand_dataset
from training.files import write_json
from training.metrics import (
    calibration_error,
    choose_thresholds,
    match_labels,
    sigmoid,
    summarize_probes,
    summarize_scores,
)
from training.model import Checkpoint, load_checkpoint, new_checkpoint, predict_logits


def evaluate(base: Path, checkpoint: Checkpoint, dataset: Dataset) -> dict:
    """Metrics on the test split and probe scores of the base, the checkpoint and the n-grams."""
    made = checkpoint.provenance
    before = new_checkpoint(base, dataset.labels, checkpoint.max_tokens, made["seed"], made["layers"])
    train = dataset.train.part(made["trained_texts"], made["seed"])
    print(f"evaluating on {len(dataset.test)} texts: before, encoder alone, after, n-grams …", flush=True)
    return {
        "before": _evaluate_checkpoint(before, dataset),
        "encoder": evaluate_encoder(checkpoint, dataset),
        "after": _evaluate_checkpoint(checkpoint, dataset),
        "ngrams": _describe(*predict_baseline(train, [dataset.validation.texts, dataset.test.texts]), dataset),
        "trained_texts": len(train),
        "all_texts": len(dataset.train),
        "test_texts": len(dataset.test),
    }


def evaluate_encoder(checkpoint: Checkpoint, dataset: Dataset) -> dict:
    """The same of the encoder and its head alone, before n-grams and their stacking."""
    wide, checkpoint.model.wide = checkpoint.model.wide, None
    try:
        return _evaluate_checkpoint(checkpoint, dataset)
    finally:
        checkpoint.model.wide = wide


def _evaluate_checkpoint(checkpoint: Checkpoint, dataset: Dataset) -> dict:
    parts = [dataset.validation.texts, dataset.test.texts, [probe["text"] for probe in dataset.probes]]
    logits = predict_logits(checkpoint, [text for part in parts for text in part])
    validation, test, probes = np.split(sigmoid(logits), np.cumsum([len(part) for part in parts])[:2])
    described = _describe(validation, test, dataset)
    if dataset.probes:
        described["probe_scores"] = [[round(float(p), 4) for p in row] for row in probes]
        described["probes"] = summarize_probes(dataset.probes, probes, dataset.labels)
    return described


def _describe(validation: np.ndarray, test: np.ndarray, dataset: Dataset) -> dict:
    thresholds = choose_thresholds(validation, dataset.validation.targets)
    return {
        "at_half": summarize_scores(test, dataset.test.targets),
        "calibration_error": calibration_error(test, dataset.test.targets),
        "thresholds": [float(threshold) for threshold in thresholds],
        "at_thresholds": summarize_scores(test, dataset.test.targets, thresholds),
    }


def main() -> None:
    """Evaluate a checkpoint and write evaluation.json beside it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--base", type=Path, default=Path(".local/build/trimmed"))
    parser.add_argument("--checkpoint", type=Path, default=Path(".local/build/checkpoint"))
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.checkpoint)
    dataset = match_labels(demand_dataset(args.data), checkpoint.labels)
    if dataset is None:
        raise SystemExit(f"{args.data}: expected the checkpoint's labels, found others; name its own data")
    result = evaluate(args.base, checkpoint, dataset)
    write_json(args.checkpoint / "evaluation.json", result)
    for name in ("before", "encoder", "after", "ngrams"):
        half, error = result[name]["at_half"], result[name]["calibration_error"]
        f1 = f"macro-F1 {half['macro_f1']:.4f}, micro-F1 {half['micro_f1']:.4f} at 0.5"
        print(f"{name:7} {f1}, calibration error {error:.4f} on the test split")


if __name__ == "__main__":
    main()
