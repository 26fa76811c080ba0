"""How the function treats what one run cannot answer: an exported model in, two tables out.

Long texts: the long diaries of the data, and texts joined from several with their
needs united, read whole in windows or cut after the first, for several sizes of
window and ways to combine them. The mean odds of `function.classifier` were chosen
on the validation and the training split's diaries.

Explanations: how often a decision turns when the two words are left out that the
explanation ranks highest, against two others at random (ERASER's
comprehensiveness, DeYoung et al. 2020, https://arxiv.org/abs/1911.03429).

    python -m build.behaviour --split test
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from build.exported import INT8, load_classifier
from function.classifier import Classifier, combine
from function.explain import explain, list_spans
from training.examples import Examples, read_dataset
from training.metrics import HALF, sigmoid, summarize_scores

WINDOW_TOKENS = (64, 128, 256)
JOINED_TEXTS = 8
JOINED_GROUPS = 60
MAX_WINDOWS = 32
"""More than the function's default, so that sizes are compared on the same words."""
LEFT_OUT = 2

COMBINATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean odds": lambda logits: combine(list(logits)),
    "highest": lambda logits: sigmoid(logits.max(0)),
    "mean logit": lambda logits: sigmoid(logits.mean(0)),
    "any (noisy or)": lambda logits: 1 - np.prod(1 - sigmoid(logits), axis=0),
    "first alone (cut)": lambda logits: sigmoid(logits[0]),
}
"""float32 [W, L] logits of a text's windows to [L] probabilities."""


def join_texts(examples: Examples, seed: int = 0) -> Examples:
    """Texts of several texts each, with the needs of all of them."""
    order = np.random.default_rng(seed).permutation(len(examples))
    groups = [order[at : at + JOINED_TEXTS] for at in range(0, len(order), JOINED_TEXTS)][:JOINED_GROUPS]
    texts = ["\n".join(examples.texts[i] for i in group) for group in groups]
    return Examples(texts, np.stack([examples.targets[group].max(0) for group in groups]), ["joined"] * len(groups))


def compare_windows(folder: Path, examples: Examples) -> dict[tuple[int, str], float]:
    """Macro-F1 at 0.5 for each size of window and way to combine them."""
    found = {}
    for tokens in WINDOW_TOKENS:
        model = load_classifier(folder, folder / INT8, tokens, MAX_WINDOWS)
        logits = [
            np.stack([model.run(ids) for ids in model.split(text).ids])  # [W, L]
            for text in tqdm(examples.texts, f"windows of {tokens}", leave=False)
        ]
        for name, unite in COMBINATIONS.items():
            scores = np.stack([unite(windows) for windows in logits])
            found[tokens, name] = summarize_scores(scores, examples.targets)["macro_f1"]
    return found


def compare_left_out(model: Classifier, texts: list[str], seed: int = 0) -> dict[str, float]:
    """Share of decisions that turn without the two highest words, and without two others at random.

    Decisions are needs at 0.5 or more in texts of at least twice as many words.
    """
    random, turned = np.random.default_rng(seed), []
    for text in tqdm(texts, "explain", leave=False):
        probabilities = model.score(text)
        needs = [int(i) for i in np.flatnonzero(probabilities >= HALF)]
        spans = list_spans(text, len(text))
        if not needs or len(spans) < 2 * LEFT_OUT:
            continue
        runs = len(model.split(text).ids)
        for need, words in zip(needs, explain(text, probabilities, model.score, runs, needs), strict=True):
            highest = [(word["start"], word["end"]) for word in words[:LEFT_OUT]]
            others = [span for span in spans if span not in highest]
            chosen = [others[i] for i in random.permutation(len(others))[: len(highest)]]
            turned.append([model.score(leave_out(text, left))[need] < HALF for left in (highest, chosen)])
    highest_share, random_share = np.mean(turned, axis=0)
    return {"decisions": len(turned), "highest": float(highest_share), "random": float(random_share)}


def leave_out(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without these spans."""
    for start, end in sorted(spans, reverse=True):
        text = text[:start] + text[end:]
    return text


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--onnx", type=Path, default=Path(".local/build/onnx"))
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--long-source", default="diaries", help="the source whose texts are long")
    args = parser.parse_args()
    examples: Examples = getattr(read_dataset(args.data), args.split)
    long = [i for i, source in enumerate(examples.sources) if source == args.long_source]
    kinds = {f"{len(joined)} joined": joined for joined in [join_texts(examples)]}
    if long:
        diaries = Examples([examples.texts[i] for i in long], examples.targets[long], ["long"] * len(long))
        kinds = {f"{len(long)} long diaries": diaries, **kinds}
    console = Console()
    for kind, part in kinds.items():
        found = compare_windows(args.onnx, part)
        table = Table("windows of", *COMBINATIONS, title=f"{kind} ({args.split}), macro-F1 at 0.5, INT8")
        for tokens in WINDOW_TOKENS:
            table.add_row(f"{tokens} tokens", *(f"{found[tokens, name]:.4f}" for name in COMBINATIONS))
        console.print(table)
    left = compare_left_out(load_classifier(args.onnx, args.onnx / INT8), examples.texts)
    times = left["highest"] / left["random"] if left["random"] else float("inf")
    console.print(
        f"{left['decisions']} decisions: {left['highest']:.1%} turn without the {LEFT_OUT} highest words, "
        f"{left['random']:.1%} without {LEFT_OUT} others at random: {times:.1f} times as many"
    )


if __name__ == "__main__":
    main()
