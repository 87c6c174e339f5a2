"""What all figures share: panels in one style, legends where no line is, labels that fit, and how they are written."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mamba3_jepa.evaluation.palette import EDGE, FAINT, GRID, INK
from mamba3_jepa.files.whole_file import whole_file

_LONGEST = 28  # letters of a label


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def add_panel(figure: Figure, rows: int = 1, columns: int = 1, number: int = 1) -> Axes:
    """Panel `number`, from 1, of so many rows and columns."""
    axes = figure.add_subplot(rows, columns, number)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(EDGE)
    axes.tick_params(colors=FAINT, labelsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def set_title(axes: Axes, title: str, xlabel: str = "", ylabel: str = "") -> None:
    """A panel's title and the names of its axes."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, fontsize=9, color=FAINT)
    axes.set_ylabel(ylabel, fontsize=9, color=FAINT)


def legend_beside(axes: Axes) -> None:
    """A legend of what has a label, to the right of the panel, where no line runs below it."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, fontsize=9, frameon=False, labelcolor=INK,
            handlelength=1.6,
        )  # fmt: skip


def shortened(label: str, at_most: int = _LONGEST) -> str:
    """The label, or its beginning with an ellipsis."""
    return label if len(label) <= at_most else label[: at_most - 1].rstrip() + "…"


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG through `whole_file`.

    Raises:
        UserError: the file cannot be written.
    """
    with whole_file(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return path
