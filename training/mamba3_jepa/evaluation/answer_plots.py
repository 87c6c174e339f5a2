"""Bar chart of the answers, by question type."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from mamba3_jepa.evaluation.answer_metrics import ByType
from mamba3_jepa.evaluation.plots import BLUE, INK, ORANGE, save_figure

_MAX_TYPES = 20
_FAINT = "#57606a"


def plot_answers_by_type(
    by_type: ByType,
    path: str | Path,
    *,
    label: str = "generated",
    other: ByType | None = None,
    other_label: str = "nearest known answer",
    title: str = "Answers by question type",
) -> Path:
    """Draw a bar for each question type, the most frequent ones on top, as the PNG `path`.

    Args:
        by_type: for each type its share of right answers in [0, 1] and its number of questions, as
            `AnswerMetrics.by_type` has it. Beyond the twenty most frequent types, the rest become one bar.
        label: how these answers came about.
        other: the same of another way to answer the same questions, as a second bar; where a type is
            missing, its bar and the total's are left out.

    Raises:
        ValueError: no type at all.
        UserError: the file cannot be written.
    """
    if not by_type:
        raise ValueError("there is no question type to draw")
    ranked = sorted(by_type, key=lambda kind: (-by_type[kind][1], kind))
    frequent, rare = (ranked, []) if len(ranked) <= _MAX_TYPES else (ranked[: _MAX_TYPES - 1], ranked[_MAX_TYPES - 1 :])
    groups = [(kind, [kind]) for kind in frequent] + ([(f"{len(rare)} rarer types", rare)] if rare else [])
    groups.append(("all questions", ranked))
    series = [(label, by_type, BLUE)] + ([] if other is None else [(other_label, other, ORANGE)])

    thickness, inches = (0.5, 0.42) if other is None else (0.36, 0.6)  # of a bar in rows; per row
    figure = Figure(figsize=(7.6, 1.3 + inches * len(groups)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (_, shares, color) in enumerate(series):
        offset = (number - (len(series) - 1) / 2) * thickness
        for row, (_, kinds) in enumerate(groups):
            share = _pooled(shares, kinds)
            if share is not None:
                axes.barh(row + offset, share, height=0.8 * thickness, color=color)
                axes.text(share + 0.012, row + offset, f"{share:.1%}", va="center", fontsize=8.5, color=INK)
    counts = [sum(by_type[kind][1] for kind in kinds) for _, kinds in groups]
    axes.set_yticks(
        range(len(groups)), [f"{kind}   {count:,}" for (kind, _), count in zip(groups, counts, strict=True)]
    )
    axes.axhline(len(groups) - 1.5, color="#b8bec6", linewidth=0.8)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("answered right   (beside each type: its number of questions)", fontsize=9, color=_FAINT)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.tick_params(colors=_FAINT, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    if len(series) > 1:
        handles = [Patch(color=color, label=name) for name, _, color in series]
        figure.legend(handles=handles, loc="outside upper right", fontsize=9, frameon=False, ncols=2, labelcolor=INK)
    return save_figure(figure, Path(path))


def _pooled(shares: ByType, kinds: list[str]) -> float | None:
    """The share right over the questions of several types; None unless all of them are known."""
    if any(kind not in shares for kind in kinds):
        return None
    questions = sum(shares[kind][1] for kind in kinds)
    return sum(shares[kind][0] * shares[kind][1] for kind in kinds) / questions
