"""A running function asked over HTTP: texts in, its scores and what a release makes of the data out."""

from pathlib import Path

import numpy as np
import requests
from rich.console import Console
from rich.table import Table

from training.examples import Dataset, Label, read_dataset
from training.metrics import find_uneventful, match_labels, share_claimed, summarize_probes, summarize_scores

TEXTS_A_REQUEST = 64
BAR_WIDTH = 40


class AnswerError(RuntimeError):
    """The function did not answer with scores."""


def post(address: str, body: dict) -> dict:
    """Ask the function. Raises AnswerError with its problem's detail."""
    response = requests.post(address, json=body, timeout=60)
    answer: dict = response.json()
    if response.status_code != 200:
        raise AnswerError(f"{address}: expected 200, found {response.status_code}: {answer['detail']}")
    return answer


def score_over_http(address: str, texts: list[str], names: list[str]) -> np.ndarray:
    """float64 [B, L]: the function's scores, TEXTS_A_REQUEST texts a request."""
    rows: list[list[float]] = []
    for at in range(0, len(texts), TEXTS_A_REQUEST):
        results = post(address, {"texts": texts[at : at + TEXTS_A_REQUEST]})["results"]
        rows += [[result["scores"][name] for name in names] for result in results]
    return np.array(rows)


def show_release(address: str, data: Path, console: Console) -> None:
    """Ask for the probe sentences and the test split, and print what the release makes of them."""
    manifest = requests.get(f"{address}/release", timeout=60).json()
    labels = [Label(label["name"], label["id"]) for label in manifest["labels"]]
    dataset = match_labels(read_dataset(data), labels)
    if dataset is None:
        return
    names = [label.name for label in labels]
    if dataset.probes:
        _show_probes(dataset, score_over_http(address, [probe["text"] for probe in dataset.probes], names), console)
    _show_test(dataset, score_over_http(address, dataset.test.texts, names), manifest, console)


def _show_probes(dataset: Dataset, scores: np.ndarray, console: Console) -> None:
    console.print(make_probe_table(dataset.probes, scores, [label.name for label in dataset.labels]))
    found = summarize_probes(dataset.probes, scores, dataset.labels)
    console.print(
        f"{found['on_top']} of {found['sentences']} needs on top, {found['trusted']} of them at 0.5 or more; "
        f"the other {found['others']} scores: mean {found['others_mean']:.3f}, "
        f"{found['others_at_half']} at 0.5 or more"
    )


def _show_test(dataset: Dataset, scores: np.ndarray, manifest: dict, console: Console) -> None:
    targets = dataset.test.targets
    half = summarize_scores(scores, targets)
    console.print(
        f"test split over HTTP, INT8, at 0.5: [bold]macro-F1 {half['macro_f1']:.4f}[/], "
        f"micro-F1 {half['micro_f1']:.4f}{_describe_training(manifest['provenance'])}"
    )
    thresholds = np.array([label["threshold"] for label in manifest["labels"]])
    tuned = summarize_scores(scores, targets, thresholds)["macro_f1"]
    neutral = f"{share_claimed(scores, targets):.1%} of the texts without a need are given one"
    if quiet := find_uneventful(dataset.test):
        neutral += f", {share_claimed(scores[quiet], targets[quiet]):.1%} of those in sources mostly without"
    console.print(f"at the release's thresholds: macro-F1 {tuned:.4f}; at 0.5 {neutral}")
    if ngrams := manifest["metrics"].get("ngrams_macro_f1"):
        points = 100 * (half["macro_f1"] - ngrams)
        console.print(
            f"character n-grams trained on the same texts: macro-F1 {ngrams:.4f}; ours is {points:+.2f} points"
        )


def _describe_training(made: dict) -> str:
    if "trained_texts" not in made:
        return ""  # a checkpoint of one's own
    return f" (trained on {made['trained_texts']:,} of {made['all_texts']:,} training texts)"


def make_probe_table(probes: list[dict], scores: np.ndarray, names: list[str]) -> Table:
    """The study's table for a terminal."""
    table = Table("욕구", "입력 문장", *names)
    for probe, row in zip(probes, scores, strict=True):
        cells = [
            f"[bold]{p:.2f}[/]" if name == probe["need"] else f"{p:.2f}" for name, p in zip(names, row, strict=True)
        ]
        table.add_row(probe["need"], probe["text"], *cells)
    return table


def make_bars(answer: dict) -> Table:
    """One bar a need, those over their threshold marked."""
    table = Table.grid(padding=(0, 1))
    for name, p in answer["scores"].items():
        over = name in answer["needs"]
        bar = "█" * round(p * BAR_WIDTH)
        table.add_row(name, f"[{'green' if over else 'dim'}]{bar:<{BAR_WIDTH}}[/]", f"{p:.4f}", "●" if over else "")
    return table
