"""The report: what training, evaluation and verification found in, the release's folder out.

`report.md` holds the published study's own tables in their own shape, ours
beside them; `report.html` is the same page; `metrics.json` has every figure;
README.md is the model card.

    python -m build.report --onnx .local/build/onnx --output .local/build/release
"""

import argparse
import html
import shutil
from pathlib import Path

from markdown_it import MarkdownIt

from build.quantize import INT8
from training.examples import Dataset, Label, read_dataset
from training.files import read_json, replace_folder, write_json

STUDY = {"before": (0.3176, 0.1727), "after": (0.8302, 0.8267)}
"""Micro and macro F1 as the published study gives them, on its own unpublished data."""
PAGE = """<!doctype html>
<html lang="ko"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.6 system-ui, "Noto Sans KR", sans-serif }}
body {{ max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }}
td, th {{ border: 1px solid #8886; padding: .2rem .5rem; text-align: left }}
</style>
{body}</html>
"""


def write_release(folder: Path, output: Path, dataset: Dataset, notes: dict[str, Path]) -> str:
    """Fill the folder `output` with all released files but the manifest; returns report.md's text.

    `notes` names evaluation.json, verification.json and training.json where
    there are any: a checkpoint of one's own comes without training.
    """
    metrics = {name: read_json(path) for name, path in notes.items() if path.exists()}
    metrics["export"] = read_json(folder / "export.json")
    report = render_report(metrics, dataset)
    with replace_folder(output) as new:
        shutil.copyfile(folder / INT8, new / INT8)
        shutil.copyfile(folder / "tokenizer.json", new / "tokenizer.json")
        write_json(new / "metrics.json", metrics)
        (new / "report.md").write_text(report, "utf-8")
        body = MarkdownIt("commonmark", {"html": False}).enable("table").render(report)
        (new / "report.html").write_text(PAGE.format(title="심리적 욕구 분류기", body=body), "utf-8")
        (new / "README.md").write_text(render_card(metrics), "utf-8")
    return report


def render_report(metrics: dict, dataset: Dataset) -> str:
    """report.md: sections for what is known, in the order in which a reader asks."""
    labels = [Label(**label) for label in metrics["export"]["labels"]]
    sections = ["# 심리적 욕구 분류기: 보고서 (release report)"]
    if "evaluation" in metrics:
        sections += [_render_f1(metrics), _render_labels(metrics, labels)]
        for title, scores in (
            ("파인튜닝 전 (before fine-tuning)", metrics["evaluation"]["before"].get("probe_scores")),
            ("파인튜닝 후, INT8 (after fine-tuning, as served)", metrics["verification"].get("probe_scores")),
        ):
            if scores:
                sections.append(f"## {title}\n\n" + render_probe_table(dataset.probes, scores, labels))
    sections.append(_render_verification(metrics["verification"]))
    if "training" in metrics:
        sections.append(_render_resources(metrics["training"]["resources"]))
    return "\n\n".join(sections) + "\n"


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


def _render_f1(metrics: dict) -> str:
    evaluation, verification = metrics["evaluation"], metrics["verification"]
    part = evaluation["trained_texts"], evaluation["all_texts"]
    trained = f"{part[0]:,} of {part[1]:,} training texts" if part[0] < part[1] else f"all {part[1]:,} training texts"

    def row(name: str, at_half: dict, at_thresholds: dict | None) -> list[str]:
        rest = f"{at_thresholds['macro_f1']:.4f}" if at_thresholds else ""
        return [name, f"{at_half['micro_f1']:.4f}", f"{at_half['macro_f1']:.4f}", rest]

    def evaluated(name: str, key: str) -> list[str]:
        return row(name, evaluation[key]["at_half"], evaluation[key]["at_thresholds"])

    rows = [
        evaluated("파인튜닝 전 (before)", "before"),
        evaluated("문자 n-gram (character n-grams)", "ngrams"),
        evaluated("파인튜닝 후, PyTorch (after)", "after"),
        row("파인튜닝 후, INT8 (as served)", verification["int8"], verification["int8_at_thresholds"]),
    ]
    for name, key in (
        ("공개 연구: 파인튜닝 전 (the study, before)", "before"),
        ("공개 연구: 파인튜닝 후 (the study, after)", "after"),
    ):
        micro, macro = STUDY[key]
        rows.append([name, f"{micro:.4f}", f"{macro:.4f}", ""])
    table = render_table(["", "micro-F1 (0.5)", "macro-F1 (0.5)", "macro-F1 (thresholds)"], rows)
    return (
        f"## F1\n\nTrained on {trained}; test split of {evaluation['test_texts']} texts; thresholds chosen on the "
        f"validation split. The study's figures are its own, on its own unpublished data.\n\n{table}"
    )


