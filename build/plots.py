"""Plots: probabilities, targets and latencies in, SVG pictures out, with Korean as outlines that need no font.

B texts, L labels. matplotlib draws (https://matplotlib.org); NanumGothic (SIL Open
Font License) comes from the package koreanize-matplotlib.
"""

import io
from importlib.metadata import distribution

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve

from training.metrics import HALF

mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "needs", "font.family": "NanumGothic", "font.size": 10})
mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.unicode_minus": False})
# found, not imported: its import needs setuptools
_FONTS = distribution("koreanize-matplotlib").locate_file("koreanize_matplotlib/fonts")
font_manager.fontManager.addfont(str(_FONTS / "NanumGothic.ttf"))

BINS = 10
FEWEST = 5
"""Decisions in a bin below which its share says nothing."""


def plot_f1(names: list[str], columns: dict[str, list[float]]) -> str:
    """Bars of each label's F1, a colour a model."""
    figure, axes = _figure(10, 3.6)
    width = 0.8 / len(columns)
    for i, (model, values) in enumerate(columns.items()):
        axes.bar(np.arange(len(names)) + (i - (len(columns) - 1) / 2) * width, values, width, label=model)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylim=(0, 1), ylabel="F1 (0.5)")
    axes.legend(ncols=len(columns), loc="upper center", bbox_to_anchor=(0.5, 1.15), frameon=False)
    return _to_svg(figure)


def plot_precision_recall(names: list[str], probabilities: np.ndarray, targets: np.ndarray) -> str:
    """A curve a label from [B, L] probabilities and targets, its point at 0.5 marked."""
    figure, axes = _figure(7, 5)
    for name, p, target in zip(names, probabilities.T, targets.T >= HALF, strict=True):
        if not target.any():
            continue
        precision, recall, _ = precision_recall_curve(target, p)
        (line,) = axes.plot(recall, precision, label=name, linewidth=1.2)
        claimed = p >= HALF
        hits = (claimed & target).sum()
        if claimed.any():
            axes.plot(hits / target.sum(), hits / claimed.sum(), "o", color=line.get_color())
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="재현율 (recall)", ylabel="정밀도 (precision)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _to_svg(figure)


def plot_calibration(probabilities: np.ndarray, targets: np.ndarray) -> str:
    """The share of decisions that are true, by probability, over all labels."""
    figure, axes = _figure(5, 4)
    p, there = probabilities.ravel(), targets.ravel() >= HALF
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    kept = [i for i in range(BINS) if (bins == i).sum() >= FEWEST]
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
    means, shares = ([float(values[bins == i].mean()) for i in kept] for values in (p, there))
    axes.plot(means, shares, "o-")
    for i, x, y in zip(kept, means, shares, strict=True):
        axes.annotate(f"{(bins == i).sum()}", (x, y), textcoords="offset points", xytext=(4, -11), fontsize=7)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="점수 (score)", ylabel="실제 비율 (share that is true)")
    return _to_svg(figure)


def plot_confusion(names: list[str], confusion: np.ndarray) -> str:
    """[L, L] shares: of the texts that express a row's need, how many were given the column's."""
    figure, axes = _figure(6.4, 5.4)
    axes.imshow(confusion, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(confusion):
        for j, share in enumerate(row):
            axes.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=7, color="w" if share > HALF else "k")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="모델이 읽은 욕구 (claimed)", ylabel="표현된 욕구 (expressed)")
    return _to_svg(figure)


def plot_latency(latency_ms: dict[str, dict[str, float]]) -> str:
    """Median milliseconds by tokens, a line an engine."""
    figure, axes = _figure(6, 3.6)
    for name, by_length in latency_ms.items():
        axes.plot([int(length) for length in by_length], list(by_length.values()), "o-", label=name)
    lengths = [int(length) for length in next(iter(latency_ms.values()))]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, map(str, lengths))
    axes.set(xlabel="토큰 (tokens)", ylabel="ms", ylim=(0, None))
    axes.legend(frameon=False)
    return _to_svg(figure)


def _figure(width: float, height: float) -> tuple:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=False)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
