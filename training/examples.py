"""Labelled texts: files in, checked texts and a target matrix out.

A data folder holds `labels.json` and either the splits `train`, `validation`
and `test`, or files of any other name that are split here; each is `.jsonl`
(`{"text": "…", "needs": ["안정감"]}` or `{"needs": {"안정감": 0.7}}`) or `.csv`
(a column `text` and one column a label). `probes.jsonl`, where there is one,
holds sentences with the one need that each is about.

    python -m training.examples --data training/data
"""

import argparse
import csv
import hashlib
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE = TEST_SHARE = 0.1
PROBLEMS_SHOWN = 20


class DataError(ValueError):
    """The data cannot be used as it stands: one line a problem, with file, line and remedy."""


@dataclass(frozen=True)
class Label:
    """One need: `name` as people read it, `id` in ASCII for code and plots."""

    name: str
    id: str


@dataclass
class Examples:
    """B texts and their targets."""

    texts: list[str]
    targets: np.ndarray
    """float32 [B, L] in [0, 1]; 1.0 where a need is expressed."""
    sources: list[str]
    """Which collection each text came from, "" where the data does not say."""

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, rows: int, seed: int) -> "Examples":
        """A random part of `rows` texts, or all of them where there are no more."""
        keep = np.sort(np.random.default_rng(seed).permutation(len(self))[:rows])
        return Examples([self.texts[i] for i in keep], self.targets[keep], [self.sources[i] for i in keep])


@dataclass
class Dataset:
    """Everything that a model is trained, chosen and judged on."""

    labels: list[Label]
    train: Examples
    validation: Examples
    test: Examples
    probes: list[dict] = field(default_factory=list)
    """`{"text", "need"}`, and `published` with another study's scores where known."""


@dataclass(frozen=True)
class _Row:
    where: str
    split: str
    text: str
    target: np.ndarray
    source: str


def read_dataset(data: Path) -> Dataset:
    """Read and check a data folder.

    Raises DataError with one line a problem; nothing is dropped or mended silently.
    """
    labels = read_labels(data / "labels.json")
    names = [label.name for label in labels]
    problems: list[str] = []
    rows = list(_read_rows(data, names, problems))
    problems += _find_repeats(rows)
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        tail = [f"… and {more} more"] if more > 0 else []
        raise DataError("\n".join(problems[:PROBLEMS_SHOWN] + tail))
    splits = {split: _gather([row for row in rows if row.split == split]) for split in SPLITS}
    for split, examples in splits.items():
        if not len(examples):
            raise DataError(f"{data}: expected texts in every split, found none in {split}; add some")
    return Dataset(labels=labels, probes=_read_probes(data / "probes.jsonl", names), **splits)


def demand_dataset(data: Path) -> Dataset:
    """The same for a command: what is wrong is said, and ends it."""
    try:
        return read_dataset(data)
    except DataError as error:
        raise SystemExit(f"The data cannot be used:\n{error}") from None


def read_labels(path: Path) -> list[Label]:
    """Labels in output order: `[{"name": "안정감", "id": "security"}, …]`."""
    expected = '[{"name": "안정감", "id": "security"}, …] with distinct names and ids'
    try:
        labels = [Label(str(item["name"]), str(item["id"])) for item in json.loads(path.read_text("utf-8"))]
    except FileNotFoundError:
        raise DataError(f"{path}: expected the labels, found no file; write {expected}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected {expected}, found {error!r}; mend the file") from error
    if not labels or any(len({getattr(x, key) for x in labels}) < len(labels) for key in ("name", "id")):
        raise DataError(f"{path}: expected {expected}, found {labels}; mend the file")
    return labels


