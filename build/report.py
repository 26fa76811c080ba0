"""The report: what training, evaluation and verification found in, the release's folder out.

`report.html` is one self-contained page: the published study's own tables in
their own shape, ours beside them, pictures, slices, and what the model gets
wrong. `report.md` has the same without pictures; `metrics.json` has every
figure; README.md is the model card in the hub's format.

    python -m build.report --onnx .local/build/onnx --output .local/build/release
"""

import argparse
import html
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from build.exported import FP32, INT8, PLAIN, SCORES
from build.plots import plot_calibration, plot_confusion, plot_f1, plot_latency, plot_precision_recall
from training.examples import Dataset, Examples, Label, read_dataset
from training.files import read_json, replace_folder, write_json
from training.metrics import HALF, confuse, find_uneventful, match_labels, share_claimed, summarize_scores

TITLE = "심리적 욕구 분류기: 보고서 (release report)"
STUDY = {"before": (0.3176, 0.1727), "after": (0.8302, 0.8267)}
"""Micro and macro F1 as the published study gives them, on its own unpublished data."""
LENGTHS = (0, 15, 30, 60, 120, 300)
"""Slices by characters begin at these."""
WRONG_TEXTS = 20


@dataclass
class Section:
    """One part of the report: Markdown, and a picture where one says more."""

    title: str
    body: str
    picture: str = ""


def write_release(folder: Path, output: Path, dataset: Dataset, notes: dict[str, Path]) -> str:
    """Fill the folder `output` with all released files but the manifest; returns report.md's text.

    `notes` names the JSON files of the steps before, where there are any: a
    checkpoint of one's own comes without training.
    """
    metrics = {name: read_json(path) for name, path in notes.items() if path.exists()}
    metrics["export"] = read_json(folder / "export.json")
    labels = [Label(**label) for label in metrics["export"]["labels"]]
    matched = match_labels(dataset, labels)
    sections = list(describe(metrics, labels, dataset))
    if matched:
        with np.load(folder / SCORES) as scores:
            sections += describe_answers(scores["test"], matched.test, [label.name for label in labels])
    sections += describe_making(metrics)
    report = "\n\n".join([f"# {TITLE}", *(f"## {section.title}\n\n{section.body}" for section in sections)]) + "\n"
    templates = _make_templates()
    with replace_folder(output) as new:
        shutil.copyfile(folder / INT8, new / INT8)
        shutil.copyfile(folder / "tokenizer.json", new / "tokenizer.json")
        write_json(new / "metrics.json", metrics)
        (new / "report.md").write_text(report, "utf-8")
        page = templates.get_template("report.html.jinja").render(title=TITLE, sections=sections)
        (new / "report.html").write_text(page, "utf-8")
        facts = {"made": metrics["export"], "verified": metrics["verification"]}
        facts["verified"].setdefault("int8", None)
        card = templates.get_template("card.md.jinja").render(recipe=metrics["quantization"]["recipe"], **facts)
        (new / "README.md").write_text(card, "utf-8")
    return report


def _make_templates() -> Environment:
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["markdown"] = lambda text: Markup(markdown.render(text))  # which escapes what texts hold
    return templates


def describe(metrics: dict, labels: list[Label], dataset: Dataset) -> Iterator[Section]:
    """What the model is worth, in the study's own tables and ours."""
    evaluation, verified = metrics.get("evaluation"), metrics["verification"]
    if evaluation:
        yield Section("F1", _describe_f1(evaluation, verified))
        yield _describe_labels(evaluation, verified, [label.name for label in labels])
        for title, scores in (
            ("파인튜닝 전 (before fine-tuning)", evaluation["before"].get("probe_scores")),
            ("파인튜닝 후, INT8 (after fine-tuning, as served)", verified.get("probe_scores")),
        ):
            if scores:
                yield Section(title, render_probe_table(dataset.probes, scores, labels))
    yield Section("검증 (verification)", _describe_verification(verified))
    yield _describe_latency(verified["latency_ms"])