def _render_labels(metrics: dict, labels: list[Label]) -> str:
    evaluation, verification = metrics["evaluation"], metrics["verification"]
    columns = [evaluation["before"]["at_half"], evaluation["ngrams"]["at_half"], verification["int8"]]
    rows = [
        [label.name, *(f"{column['f1'][i]:.3f}" for column in columns), f"{verification['thresholds'][i]:.2f}"]
        for i, label in enumerate(labels)
    ]
    return "## 욕구별 F1 (per need, at 0.5)\n\n" + render_table(["욕구", "전", "n-gram", "후 (INT8)", "임계값"], rows)


def _render_verification(found: dict) -> str:
    rows = [
        ["PyTorch → ONNX fp32, largest logit difference", f"{found['logit_difference']:.1e}"],
        ["fp32 → INT8, decisions that flip", f"{found['flips']:.2%}"],
        ["INT8 file", f"{found['bytes'] / 1e6:.1f} MB"],
        ["fused nodes", ", ".join(f"{kind} {count}" for kind, count in found["fused_nodes"].items())],
        ["median latency of a text, fp32 / INT8", "{fp32:.1f} / {int8:.1f} ms".format(**found["latency_ms"])],
    ]
    if "probes" in found:
        probes = found["probes"]
        rows += [
            ["probe sentences with the right need on top", f"{probes['on_top']} of {probes['sentences']}"],
            ["… and at 0.5 or more", f"{probes['trusted']} of {probes['sentences']} (the study: 8 of 10)"],
            ["mean of their other scores", f"{probes['others_mean']:.3f} (the study: 0.272)"],
            ["other scores at 0.5 or more", f"{probes['others_at_half']} of {probes['others']} (the study: 10 of 90)"],
        ]
    return "## 검증 (verification)\n\n" + render_table(["", "found"], rows)


def _render_resources(resources: dict) -> str:
    rows = [
        ["wall time", f"{resources['wall_seconds'] / 60:.1f} min"],
        ["CPU time", f"{resources['cpu_seconds'] / 60:.1f} min"],
        ["peak memory", f"{resources['peak_memory_bytes'] / 1e9:.2f} GB"],
        ["trainable / total parameters", f"{resources['trainable_parameters']:,} / {resources['total_parameters']:,}"],
    ]
    return "## 학습 자원 (training)\n\n" + render_table(["", "used"], rows)


def render_card(metrics: dict) -> str:
    """The model card, with the metadata that a model hub reads."""
    made = metrics["export"]
    names = ", ".join(label["name"] for label in made["labels"])
    base = made["provenance"].get("base", "unknown")
    return (
        "---\nlanguage: ko\nlibrary_name: onnx\npipeline_tag: text-classification\n"
        "tags: [multi-label, psychological-needs, int8]\n---\n\n"
        f"# Psychological needs in a Korean text\n\nScores from 0 to 1 for {names}, one independent sigmoid each. "
        f"Base: {base}; INT8 ONNX; one text of up to {made['max_tokens']} tokens a run, unpadded, "
        f"with the prefix {made['prefix']!r}. `report.md` has the figures.\n\n"
        "**Not for** diagnosis, for judging a person, or for decisions about one: it scores what a text says, "
        f"learned from synthetic texts, and it errs{_render_macro_f1(metrics)}.\n"
    )


def _render_macro_f1(metrics: dict) -> str:
    scores = metrics["verification"].get("int8")
    return f" (macro-F1 {scores['macro_f1']:.2f} on its test split)" if scores else ""


def main() -> None:
    """Gather a release's files and print the report."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--onnx", type=Path, default=Path(".local/build/onnx"))
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    parser.add_argument("--output", type=Path, default=Path(".local/build/release"))
    args = parser.parse_args()
    checkpoint = Path(read_json(args.onnx / "export.json")["checkpoint"])
    notes = {name: checkpoint / f"{name}.json" for name in ("training", "evaluation")}
    notes["verification"] = args.onnx / "verification.json"
    print(write_release(args.onnx, args.output, read_dataset(args.data), notes))


if __name__ == "__main__":
    main()
