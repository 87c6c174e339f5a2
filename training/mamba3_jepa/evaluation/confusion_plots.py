"""PNG plots of phase 3: scores of each kind of confusion, ROC, reliability, and what injected knowledge does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mamba3_jepa.config import NO_FLOOR
from mamba3_jepa.evaluation.confusion import Bin, ConfusionReport
from mamba3_jepa.evaluation.injection import InjectionReport, Rates
from mamba3_jepa.evaluation.memory_floor import MemoryFloor
from mamba3_jepa.evaluation.plots import AMBER, BLUE, BROWN, GREEN, GREY, INK, ORANGE, PURPLE, SKY, save_figure
from mamba3_jepa.evaluation.selective import SelectiveReport

_COLORS = {
    "clear": BLUE,
    "mismatched": ORANGE,
    "unanswerable": PURPLE,
    "corrupted": GREEN,
    "imageless": SKY,
    "foreign": AMBER,
    "wrong_answer": BROWN,
    "given": INK,
    "given_clear": GREY,
}
_LABELS = {"given": "labelled confused", "given_clear": "labelled not confused", "wrong_answer": "wrong answer"}
_FAINT = "#57606a"
_HISTOGRAM_BINS = 40


def plot_confusion(report: ConfusionReport, folder: Path) -> list[Path]:
    """confusion_histograms.png, confusion_roc.png and confusion_reliability.png, as far as there is data for them.

    Raises:
        UserError: a picture cannot be written.
    """
    written = [_histograms(report, folder / "confusion_histograms.png")]
    if report.rocs:
        written.append(_roc(report, folder / "confusion_roc.png"))
    if report.ece is not None:
        written.append(_reliability(report, folder / "confusion_reliability.png"))
    return written


def plot_injection(report: InjectionReport, folder: Path) -> Path:
    """injection.png: right answers before, after the right and after the wrong knowledge.

    Raises:
        UserError: the picture cannot be written.
    """
    groups: dict[str, Rates] = {"retrieved": report.retrieved}
    if report.generated is not None:
        groups["generated"] = report.generated
    if len(report.by_kind) > 1:
        groups |= {f"retrieved,\n{_name(kind)}": rates for kind, rates in report.by_kind.items()}
    figure, (axes,) = _figure(1, (2.6 + 1.5 * len(groups), 4.2))
    _title(axes, f"Right answers to {report.n_samples:,} confused samples", "", "share right")
    wrong = "wrong knowledge"
    if report.n_without_wrong:
        wrong += f" ({report.n_samples - report.n_without_wrong:,} samples)"
    series = (("before", "before", GREY), ("after", "right knowledge", GREEN), ("wrong", wrong, ORANGE))
    for number, (when, label, color) in enumerate(series):
        for place, rates in enumerate(groups.values()):
            value = getattr(rates, when)
            if value is None:
                continue
            x = place + (number - 1) * 0.26
            axes.bar(x, value, width=0.24, color=color, label=label if place == 0 else None)
            axes.annotate(f"{value:.2f}", (x, value), ha="center", va="bottom", fontsize=8, color=INK)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False, labelcolor=INK)
    return save_figure(figure, folder / "injection.png")


def plot_risk_coverage(reports: Mapping[str, SelectiveReport], folder: Path) -> Path:
    """confusion_risk_coverage.png: how many answers are wrong if only the surest are given, by each score, and by none.

    Args:
        reports: of the monitor ("") and of the plain confidence ("_confidence").

    Raises:
        UserError: the picture cannot be written.
    """
    figure, (axes,) = _figure(1, (6.4, 4.4))
    first = next(iter(reports.values()))
    _title(
        axes, f"Wrong among the surest of {len(first.risk):,} answers", "share of answers given", "share of them wrong"
    )
    looks = {"": ("confusion", BLUE, "-"), "_confidence": ("plain confidence", ORANGE, "--")}
    for name, report in reports.items():
        label, color, style = looks[name]
        coverage = np.arange(1, len(report.risk) + 1) / len(report.risk)
        axes.plot(coverage, report.risk.numpy(), style, color=color, label=f"{label}, area {report.aurc:.4f}")
    chance = 1 - first.accuracy
    axes.axhline(chance, color=GREY, linestyle=":", label=f"chance, area {chance:.4f}")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False, labelcolor=INK)
    return save_figure(figure, folder / "confusion_risk_coverage.png")


def plot_memory_floor(floor: MemoryFloor, folder: Path) -> Path:
    """memory_floor.png: cosines of the memory's nearest text, where that is the right one and where it cannot be.

    Raises:
        UserError: the picture cannot be written.
    """
    rows = (
        ("nearest text, where it is the right one", floor.right, GREEN),
        ("nearest text, where the right one is not in the memory", floor.wrong, ORANGE),
    )
    figure, panels = _figure(len(rows), (6.4, 3.6), columns=1)
    lowest = min([float(cosines.min()) for _, cosines, _ in rows if len(cosines)], default=0.0)
    edges = np.linspace(min(lowest, 0.0), 1, _HISTOGRAM_BINS + 1)
    for axes, (label, cosines, color) in zip(panels, rows, strict=True):
        weights = np.full(len(cosines), 1 / max(1, len(cosines)))
        axes.hist(cosines.numpy(), bins=edges.tolist(), weights=weights, color=color)
        if floor.floor > NO_FLOOR:
            axes.axvline(floor.floor, color=INK, linewidth=1.0, linestyle="--")
        axes.set_title(f"{label}   ({len(cosines):,})", loc="left", fontsize=9, color=INK)
        axes.set_xlim(edges[0], 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_xticklabels([])
    shown = f"dashed: the floor, {floor.floor:.2f}" if floor.floor > NO_FLOOR else "no floor"
    panels[-1].set_xlabel(f"cosine to the predicted embedding; {shown}", fontsize=9, color=_FAINT)
    figure.suptitle("What a memory finds", x=0.02, ha="left", fontsize=11, fontweight="bold", color=INK)
    return save_figure(figure, folder / "memory_floor.png")


def _histograms(report: ConfusionReport, path: Path) -> Path:
    """One row for each kind, on one scale, with the threshold across all."""
    kinds = [kind for kind in _COLORS if kind in report.scores]
    figure, rows = _figure(len(kinds), (6.4, 0.9 + 1.25 * len(kinds)), columns=1)
    edges = np.linspace(0, 1, _HISTOGRAM_BINS + 1)
    threshold = report.calibration.threshold
    for axes, kind in zip(rows, kinds, strict=True):
        scores = report.scores[kind].numpy()
        axes.hist(scores, bins=edges.tolist(), weights=np.full(len(scores), 1 / len(scores)), color=_COLORS[kind])
        axes.axvline(threshold, color=INK, linewidth=1.0, linestyle="--")
        axes.set_title(f"{_name(kind)}   ({len(scores):,})", loc="left", fontsize=9, color=INK)
        axes.set_xlim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if axes is not rows[-1]:
            axes.set_xticklabels([])
    rows[-1].set_xlabel(f"P(confused); dashed: the threshold, {threshold:.2f}", fontsize=9, color=_FAINT)
    figure.suptitle("Confusion scores by kind", x=0.02, ha="left", fontsize=11, fontweight="bold", color=INK)
    return save_figure(figure, path)


def _roc(report: ConfusionReport, path: Path) -> Path:
    figure, (axes,) = _figure(1, (5.4, 5.2))
    _title(axes, "Confused against clear samples", "clear samples taken for confused", "confused samples noticed")
    axes.plot([0, 1], [0, 1], color="#c9ced6", linewidth=1.0)
    for kind, curve in report.rocs.items():
        label = f"{_name(kind)}   AUROC {curve.auroc:.3f}"
        axes.plot(
            curve.false_positive.numpy(), curve.true_positive.numpy(),
            color=_COLORS.get(kind, GREY), linewidth=1.8, label=label,
        )  # fmt: skip
    _square(axes)
    axes.legend(loc="lower right", fontsize=9, frameon=False, labelcolor=INK)
    return save_figure(figure, path)


def _reliability(report: ConfusionReport, path: Path) -> Path:
    figure, panels = _figure(2, (9.6, 5.0))
    series: Sequence[tuple[str, list[Bin], float | None]] = (
        ("As trained", report.reliability_uncalibrated, report.ece_uncalibrated),
        (f"Temperature {report.calibration.temperature:.2f}", report.reliability, report.ece),
    )
    for axes, (title, bins, error) in zip(panels, series, strict=True):
        _title(axes, f"{title}: calibration error {error:.3f}", "P(confused)", "share confused")
        axes.plot([0, 1], [0, 1], color="#c9ced6", linewidth=1.0)
        total = sum(each.count for each in bins)
        scores, shares = [each.score for each in bins], [each.confused for each in bins]
        axes.plot(scores, shares, color=BLUE, linewidth=1.2)
        axes.scatter(scores, shares, s=[20 + 400 * each.count / total for each in bins], color=BLUE, alpha=0.75)
        _square(axes)
    panels[0].annotate("size: samples in the bin", (0.03, 0.95), fontsize=8, color=_FAINT)
    return save_figure(figure, path)


def _figure(n_panels: int, size: tuple[float, float], columns: int | None = None) -> tuple[Figure, list[Axes]]:
    columns = columns or n_panels
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = []
    for number in range(n_panels):
        axes = figure.add_subplot(-(-n_panels // columns), columns, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b8bec6")
        axes.tick_params(colors=_FAINT, labelsize=9)
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
        panels.append(axes)
    return figure, panels


def _title(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, fontsize=9, color=_FAINT)
    axes.set_ylabel(ylabel, fontsize=9, color=_FAINT)


def _square(axes: Axes) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")


def _name(kind: str) -> str:
    return _LABELS.get(kind, kind)