def _describe_f1(evaluation: dict, verified: dict) -> str:
    part = evaluation["trained_texts"], evaluation["all_texts"]
    trained = f"{part[0]:,} of {part[1]:,} training texts" if part[0] < part[1] else f"all {part[1]:,} training texts"
    rows = []
    for name, key in (
        ("파인튜닝 전 (before)", "before"),
        ("문자 n-gram (character n-grams)", "ngrams"),
        ("인코더만 (encoder alone), PyTorch", "encoder"),
        ("파인튜닝 후, PyTorch (after)", "after"),
    ):
        found = evaluation[key]
        half, tuned = found["at_half"], found["at_thresholds"]["macro_f1"]
        figures = (half["micro_f1"], half["macro_f1"], tuned, found["calibration_error"])
        rows.append([name, *(f"{value:.4f}" for value in figures)])
    served = verified["int8"], verified["int8_at_thresholds"]["macro_f1"], verified["calibration_error"]
    figures = (served[0]["micro_f1"], served[0]["macro_f1"], *served[1:])
    rows.append(["파인튜닝 후, INT8 (as served)", *(f"{value:.4f}" for value in figures)])
    for name, key in (
        ("공개 연구: 파인튜닝 전 (the study, before)", "before"),
        ("공개 연구: 파인튜닝 후 (the study, after)", "after"),
    ):
        rows.append([name, *(f"{value:.4f}" for value in STUDY[key]), "", ""])
    columns = ["", "micro-F1 (0.5)", "macro-F1 (0.5)", "macro-F1 (thresholds)", "calibration error"]
    return (
        f"Trained on {trained}; test split of {evaluation['test_texts']} texts; thresholds chosen on the validation "
        "split. The study's figures are its own, on its own unpublished data. The calibration error is the expected "
        "one over all decisions; as served, a need weighs more than its absence, so that 0.5 is the best decision "
        f"for F1, and a score is a little higher than the frequency.\n\n{render_table(columns, rows)}"
    )


def _describe_labels(evaluation: dict, verified: dict, names: list[str]) -> Section:
    columns = {
        "전": evaluation["before"]["at_half"]["f1"],
        "n-gram": evaluation["ngrams"]["at_half"]["f1"],
        "후 (fp32)": verified["fp32"]["f1"],
        "후 (INT8)": verified["int8"]["f1"],
    }
    rows = [
        [name, *(f"{column[i]:.3f}" for column in columns.values()), f"{verified['thresholds'][i]:.2f}"]
        for i, name in enumerate(names)
    ]
    table = render_table(["욕구", *columns, "임계값"], rows)
    return Section("욕구별 F1 (per need, at 0.5)", table, plot_f1(names, columns))


def render_probe_table(probes: list[dict], scores: list[list[float]], labels: list[Label]) -> str:
    """The study's table: need, sentence, a score a need, that of the sentence's own need in bold."""
    header = ["욕구", "입력 문장", *(label.name for label in labels)]
    rows = []
    for probe, row in zip(probes, scores, strict=True):
        cells = [
            f"**{p:.3f}**" if label.name == probe["need"] else f"{p:.3f}" for label, p in zip(labels, row, strict=True)
        ]
        rows.append([probe["need"], _escape(probe["text"]), *cells])
    return render_table(header, rows)


