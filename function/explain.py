"""Explanation: a text and its scores in, the words that speak for each need out.

A word speaks for a need as far as the need's probability falls when the word is
left out (occlusion, Zeiler and Fergus 2014, https://arxiv.org/abs/1311.2901; of
words: Li et al. 2016, https://arxiv.org/abs/1612.08220). It asks the model
itself, so it says what the model did, also where that is wrong. A word is an
eojeol: what stands between spaces.
"""

import re
from collections.abc import Callable

import numpy as np

MAX_RUNS = 64
"""Of the model, for one explanation."""
_EOJEOL = re.compile(r"\S+")


def explain(
    text: str, probabilities: np.ndarray, score: Callable[[str], np.ndarray], runs: int, labels: list[int]
) -> list[list[dict]]:
    """For each of `labels`, the spans that speak for it, heaviest first: `start`, `end`, `weight`.

    `score` gives a text's float32 [L] probabilities, such as `probabilities`, in
    `runs` runs of the model. Offsets are code points of `text`; weights are in (0, 1].
    """
    spans = list_spans(text, max(1, MAX_RUNS // runs))
    without = np.stack([score(text[:start] + text[end:]) for start, end in spans])  # [S, L]
    falls = probabilities - without  # [S, L]
    explained = []
    for label in labels:
        words = [
            {"start": start, "end": end, "weight": round(float(fall), 4)}
            for (start, end), fall in zip(spans, falls[:, label], strict=True)
        ]
        speaking = [word for word in words if word["weight"] > 0]
        explained.append(sorted(speaking, key=lambda word: -word["weight"]))
    return explained


def list_spans(text: str, most: int) -> list[tuple[int, int]]:
    """Start and end of each eojeol; of neighbours together where there are more than `most`."""
    words = [match.span() for match in _EOJEOL.finditer(text)]
    groups = np.array_split(np.arange(len(words)), min(most, len(words)))
    return [(words[group[0]][0], words[group[-1]][1]) for group in groups]
