"""Bar chart of the answers, by question type."""

from __future__ import annotations

from pathlib import Path

from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from mamba3_jepa.evaluation.answer_metrics import ByType
from mamba3_jepa.evaluation.figure import add_panel, new_figure, save_figure, set_title, shortened
from mamba3_jepa.evaluation.palette import EDGE, FAINT, GENERATED, INK, NEAREST

_MAX_TYPES = 20


def plot_answers_by_type(path: str | Path, *, generated: ByType | None = None, nearest: ByType | None = None) -> Path:
    """Draw a bar for each question type and way to answer, the most frequent types on top, as the PNG `path`.

    Types and their numbers of questions are those of `generated`, if it is given; where a type is missing in `nearest`,
    its bar and the total's are left out there. Beyond the twenty most frequent types, the rest become one bar.

    Raises:
        ValueError: no type at all.
        UserError: the file cannot be written.
    """
    by_type = generated if generated is not None else nearest
    if not by_type:
        raise ValueError("there is no question type to draw")
    ranked = sorted(by_type, key=lambda kind: (-by_type[kind][1], kind))
    frequent, rare = (ranked, []) if len(ranked) <= _MAX_TYPES else (ranked[: _MAX_TYPES - 1], ranked[_MAX_TYPES - 1 :])
    groups = [(shortened(kind), [kind]) for kind in frequent] + ([(f"{len(rare)} rarer types", rare)] if rare else [])
    groups.append(("all questions", ranked))
    ways = (("generated", generated, GENERATED), ("nearest answer", nearest, NEAREST))
    series = [(label, shares, color) for label, shares, color in ways if shares is not None]

    thickness, inches = (0.5, 0.42) if len(series) == 1 else (0.36, 0.6)  # of a bar in rows; per row
    figure = new_figure(8.4, 1.5 + inches * len(groups))
    axes = add_panel(figure)
    for number, (_, shares, color) in enumerate(series):
        offset = (number - (len(series) - 1) / 2) * thickness
        for row, (_, kinds) in enumerate(groups):
            share = _pooled(shares, kinds)
            if share is not None:
                axes.barh(row + offset, share, height=0.8 * thickness, color=color)
                axes.text(share + 0.012, row + offset, f"{share:.1%}", va="center", fontsize=8.5, color=INK)
    counts = [f"{sum(by_type[kind][1] for kind in kinds):,}" for _, kinds in groups]
    for row, count in enumerate(counts):
        axes.annotate(count, (0, row), (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=9,
                      color=FAINT)  # fmt: skip
    axes.set_yticks(range(len(groups)), [label for label, _ in groups])
    axes.axhline(len(groups) - 1.5, color=EDGE, linewidth=0.8)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1.14)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    set_title(axes, "Answers by question type", "answered right   (beside each type: its number of questions)")
    axes.tick_params(length=0)
    axes.tick_params(axis="y", pad=14 + 6.5 * max(map(len, counts)))  # room for the counts
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    handles = [Patch(color=color, label=label) for label, _, color in series]
    figure.legend(handles=handles, loc="outside lower center", fontsize=9, frameon=False, ncols=2, labelcolor=INK)
    return save_figure(figure, Path(path))


def _pooled(shares: ByType, kinds: list[str]) -> float | None:
    """The share right over the questions of several types; None unless all of them are known."""
    if any(kind not in shares for kind in kinds):
        return None
    questions = sum(shares[kind][1] for kind in kinds)
    return sum(shares[kind][0] * shares[kind][1] for kind in kinds) / questions
