"""PNG plots of phase 3: scores of each kind of confusion, ROC, reliability, and what injected knowledge does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from mamba3_jepa.config import NO_FLOOR
from mamba3_jepa.evaluation.confusion import Bin, ConfusionReport
from mamba3_jepa.evaluation.episode_recall import EpisodeFloor
from mamba3_jepa.evaluation.figure import add_panel, legend_beside, new_figure, save_figure, set_title
from mamba3_jepa.evaluation.injection import InjectionReport, Rates
from mamba3_jepa.evaluation.memory_floor import MemoryFloor
from mamba3_jepa.evaluation.palette import (
    FAINT,
    GUIDE,
    INK,
    PLAIN_CONFIDENCE,
    REST,
    RIGHT,
    SCORE,
    WRONG,
    confusion_colors,
)
from mamba3_jepa.evaluation.selective import SelectiveReport

_LABELS = {"given": "labelled confused", "given_clear": "labelled not confused", "wrong_answer": "wrong answer"}
_FORMS = {
    "answer": "the answer",
    "sentence": "a sentence",
    "caption": "a caption",
    "passage": "a passage",
    "given": "what is given",
}
_HISTOGRAM_BINS = 40


def plot_confusion(report: ConfusionReport, folder: Path) -> list[Path]:
    """confusion_histograms.png, confusion_roc.png and confusion_reliability.png, as far as there is data for them.

    Raises:
        UserError: a picture cannot be written.
    """
    written = [_scores(report, folder / "confusion_histograms.png")]
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
    how = "retrieved" if report.generated is None else "generated"
    if len(report.by_form) > 1:
        groups |= {f"{how}, told\n{_FORMS.get(form, form)}": rates for form, rates in report.by_form.items()}
    figure = new_figure(max(7.0, 2.6 + 1.5 * len(groups)), 4.2)
    axes = add_panel(figure)
    set_title(axes, f"Right answers of confused samples, {report.n_samples:,} things told", ylabel="share right")
    wrong = "wrong knowledge"
    if report.n_without_wrong:
        wrong += f" ({report.n_samples - report.n_without_wrong:,})"
    handles = []
    for number, (when, label, color) in enumerate(
        (("before", "before", REST), ("after", "right knowledge", RIGHT), ("wrong", wrong, WRONG))
    ):
        values = [getattr(rates, when) for rates in groups.values()]
        for place, value in enumerate(values):
            if value is not None:
                x = place + (number - 1) * 0.26
                axes.bar(x, value, width=0.24, color=color)
                axes.annotate(f"{value:.1%}", (x, value), ha="center", va="bottom", fontsize=7.5, color=INK)
        if any(value is not None for value in values):
            handles.append(Patch(color=color, label=label))
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False, labelcolor=INK)
    return save_figure(figure, folder / "injection.png")


def plot_risk_coverage(reports: Mapping[str, SelectiveReport], folder: Path) -> Path:
    """confusion_risk_coverage.png: how many answers are wrong if only the surest are given, by each score, and by none.

    Args:
        reports: of the monitor ("") and of the plain confidence ("_confidence").

    Raises:
        UserError: the picture cannot be written.
    """
    first = next(iter(reports.values()))
    figure = new_figure(6.4, 4.4)
    axes = add_panel(figure)
    title = f"Wrong among the surest of {len(first.risk):,} answers"
    set_title(axes, title, "share of answers given", "share of them wrong")
    looks = {"": ("confusion", SCORE, "-"), "_confidence": ("plain confidence", PLAIN_CONFIDENCE, "--")}
    for name, report in reports.items():
        label, color, style = looks[name]
        coverage = np.arange(1, len(report.risk) + 1) / len(report.risk)
        axes.plot(coverage, report.risk.numpy(), style, color=color, label=f"{label}, area {report.aurc:.4f}")
    chance = 1 - first.accuracy
    axes.axhline(chance, color=REST, linestyle=":", label=f"chance, area {chance:.4f}")
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
    rows = [
        ("nearest text, where it is the right one", floor.right, RIGHT),
        ("nearest text, where the right one is not in the memory", floor.wrong, WRONG),
    ]
    lowest = min([float(cosines.min()) for _, cosines, _ in rows if len(cosines)], default=0.0)
    figure, panels = _histograms("What a memory finds", rows, min(lowest, 0.0), floor.floor)
    shown = f"dashed: the floor, {floor.floor:.2f}" if floor.floor > NO_FLOOR else "no floor"
    panels[-1].set_xlabel(f"cosine to the predicted embedding; {shown}", fontsize=9, color=FAINT)
    return save_figure(figure, folder / "memory_floor.png")


def plot_episode_floor(floor: EpisodeFloor, folder: Path) -> Path:
    """episode_floor.png: scores of the memory's best episode, where that is the right one and where it cannot be.

    Raises:
        UserError: the picture cannot be written.
    """
    rows = [
        ("best episode, where it is the right one", floor.right, RIGHT),
        ("best episode, where the right one is not in the memory", floor.wrong, WRONG),
    ]
    lowest = min([float(scores.min()) for _, scores, _ in rows if len(scores)], default=0.0)
    figure, panels = _histograms("Which episodes a memory recalls", rows, min(lowest, 0.0), floor.floor)
    shown = f"score, the states' share {floor.blend:g}; dashed: the floor, {floor.floor:.2f}"
    panels[-1].set_xlabel(shown, fontsize=9, color=FAINT)
    return save_figure(figure, folder / "episode_floor.png")


def _scores(report: ConfusionReport, path: Path) -> Path:
    colors = confusion_colors(report.scores)
    rows = [(_name(kind), report.scores[kind], color) for kind, color in colors.items()]
    threshold = report.calibration.threshold
    figure, panels = _histograms("Confusion scores by kind", rows, 0.0, threshold)
    panels[-1].set_xlabel(f"P(confused); dashed: the threshold, {threshold:.2f}", fontsize=9, color=FAINT)
    return save_figure(figure, path)


def _histograms(
    title: str, rows: Sequence[tuple[str, Tensor, str]], lowest: float, limit: float
) -> tuple[Figure, list[Axes]]:
    """A row for each label, its values and its colour, all on the same two scales, with a limit across them; values
    reach from `lowest` to 1."""
    figure = new_figure(6.6, 0.9 + 1.3 * len(rows))
    panels = [add_panel(figure, len(rows), 1, number + 1) for number in range(len(rows))]
    edges = np.linspace(lowest, 1, _HISTOGRAM_BINS + 1)
    shares = [np.histogram(values.numpy(), bins=edges)[0] / max(1, len(values)) for _, values, _ in rows]
    highest = max(float(share.max()) for share in shares) or 1.0
    for axes, (label, values, color), share in zip(panels, rows, shares, strict=True):
        axes.stairs(share, edges, fill=True, color=color)
        if limit > NO_FLOOR:
            axes.axvline(limit, color=INK, linewidth=1.0, linestyle="--")
        axes.set_title(f"{label}   ({len(values):,})", loc="left", fontsize=9, color=INK)
        axes.set_xlim(lowest, 1)
        axes.set_ylim(0, 1.08 * highest)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if axes is not panels[-1]:
            axes.set_xticklabels([])
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold", color=INK)
    return figure, panels


def _roc(report: ConfusionReport, path: Path) -> Path:
    figure = new_figure(8.6, 5.2)
    axes = add_panel(figure)
    set_title(axes, "Confused against clear samples", "clear samples taken for confused", "confused samples noticed")
    axes.plot([0, 1], [0, 1], color=GUIDE, linewidth=1.0)
    for kind, color in confusion_colors(report.rocs).items():
        curve = report.rocs[kind]
        label = f"{_name(kind)}   AUROC {curve.auroc:.3f}"
        axes.plot(curve.false_positive.numpy(), curve.true_positive.numpy(), color=color, linewidth=1.8, label=label)
    _square(axes)
    legend_beside(axes)
    return save_figure(figure, path)


def _reliability(report: ConfusionReport, path: Path) -> Path:
    figure = new_figure(9.6, 5.0)
    series: Sequence[tuple[str, list[Bin], float | None]] = (
        ("As trained", report.reliability_uncalibrated, report.ece_uncalibrated),
        (f"Temperature {report.calibration.temperature:.2f}", report.reliability, report.ece),
    )
    for number, (title, bins, error) in enumerate(series):
        axes = add_panel(figure, 1, len(series), number + 1)
        shown = "P(confused)   (size: samples in the bin)"
        set_title(axes, f"{title}: calibration error {error:.3f}", shown, "share confused")
        axes.plot([0, 1], [0, 1], color=GUIDE, linewidth=1.0)
        total = sum(each.count for each in bins)
        scores, shares = [each.score for each in bins], [each.confused for each in bins]
        axes.plot(scores, shares, color=SCORE, linewidth=1.2, zorder=3)
        sizes = [20 + 400 * each.count / total for each in bins]
        axes.scatter(scores, shares, s=sizes, color=SCORE, alpha=0.75, zorder=3, clip_on=False)
        _square(axes)
    return save_figure(figure, path)


def _square(axes: Axes) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")


def _name(kind: str) -> str:
    return _LABELS.get(kind, kind)
