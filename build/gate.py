"""The gate: a verified release and those served before it in, a verdict out.

Floors hold for every release, also the first. Beyond them a release must be no
worse than the best of the last five that were promoted, so that small losses do
not add up; all are asked on the same current test split, here and now, at their
own thresholds, through the function's own classifier. The gate may refuse by
the test split, it never chooses by it: a refused release is published, not
promoted, and no other seed is tried.

    python -m build.gate --model-uri gs://bucket/needs
"""

import argparse
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from build.exported import measure_in_turn, score_texts
from build.publish import Bucket, PublishError, list_promotions, read_current
from function.classifier import Classifier
from function.errors import ReleaseRefused
from function.manifest import MODEL, TOKENIZER, Manifest, parse_manifest
from training.examples import Dataset, Label, read_dataset
from training.files import read_json, write_json
from training.metrics import match_labels, summarize_scores

RIVALS = 5
SLOWDOWN, GROWTH = 1.5, 1.25
"""How many times the served release's time and size a new one may take."""
TIMED_TEXTS = 30
MAX_WINDOWS = 8
"""As the function's default."""


@dataclass(frozen=True)
class Bound:
    """One thing that must hold: `found` at least, or at most, `limit`."""

    name: str
    kind: str
    limit: float
    found: float

    @property
    def passed(self) -> bool:
        """Whether it holds; what is not a number does not."""
        return self.found >= self.limit if self.kind == "at least" else self.found <= self.limit

    def __str__(self) -> str:
        return f"{self.name}: expected {self.kind} {self.limit:.4g}, found {self.found:.4g}"


@dataclass
class Judged:
    """A release as it does on the current test split."""

    release: str
    classifier: Classifier
    bytes: int
    macro_f1: float
    f1: dict[str, float]
    """By need."""
    milliseconds: float = 0.0


def load_release(manifest: Manifest, model: bytes, tokenizer: bytes) -> Classifier:
    """A release as the function would serve it, on one thread."""
    return Classifier(
        model,
        tokenizer,
        prefix=manifest.prefix,
        max_tokens=manifest.max_tokens,
        max_windows=MAX_WINDOWS,
        threads=1,
    )


def fetch_release(bucket: Bucket, release: str) -> tuple[Manifest, bytes, bytes]:
    """A published release's manifest, model and tokenizer. Raises ReleaseRefused where it is not whole."""
    stored, _ = bucket.read(f"releases/{release}/manifest.json")
    manifest = parse_manifest(stored or b"")
    files = []
    for name in (MODEL, TOKENIZER):
        content, _ = bucket.read(f"releases/{release}/{name}")
        if hashlib.sha256(content or b"").hexdigest() != manifest.files[name].sha256:
            raise ReleaseRefused(f"{release}/{name}: expected its sha256, found another; promote another release")
        files.append(content or b"")
    return manifest, files[0], files[1]


def judge_release(name: str, classifier: Classifier, size: int, thresholds: list[float], dataset: Dataset) -> Judged:
    """Score the test split at a release's own thresholds."""
    scores = score_texts(classifier, dataset.test.texts, name)  # [B, L]
    found = summarize_scores(scores, dataset.test.targets, np.array(thresholds, np.float32))
    f1 = dict(zip([label.name for label in dataset.labels], found["f1"], strict=True))
    return Judged(name, classifier, size, found["macro_f1"], f1)


def judge_rivals(bucket: Bucket, dataset: Dataset) -> list[Judged]:
    """The last five promoted releases that know the data's labels, newest first."""
    names = list(dict.fromkeys(pointer["release"] for pointer in reversed(list_promotions(bucket))))[:RIVALS]
    rivals = []
    for name in names:
        try:
            manifest, model, tokenizer = fetch_release(bucket, name)
        except ReleaseRefused as refusal:
            console.print(f"not compared with {name}: {refusal}")
            continue
        matched = match_labels(dataset, [Label(label.name, label.id) for label in manifest.labels])
        if matched is None:
            console.print(f"not compared with {name}: it has other labels than the data")
            continue
        thresholds = [label.threshold for label in manifest.labels]
        classifier = load_release(manifest, model, tokenizer)
        rivals.append(judge_release(name, classifier, len(model), thresholds, matched))
    return rivals


def list_floors(verification: dict, size: int, candidate: Judged | None, args: argparse.Namespace) -> list[Bound]:
    """What every release must meet; a macro-F1 that cannot be measured, for other labels than the data's, is 0."""
    bounds = [
        Bound("macro-F1", "at least", args.min_macro_f1, candidate.macro_f1 if candidate else 0.0),
        Bound("flips of INT8", "at most", args.max_flips, verification["flips"]),
        Bound("PyTorch to ONNX, logits", "at most", args.max_logit_difference, verification["logit_difference"]),
        Bound("model, MB", "at most", args.max_bytes / 1e6, size / 1e6),
    ]
    if "macro_f1_loss" in verification:
        bounds.append(Bound("macro-F1 lost in INT8", "at most", args.max_f1_loss, verification["macro_f1_loss"]))
    return bounds


