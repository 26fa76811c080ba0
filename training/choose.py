"""The choice: trained candidates in, the one to release out.

The smallest candidate whose macro-F1 on validation is within `MARGIN` of the
best one's: what a user waits for and pays for is size and speed, and half a
point is less than the seeds of one training differ by.

    python -m training.choose --candidates .local/build/student,.local/build/teacher --output .local/build/checkpoint
"""

import argparse
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from training.examples import Dataset, demand_dataset
from training.files import replace_folder, write_json
from training.metrics import calibration_error, sigmoid, summarize_scores
from training.model import load_checkpoint, parameter_counts, predict_logits

CANDIDATES = ".local/build/student,.local/build/teacher"
MARGIN = 0.005


def judge(folder: Path, dataset: Dataset) -> dict:
    """A candidate's parameters, and on validation its F1 at 0.5 and its calibration error."""
    checkpoint = load_checkpoint(folder)
    probabilities = sigmoid(predict_logits(checkpoint, dataset.validation.texts))
    found = summarize_scores(probabilities, dataset.validation.targets)
    return {
        "name": folder.name,
        "parameters": parameter_counts(checkpoint.model)["total_parameters"],
        "macro_f1": found["macro_f1"],
        "micro_f1": found["micro_f1"],
        "calibration_error": calibration_error(probabilities, dataset.validation.targets),
    }


def choose(candidates: list[dict]) -> dict:
    """The smallest within `MARGIN` of the best; the better of two equally small."""
    best = max(candidate["macro_f1"] for candidate in candidates)
    near = [candidate for candidate in candidates if candidate["macro_f1"] >= best - MARGIN]
    return min(near, key=lambda candidate: (candidate["parameters"], -candidate["macro_f1"]))


def main() -> None:
    """Judge the candidates and copy the chosen one's folder; candidates.json in it has all of them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--candidates", default=CANDIDATES, help="folders; one may be missing")
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    parser.add_argument("--output", type=Path, default=Path(".local/build/checkpoint"))
    args = parser.parse_args()
    folders = [Path(folder) for folder in args.candidates.split(",") if Path(folder).is_dir()]
    if not folders:
        raise SystemExit(f"--candidates: expected a checkpoint's folder, found none of {args.candidates}; train one")
    dataset = demand_dataset(args.data)
    judged = [judge(folder, dataset) for folder in folders]
    chosen = choose(judged)
    table = Table("", "candidate", "parameters", "macro-F1", "micro-F1", "calibration error")
    for one in judged:
        figures = [f"{one[key]:.4f}" for key in ("macro_f1", "micro_f1", "calibration_error")]
        table.add_row("▶" if one is chosen else "", one["name"], f"{one['parameters']:,}", *figures)
    Console(width=120).print(table)
    with replace_folder(args.output) as new:
        shutil.copytree(folders[judged.index(chosen)], new, dirs_exist_ok=True)
        write_json(new / "candidates.json", {"chosen": chosen["name"], "margin": MARGIN, "candidates": judged})


if __name__ == "__main__":
    main()