def render_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escape(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _describe_verification(found: dict) -> str:
    rows = [
        ["PyTorch → ONNX fp32, largest logit difference", f"{found['logit_difference']:.1e}"],
        ["fp32 → INT8, decisions that flip", f"{found['flips']:.2%}"],
        ["INT8 file", f"{found['bytes'] / 1e6:.1f} MB"],
        ["tokenizer loads in", f"{found['tokenizer_ms']:g} ms"],
    ]
    if "int8" in found:
        rows.append(["fp32 → INT8, macro-F1", f"{found['fp32']['macro_f1']:.4f} → {found['int8']['macro_f1']:.4f}"])
        rows.append(["texts without a need that were given one", f"{found['neutral_claimed']:.1%}"])
    if "probes" in found:
        probes = found["probes"]
        rows += [
            ["probe sentences with the right need on top", f"{probes['on_top']} of {probes['sentences']}"],
            ["… and at 0.5 or more", f"{probes['trusted']} of {probes['sentences']} (the study: 8 of 10)"],
            ["mean of their other scores", f"{probes['others_mean']:.3f} (the study: 0.272)"],
            ["other scores at 0.5 or more", f"{probes['others_at_half']} of {probes['others']} (the study: 10 of 90)"],
        ]
    return render_table(["", "found"], rows)


def _describe_latency(latency_ms: dict[str, dict[str, float]]) -> Section:
    lengths = list(next(iter(latency_ms.values())))
    rows = [[name, *(f"{values[length]:.1f}" for length in lengths)] for name, values in latency_ms.items()]
    table = render_table(["ms a text (median)", *(f"{length} tokens" for length in lengths)], rows)
    note = "In one run, in turn, one text at a time; `make bench` compares with other engines."
    return Section("CPU 지연 시간 (latency)", f"{note}\n\n{table}", plot_latency(latency_ms))


def describe_answers(probabilities: np.ndarray, test: Examples, names: list[str]) -> Iterator[Section]:
    """What the served model answers to the test split: [B, L] probabilities in pictures, slices and mistakes."""
    targets = test.targets
    yield Section(
        "정밀도와 재현율 (precision and recall)",
        "Test split, INT8; the dots are at 0.5.",
        plot_precision_recall(names, probabilities, targets),
    )
    yield Section(
        "보정 (calibration)",
        "Test split, INT8, all needs together; the numbers count decisions.",
        plot_calibration(probabilities, targets),
    )
    yield Section(
        "욕구 간 혼동 (confusion between needs)",
        "Of the texts that express the row's need, the share given the column's at 0.5; off the diagonal only texts "
        "that do not express the column's.",
        plot_confusion(names, confuse(probabilities, targets)),
    )
    yield Section("출처별, 길이별 (slices)", _describe_slices(probabilities, test))
    yield Section("틀린 예 (what it gets wrong)", _describe_mistakes(probabilities, test, names))


def _describe_slices(probabilities: np.ndarray, test: Examples) -> str:
    sources, lengths = np.array(test.sources), np.array([len(text) for text in test.texts])
    slices = {source or "(no source)": sources == source for source in sorted(set(test.sources))}
    if uneventful := find_uneventful(test):
        slices["mostly without a need, together"] = np.isin(np.arange(len(test)), uneventful)
    for start, end in zip(LENGTHS, [*LENGTHS[1:], None], strict=True):
        name = f"{start} to {end - 1} characters" if end else f"{start} characters and more"
        slices[name] = (lengths >= start) & (lengths < (end or np.inf))
    rows = []
    for name, inside in slices.items():
        if not inside.any():
            continue
        f1 = summarize_scores(probabilities[inside], test.targets[inside])["micro_f1"]
        without = int((~(test.targets[inside] >= HALF).any(1)).sum())
        claimed = f"{share_claimed(probabilities[inside], test.targets[inside]):.0%} of {without}" if without else ""
        rows.append([name, str(inside.sum()), f"{f1:.3f}", claimed])
    return render_table(["slice", "texts", "micro-F1 (0.5)", "of those without a need, given one"], rows)


def _describe_mistakes(probabilities: np.ndarray, test: Examples, names: list[str]) -> str:
    wrong = (probabilities >= HALF) != (test.targets >= HALF)  # [B, L]
    severity = (wrong * np.abs(probabilities - test.targets)).sum(1)
    rows = []
    for i in np.argsort(-severity)[:WRONG_TEXTS]:
        said = [f"{name} {p:.2f}" for name, p in zip(names, probabilities[i], strict=True) if p >= HALF]
        meant = [name for name, target in zip(names, test.targets[i], strict=True) if target >= HALF]
        text = test.texts[i] if len(test.texts[i]) <= 120 else test.texts[i][:119] + "…"
        rows.append([_escape(text), ", ".join(meant) or "–", ", ".join(said) or "–"])
    right = f"{(~wrong.any(1)).mean():.0%} of the test texts get exactly their needs; these are furthest off."
    return f"{right}\n\n{render_table(['text', 'expressed', 'claimed'], rows)}"


def describe_making(metrics: dict) -> Iterator[Section]:
    """How the model was made: candidates, recipes, nodes, resources, limits."""
    if candidates := metrics.get("candidates"):
        yield _describe_candidates(candidates)
    yield _describe_recipes(metrics["quantization"])
    exported = metrics["export"]
    fused = ", ".join(f"{kind} {count}" for kind, count in exported["fused_nodes"].items())
    counts = f"{exported['nodes'][PLAIN]} nodes as exported, {exported['nodes'][FP32]} after fusion ({fused})."
    yield Section("그래프 (graph)", counts)
    if "training" in metrics:
        yield Section("학습 자원 (training)", _describe_resources(metrics["training"]["resources"]))
    yield Section(
        "쓰지 말아야 할 곳 (not for)",
        "Diagnosis, judging a person, or decisions about one: it scores what a text says, and it errs as the tables "
        "show. It knows texts like those that it learned from (the project's sample data are synthetic, by a small "
        "group of writers); other languages and quoted speech of others are not what it was made for.",
    )


def _describe_candidates(found: dict) -> Section:
    rows = [
        [one["name"], f"{one['parameters']:,}", f"{one['macro_f1']:.4f}", f"{one['calibration_error']:.4f}"]
        for one in found["candidates"]
    ]
    rule = f"Released: **{found['chosen']}**, the smallest within {found['margin']:.3f} of the best."
    table = render_table(["candidate", "parameters", "macro-F1 (validation)", "calibration error"], rows)
    return Section("후보 (candidates)", f"{rule}\n\n{table}")


def _describe_recipes(quantized: dict) -> Section:
    rows = [
        [
            f"**{row['recipe']}**" if row["recipe"] == quantized["recipe"] else row["recipe"],
            f"{row['drift']:.5f}",
            f"{row['flips']:.2%}",
            f"{row['macro_f1']:.4f}" if "macro_f1" in row else "",
            f"{min(row['f1']):.3f}" if "f1" in row else "",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['milliseconds']:.2f}",
        ]
        for row in quantized["searched"]
    ]
    header = ["recipe", "drift", "flips", "macro-F1", "lowest F1 of a need", "MB", "ms a text"]
    rule = (
        "On the validation split. Drift is the mean difference of probabilities from fp32; released is, of the "
        "recipes that are small and fast enough, the smallest that hardly drifts more than the least."
    )
    return Section("INT8 방식 (recipes)", f"{rule}\n\n{render_table(header, rows)}")


def _describe_resources(resources: dict) -> str:
    rows = [
        ["wall time", f"{resources['wall_seconds'] / 60:.1f} min"],
        ["CPU time", f"{resources['cpu_seconds'] / 60:.1f} min"],
        ["peak memory", f"{resources['peak_memory_bytes'] / 1e9:.2f} GB"],
        ["trainable / total parameters", f"{resources['trainable_parameters']:,} / {resources['total_parameters']:,}"],
    ]
    return render_table(["", "used"], rows)


def main() -> None:
    """Gather a release's files and print the report."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--onnx", type=Path, default=Path(".local/build/onnx"))
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    parser.add_argument("--output", type=Path, default=Path(".local/build/release"))
    args = parser.parse_args()
    checkpoint = Path(read_json(args.onnx / "export.json")["checkpoint"])
    notes = {name: checkpoint / f"{name}.json" for name in ("training", "evaluation", "candidates")}
    notes |= {name: args.onnx / f"{name}.json" for name in ("quantization", "verification")}
    print(write_release(args.onnx, args.output, read_dataset(args.data), notes))


if __name__ == "__main__":
    main()