def compare(candidate: Judged, rivals: list[Judged], served: str, args: argparse.Namespace) -> list[Bound]:
    """What the best of the rivals and the one now served ask for."""
    best = max(rivals, key=lambda rival: rival.macro_f1)
    name = f"macro-F1, of {best.release} {best.macro_f1:.4f}"
    bounds = [Bound(name, "at least", best.macro_f1 - args.max_f1_drop, candidate.macro_f1)]
    for need, f1 in best.f1.items():
        bounds.append(Bound(f"F1 of {need}", "at least", f1 - args.max_need_drop, candidate.f1[need]))
    for rival in rivals:
        if rival.release == served:
            bounds.append(
                Bound("milliseconds a text", "at most", SLOWDOWN * rival.milliseconds, candidate.milliseconds)
            )
            bounds.append(Bound("model, MB", "at most", GROWTH * rival.bytes / 1e6, candidate.bytes / 1e6))
    return bounds


def judge(bucket: Bucket, folder: Path, dataset: Dataset, args: argparse.Namespace) -> dict:
    """The verdict on a release's folder: `passed`, `sequence` of the promotion compared with, `bounds`, `reason`."""
    metrics = read_json(folder / "metrics.json")
    made, verification = metrics["export"], metrics["verification"]
    size = (folder / MODEL).stat().st_size
    current, _ = read_current(bucket)
    matched = match_labels(dataset, [Label(**label) for label in made["labels"]])
    candidate, bounds = None, []
    if matched:
        shape = {"prefix": made["prefix"], "max_tokens": made["max_tokens"], "max_windows": MAX_WINDOWS, "threads": 1}
        classifier = Classifier((folder / MODEL).read_bytes(), (folder / TOKENIZER).read_bytes(), **shape)
        candidate = judge_release("this one", classifier, size, verification["thresholds"], matched)
        rivals = judge_rivals(bucket, matched)
        everyone = [candidate, *rivals]
        times = measure_in_turn([one.classifier for one in everyone], matched.test.texts[:TIMED_TEXTS])
        for one, milliseconds in zip(everyone, times, strict=True):
            one.milliseconds = milliseconds
        if rivals and current:
            bounds = compare(candidate, rivals, current["release"], args)
    bounds = list_floors(verification, size, candidate, args) + bounds
    broken = [str(bound) for bound in bounds if not bound.passed]
    return {
        "passed": not broken,
        "sequence": current["sequence"] if current else 0,
        "bounds": [asdict(bound) | {"passed": bound.passed} for bound in bounds],
        "reason": "; ".join(broken),
    }


def make_table(verdict: dict) -> Table:
    """Each bound, and whether it holds."""
    table = Table("", "expected", "found", "")
    for bound in verdict["bounds"]:
        mark = "holds" if bound["passed"] else "[bold]broken[/]"
        table.add_row(bound["name"], f"{bound['kind']} {bound['limit']:.4g}", f"{bound['found']:.4g}", mark)
    return table


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: what is judged, and the bounds."""
    parser = argparse.ArgumentParser(description="Judge a release before it is published.")
    parser.add_argument("--model-uri", required=True, help="gs://bucket/prefix")
    parser.add_argument("--release", type=Path, default=Path(".local/build/release"))
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    parser.add_argument("--output", type=Path, default=Path(".local/build/gate.json"))
    parser.add_argument("--min-macro-f1", type=float, default=0.5, help="on the test split, of every release")
    parser.add_argument("--max-f1-drop", type=float, default=0.01, help="of macro-F1, from the best rival's")
    parser.add_argument("--max-need-drop", type=float, default=0.08, help="of one need's F1, from the best rival's")
    parser.add_argument("--max-flips", type=float, default=0.025, help="share of decisions, fp32 against INT8")
    parser.add_argument("--max-f1-loss", type=float, default=0.02, help="of macro-F1, fp32 against INT8")
    parser.add_argument("--max-logit-difference", type=float, default=1e-4, help="PyTorch against fp32")
    parser.add_argument("--max-bytes", type=int, default=100_000_000, help="of the model")
    return parser.parse_args(arguments)


def main() -> None:
    """Judge the release folder and write gate.json; a refusal is no failure of this step."""
    args = parse_arguments()
    try:
        verdict = judge(Bucket(args.model_uri), args.release, read_dataset(args.data), args)
    except (PublishError, ReleaseRefused) as error:
        raise SystemExit(str(error)) from None
    write_json(args.output, verdict)
    console.print(make_table(verdict))
    print("passed: to be promoted" if verdict["passed"] else f"refused, to be published only: {verdict['reason']}")


console = Console(width=120)

if __name__ == "__main__":
    main()
