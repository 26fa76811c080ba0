"""The study: strategies and cheap rivals side by side, on the same data and seeds.

Each run is `training.finetune` in a process of its own, so that its memory is
its own; one that is done is not done again. Judged on validation, where choices
are made: micro and macro F1 at 0.5, expected calibration error, time, peak
memory, parameters. `partial-6` is `partial` on the lowest six layers; with
`--untrimmed`, `full` runs once more on the base's whole vocabulary and without
sorting by length, to show what these two save.

    python -m training.study --strategies partial,partial-6,lora,full --seeds 1,2,3
    python -m training.study --strategies full --seeds 1 --rows 600 --epochs 1 --untrimmed .local/build/base
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from training.baseline import predict_baseline, predict_static
from training.examples import Dataset, read_dataset
from training.files import read_json, write_json
from training.finetune import STRATEGIES, hash_examples
from training.metrics import calibration_error, sigmoid, summarize_scores
from training.model import DEFAULT_MAX_TOKENS, encode, load_checkpoint, new_checkpoint, predict_logits

RATES = {"lora": 5e-4}
"""Where a strategy needs another learning rate than `training.finetune`'s own: LoRA's additions start at zero."""


def run_strategy(strategy: str, seed: int, dataset: Dataset, folder: Path, options: list[str]) -> dict:
    """Fine-tune into `folder`, unless that was done with the same texts, and judge on validation.

    `strategy` may end in the number of layers to keep: "partial-6".
    """
    noted = folder / "training.json"
    if not noted.exists() or read_json(noted).get("texts") != hash_examples(dataset):
        name, _, layers = strategy.partition("-")
        command = [sys.executable, "-m", "training.finetune", "--strategy", name, "--layers", layers or "0"]
        rate = ["--learning-rate", str(RATES[name])] if name in RATES else []
        subprocess.run([*command, "--seed", str(seed), "--output", str(folder), *rate, *options], check=True)
    checkpoint = load_checkpoint(folder)
    scores = sigmoid(predict_logits(checkpoint, dataset.validation.texts))
    return {**judge(scores, dataset), **read_json(noted)["resources"]}


def run_rivals(base: Path, dataset: Dataset, rows: int) -> dict[str, dict]:
    """Character n-grams and static embeddings, which need no seed."""
    train = dataset.train.part(rows or len(dataset.train), seed=1)
    checkpoint = new_checkpoint(base, dataset.labels, DEFAULT_MAX_TOKENS, seed=1)
    embeddings = checkpoint.model.encoder.get_input_embeddings().weight.detach().numpy()
    ids, texts = encode(checkpoint, train.texts), dataset.validation.texts
    (static,) = predict_static(embeddings, ids, train.targets, [encode(checkpoint, texts)])
    (ngrams,) = predict_baseline(train, [texts])
    return {"character n-grams": judge(ngrams, dataset), "static embeddings": judge(static, dataset)}


def judge(scores: np.ndarray, dataset: Dataset) -> dict:
    """What [B, L] probabilities of the validation texts are worth."""
    found = summarize_scores(scores, dataset.validation.targets)
    error = calibration_error(scores, dataset.validation.targets)
    return {"macro_f1": found["macro_f1"], "micro_f1": found["micro_f1"], "calibration_error": error}


def make_table(found: dict[str, list[dict]]) -> Table:
    """A row a strategy or rival: means over its seeds, macro-F1 with its range."""
    table = Table("", "macro-F1 (lowest to highest)", "micro-F1", "ECE", "minutes", "GB", "trainable parameters")
    for name, runs in found.items():
        f1 = [run["macro_f1"] for run in runs]

        def mean(key: str, scale: float = 1.0, runs: list[dict] = runs) -> float:
            return float(np.mean([run[key] for run in runs])) / scale

        cells = [f"{np.mean(f1):.4f} ({min(f1):.4f} to {max(f1):.4f})", f"{mean('micro_f1'):.4f}"]
        cells.append(f"{mean('calibration_error'):.4f}")
        if "wall_seconds" in runs[0]:
            cells += [f"{mean('wall_seconds', 60):.1f}", f"{mean('peak_memory_bytes', 1e9):.2f}"]
            cells.append(f"{runs[0]['trainable_parameters']:,}")
        table.add_row(name, *cells)
    return table


def compare_costs(ours: list[dict], whole: list[dict]) -> str:
    """By how much trimming and sorting by length cut the time and memory of the same training."""
    shares = {
        what: float(np.mean([run[key] for run in ours]) / np.mean([run[key] for run in whole]))
        for what, key in (("time", "wall_seconds"), ("peak memory", "peak_memory_bytes"))
    }
    parts = " and ".join(f"{share:.0%} of the {what}" for what, share in shares.items())
    return f"full, trimmed and sorted by length: {parts} of the same run without"


def main() -> None:
    """Run what is not done yet, and print the table after each run."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--base", type=Path, default=Path(".local/build/trimmed"))
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    parser.add_argument("--output", type=Path, default=Path(".local/study"))
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rows", type=int, default=0, help="train on a random part of this many texts; 0 is all")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--untrimmed", type=Path, help="the base before trimming: `full` runs on it too, unsorted")
    args = parser.parse_args()
    console, dataset = Console(), read_dataset(args.data)
    options = ["--base", str(args.base), "--data", str(args.data), "--rows", str(args.rows)]
    options += ["--epochs", str(args.epochs)]
    found: dict[str, list[dict]] = {
        name: [judged] for name, judged in run_rivals(args.base, dataset, args.rows).items()
    }
    runs = [(strategy, strategy, options) for strategy in args.strategies.split(",")]
    if args.untrimmed:
        whole = [*options, "--base", str(args.untrimmed), "--bucket-batches", "1"]
        runs.append(("full, untrimmed and unsorted", "full", whole))
    for name, strategy, chosen in runs:
        for seed in map(int, args.seeds.split(",")):
            folder = args.output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}-{args.rows}-{args.epochs:g}"
            found.setdefault(name, []).append(run_strategy(strategy, seed, dataset, folder, chosen))
            write_json(args.output / "study.json", found)
            console.print(make_table(found))
    if args.untrimmed:
        console.print(compare_costs(found["full"], found[runs[-1][0]]))


if __name__ == "__main__":
    main()