def split_of(text: str) -> str:
    """The split that a text belongs to, for ever: by a hash of its NFC form alone.

    A text keeps its split whatever is added around it, so no release is judged
    on a row that an earlier one was trained on.
    """
    digest = hashlib.sha256(unicodedata.normalize("NFC", text).encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < TEST_SHARE:
        return "test"
    return "validation" if share < TEST_SHARE + VALIDATION_SHARE else "train"


def _read_rows(data: Path, names: list[str], problems: list[str]) -> Iterator[_Row]:
    files = sorted(p for p in data.iterdir() if p.suffix in (".jsonl", ".csv") and p.stem != "probes")
    named = {path.stem for path in files} & set(SPLITS)
    if named and named != set(SPLITS):
        problems.append(
            f"{data}: expected all of {', '.join(SPLITS)}, found only {', '.join(sorted(named))}; "
            "add the others, or rename the file to have it split by a hash of each text"
        )
    if named:
        files = [path for path in files if path.stem in SPLITS]
    if not files:
        problems.append(f"{data}: expected .jsonl or .csv files, found none; put the texts there")
    for path in files:
        for line, record in _read_records(path, names, problems):
            where = f"{path}:{line}"
            try:
                text, target = _check_record(record, names)
            except ValueError as error:
                problems.append(f"{where}: {error}")
                continue
            split = path.stem if named else split_of(text)
            yield _Row(where, split, text, target, str(record.get("source", "")))


def _read_records(path: Path, names: list[str], problems: list[str]) -> Iterator[tuple[int, dict]]:
    try:
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{path}: expected UTF-8, found {error}; save the file as UTF-8")
        return
    if path.suffix == ".csv":
        yield from _read_csv(path, content, names, problems)
        return
    for line, part in enumerate(content.split("\n"), 1):
        if not part.strip():
            continue
        try:
            record = json.loads(part)
        except ValueError as error:
            problems.append(f"{path}:{line}: expected one JSON object, found {error}; mend or remove the line")
            continue
        if isinstance(record, dict):
            yield line, record
        else:
            problems.append(f"{path}:{line}: expected a JSON object, found {part[:40]}; mend or remove the line")


def _read_csv(path: Path, content: str, names: list[str], problems: list[str]) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(content.splitlines(keepends=True))
    columns = list(reader.fieldnames or [])
    missing = [name for name in ("text", *names) if name not in columns]
    unknown = [name for name in columns if name not in ("text", "source", *names)]
    if missing or unknown:
        problems.append(
            f"{path}:1: expected the columns text, {', '.join(names)} and perhaps source, "
            f"found {', '.join(columns)}; mend the header or labels.json"
        )
        return
    for record in reader:
        cells = {name: record[name] for name in names}
        needs: dict[str, object] = {}
        for name, cell in cells.items():
            try:
                needs[name] = float(cell or 0)
            except ValueError:
                needs[name] = cell
        yield reader.line_num, {"text": record["text"], "needs": needs, "source": record.get("source") or ""}


def _check_record(record: dict, names: list[str]) -> tuple[str, np.ndarray]:
    text, needs = record.get("text"), record.get("needs")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text: expected a non-empty string, found {text!r}; mend or remove the line")
    if isinstance(needs, list):
        if len(set(map(str, needs))) < len(needs):
            raise ValueError(f"needs: expected each label once, found {needs}; remove the repeated one")
        needs = dict.fromkeys(map(str, needs), 1.0)
    if not isinstance(needs, dict):
        raise ValueError(f"needs: expected a list or a map, found {needs!r}; write [] where there is none")
    target = np.zeros(len(names), np.float32)
    for name, value in needs.items():
        if name not in names:
            raise ValueError(f"needs: expected one of {', '.join(names)}, found {name!r}; mend it or labels.json")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"needs: expected {name} from 0 to 1, found {value!r}; mend the value")
        target[names.index(name)] = value
    return text, target


def _find_repeats(rows: list[_Row]) -> Iterator[str]:
    """Texts that occur twice, also across splits, where they would leak from train to test."""
    first: dict[str, _Row] = {}
    for row in rows:
        key = " ".join(unicodedata.normalize("NFC", row.text).split())
        seen = first.setdefault(key, row)
        if seen is not row:
            leak = "" if seen.split == row.split else f" (it leaks from {seen.split} into {row.split})"
            yield f"{row.where}: expected a new text, found that of {seen.where}{leak}; remove one of the two"


def _gather(rows: list[_Row]) -> Examples:
    targets = np.stack([row.target for row in rows]) if rows else np.zeros((0, 0), np.float32)
    return Examples([row.text for row in rows], targets, [row.source for row in rows])


def _read_probes(path: Path, names: list[str]) -> list[dict]:
    if not path.exists():
        return []
    probes = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    for line, probe in enumerate(probes, 1):
        if not isinstance(probe.get("text"), str) or probe.get("need") not in names:
            raise DataError(
                f"{path}:{line}: expected text and a need out of {', '.join(names)}, found {probe}; mend the line"
            )
    return probes


def describe_dataset(dataset: Dataset) -> str:
    """Its labels, and how many texts each split has, for a terminal."""
    lines = [f"{len(dataset.labels)} labels: {', '.join(label.name for label in dataset.labels)}"]
    for split in SPLITS:
        examples: Examples = getattr(dataset, split)
        decided = (examples.targets >= 0.5).sum(1)
        lines.append(f"{split}: {len(examples)} texts, {(decided == 0).mean():.0%} without a need")
    return "\n".join(lines)


def main() -> None:
    """Check a data folder and print what is in it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    print(describe_dataset(demand_dataset(parser.parse_args().data)))


if __name__ == "__main__":
    main()
