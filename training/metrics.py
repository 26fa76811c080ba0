"""Metrics: probabilities and targets in, F1, calibration, thresholds and the trust test out."""

from typing import Any

import numpy as np

from training.examples import Dataset, Examples, Label

HALF = 0.5
TOLERANCE = 0.05
"""Of a label's F1 on validation: a few texts of the 80 to 100 that express it."""
THRESHOLD_GRID = np.round(np.arange(0.05, 0.951, 0.01), 2)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logits to probabilities in [0, 1], without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def summarize_scores(
    probabilities: np.ndarray, targets: np.ndarray, thresholds: np.ndarray | float = HALF
) -> dict[str, Any]:
    """Micro and macro F1 of [B, L] decisions, and the F1 of each label in order.

    A target counts from 0.5 on. A label that is neither there nor claimed has
    an F1 of 0, as in scikit-learn.
    """
    hits, claimed, there = _count(probabilities, targets, thresholds)
    f1 = 2 * hits / np.maximum(claimed + there, 1)  # [L]
    micro = 2 * hits.sum() / max(claimed.sum() + there.sum(), 1)
    return {"micro_f1": float(micro), "macro_f1": float(f1.mean()), "f1": [float(value) for value in f1]}


def _count(probabilities: np.ndarray, targets: np.ndarray, thresholds: np.ndarray | float) -> tuple:
    decided, truth = probabilities >= thresholds, targets >= HALF  # [B, L]
    return (decided & truth).sum(0), decided.sum(0), truth.sum(0)  # [L] each


def calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of [B, L] decisions: by how much the mean probability of a bin misses its share.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599, on each label's yes or no.
    """
    p, there = probabilities.ravel(), targets.ravel() >= HALF
    bin_of = np.minimum((p * bins).astype(int), bins - 1)
    misses = [abs(p[bin_of == i].sum() - there[bin_of == i].sum()) for i in range(bins)]
    return float(sum(misses) / len(p))


def share_claimed(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """The share of texts without any need that [B, L] probabilities give one at 0.5; 0 where there are none."""
    neutral = ~(targets >= HALF).any(1)
    return float((probabilities[neutral] >= HALF).any(1).mean()) if neutral.any() else 0.0


def find_uneventful(examples: Examples) -> list[int]:
    """The texts of those sources most of whose texts carry no need."""
    without = ~(examples.targets >= HALF).any(1)
    sources = np.array(examples.sources)
    quiet = [source for source in set(examples.sources) if source and without[sources == source].mean() > HALF]
    return [int(i) for i in np.flatnonzero(np.isin(sources, quiet))]


def confuse(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[L, L]: of the texts that express a row's need, the share given the column's; off the diagonal, wrongly."""
    claimed, there = probabilities >= HALF, targets >= HALF  # [B, L]
    shares = np.zeros((there.shape[1], there.shape[1]))
    for i, expressing in enumerate(there.T):
        for j in range(len(shares)):
            among = expressing if i == j else expressing & ~there[:, j]
            shares[i, j] = claimed[among, j].mean() if among.any() else 0.0
    return shares


def choose_thresholds(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The [L] thresholds nearest to 0.5 whose F1 is within `TOLERANCE` of the highest, each on its own.

    The very highest is chance: chosen on half of the validation split, it cost
    0.6 points of macro-F1 on the other half against 0.5 for all, this 0.02.
    """
    chosen = []
    for p, t in zip(probabilities.T, targets.T, strict=True):
        f1 = [summarize_scores(p[:, None], t[:, None], threshold)["macro_f1"] for threshold in THRESHOLD_GRID]
        best = np.flatnonzero(np.array(f1) >= max(f1) - TOLERANCE)
        chosen.append(THRESHOLD_GRID[best[np.argmin(np.abs(THRESHOLD_GRID[best] - HALF))]])
    return np.array(chosen)


def summarize_probes(probes: list[dict], probabilities: np.ndarray, labels: list[Label]) -> dict[str, float]:
    """The study's trust test: does each sentence's need come out on top, and do the others stay low?

    `probabilities` is [P, L]. `on_top` counts sentences whose need has the
    highest score, `trusted` those where it is also 0.5 or more; `others_mean`
    and `others_at_half` speak of all other scores.
    """
    names = [label.name for label in labels]
    target = np.array([names.index(probe["need"]) for probe in probes])  # [P]
    rows = np.arange(len(probes))
    on_top = probabilities.argmax(1) == target
    others = np.ones_like(probabilities, bool)
    others[rows, target] = False
    return {
        "sentences": len(probes),
        "on_top": int(on_top.sum()),
        "trusted": int((on_top & (probabilities[rows, target] >= HALF)).sum()),
        "others": int(others.sum()),
        "others_mean": float(probabilities[others].mean()),
        "others_at_half": int((probabilities[others] >= HALF).sum()),
    }


def match_labels(dataset: Dataset, labels: list[Label]) -> Dataset | None:
    """The data with its targets in a checkpoint's order of labels, None where the labels are others."""
    names = [label.name for label in dataset.labels]
    if {label.name for label in labels} != set(names):
        return None
    order = [names.index(label.name) for label in labels]

    def reorder(examples: Examples) -> Examples:
        return Examples(examples.texts, examples.targets[:, order], examples.sources)

    splits = {split: reorder(getattr(dataset, split)) for split in ("train", "validation", "test")}
    return Dataset(labels=[dataset.labels[i] for i in order], probes=dataset.probes, **splits)
