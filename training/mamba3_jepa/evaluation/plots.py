"""PNG plots of a run, from its `metrics.jsonl`: everything that moved during training."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from mamba3_jepa.files.metrics_log import read_metrics
from mamba3_jepa.files.whole_file import whole_file

# Okabe & Ito's palette: distinct for colour-blind readers too.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8f98"
SKY, AMBER, BROWN = "#56B4E9", "#E69F00", "#7a4b2a"
INK = "#24292f"
# Fewer points than this are drawn as they are, more get a smoothed line over a faint one.
_SMOOTH_FROM = 30


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric over a run: equally long arrays, steps strictly increasing."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


Metrics = dict[str, Series]
Panel = Callable[[Axes, Metrics], None]


def plot_training(run_dir: str | Path) -> list[Path]:
    """Draw `run_dir/metrics.jsonl` into `run_dir/plots/*.png`; returns the files written.

    loss (training and validation), answers (exact match, BLEU), retrieval (both directions, answers), embeddings
    (alignment, uniformity, effective rank), optimization (learning rate, temperature, gradient norm, throughput) and
    gates (activity of each layer). What was not logged is left out.

    Raises:
        UserError: the metrics cannot be read, or a picture cannot be written.
    """
    run_dir = Path(run_dir)
    metrics = read_series(run_dir / "metrics.jsonl")
    written = []
    for name, panels in _FIGURES.items():
        present = [panel for keys, panel in panels if any(re.fullmatch(keys, key) for key in metrics)]
        if present:
            written.append(_draw(present, metrics, run_dir / "plots" / f"{name}.png"))
    return written


def read_series(path: str | Path) -> Metrics:
    """Every numeric metric of a `metrics.jsonl` by its key; null is left out.

    Where the steps go backwards a run was resumed: everything at and after that step is forgotten, and of two
    values at one step the later line wins.
    """
    points: dict[str, dict[int, float]] = {}
    last = -1
    for record in read_metrics(path):
        step = record["step"]
        if step < last:
            for values in points.values():
                for stale in [old for old in values if old >= step]:
                    del values[stale]
        last = step
        for key, value in record.items():
            if key not in ("step", "epoch", "time") and isinstance(value, (int, float)):
                points.setdefault(key, {})[step] = float(value)
    return {
        key: Series(steps=np.array(list(values)), values=np.array(list(values.values())))
        for key, values in points.items()
        if values
    }


def _draw(panels: Sequence[Panel], metrics: Metrics, path: Path) -> Path:
    columns = 3 if len(panels) == 3 else min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.7 * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        _style(axes)
        panel(axes, metrics)
        left, right = axes.dataLim.intervalx
        if left == right:  # a single step
            axes.set_xlim(left - 1, left + 1)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG through `whole_file`.

    Raises:
        UserError: the file cannot be written.
    """
    with whole_file(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return path


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b8bec6")
    axes.tick_params(colors="#57606a", labelsize=9)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("optimizer step", fontsize=9, color="#57606a")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _title(axes: Axes, title: str, ylabel: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color="#57606a")


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, fontsize=9, frameon=False, labelcolor=INK)


def _line(axes: Axes, series: Series, color: str, label: str = "", *, noisy: bool = False) -> None:
    """A curve with points while there are few; `noisy` ones are smoothed once there are many."""
    many = len(series) > _SMOOTH_FROM
    values = series.values
    if noisy and many:
        axes.plot(series.steps, values, color=color, linewidth=0.8, alpha=0.25)
        values = _smooth(values)
    marker = "" if many else "o"
    axes.plot(series.steps, values, color=color, label=label, marker=marker, markersize=3.5, linewidth=1.8)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a thirtieth of the points, narrower towards both ends."""
    half = max(1, len(values) // 60)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    reach = np.minimum(np.minimum(positions, len(values) - 1 - positions), half)
    return (sums[positions + reach + 1] - sums[positions - reach]) / (2 * reach + 1)


def _loss(axes: Axes, metrics: Metrics) -> None:
    _title(axes, "Loss", "nats")
    names = sorted({key.split("/", 1)[1] for key in metrics if re.fullmatch(_LOSS_KEYS, key)})
    for name, pair in zip(names, [(BLUE, ORANGE), (GREEN, PURPLE), (GREY, INK)] * len(names), strict=False):
        for part, shown, color in zip(("train", "val"), ("training", "validation"), pair, strict=True):
            if series := metrics.get(f"{part}/{name}"):
                label = shown if name == "loss" else f"{shown} {name.replace('_', ' ')}"
                _line(axes, series, color, label, noisy=part == "train")
    _legend(axes)


def _recall(direction: str, title: str) -> Panel:
    def panel(axes: Axes, metrics: Metrics) -> None:
        _title(axes, title, "recall")
        for k, color in zip((1, 5, 10), (BLUE, GREEN, ORANGE), strict=True):
            if series := metrics.get(f"val/{direction}_r{k}"):
                _line(axes, series, color, f"R@{k}   {series.values[-1]:.3f}")
        axes.set_ylim(-0.02, 1.02)
        _legend(axes)

    return panel


def _accuracy(name: str, title: str, whole: str) -> Panel:
    """The metric `name` and those that begin so, by kind; `whole` is what the former is of."""

    def panel(axes: Axes, metrics: Metrics) -> None:
        _title(axes, title, "accuracy")
        colors = [BLUE, GREEN, ORANGE, PURPLE, GREY]
        keys = [key for key in metrics if key.startswith(name)]
        for number, key in enumerate(keys[:_MAX_CURVES]):
            kind = key.removeprefix(name).strip("_") or whole
            color = colors[number % len(colors)]
            _line(axes, metrics[key], color, f"{kind}   {metrics[key].values[-1]:.3f}")
        axes.set_ylim(-0.02, 1.02)
        _legend(axes)

    return panel


def _generated(axes: Axes, metrics: Metrics) -> None:
    _title(axes, "Generated answers", "exact match")
    colors = [BLUE, INK, GREEN, ORANGE, PURPLE, GREY]
    names = {"val/exact_match": "all questions", "val/caption_exact_match": "captions"}
    keys = [key for key in names if key in metrics]
    keys += sorted(key for key in metrics if re.fullmatch(r"val/exact_match_\w+", key))
    for number, key in enumerate(keys[:_MAX_CURVES]):
        name = names.get(key, key.removeprefix("val/exact_match_").replace("_", " "))
        _line(axes, metrics[key], colors[number % len(colors)], f"{name}   {metrics[key].values[-1]:.3f}")
    axes.set_ylim(-0.02, 1.02)
    _legend(axes)


def _token_accuracy(axes: Axes, metrics: Metrics) -> None:
    _title(axes, "Next token, led by the answer", "share right")
    for part, shown, color in (("train", "training", BLUE), ("val", "validation", ORANGE)):
        if series := metrics.get(f"{part}/token_accuracy"):
            _line(axes, series, color, shown, noisy=part == "train")
    _legend(axes)


def _plane(axes: Axes, metrics: Metrics) -> None:
    """The path of (uniformity, alignment), dark at the end; both are better when lower."""
    _title(axes, "Alignment and uniformity", "alignment   (lower: pairs agree)")
    axes.set_xlabel("uniformity   (lower: space is used)", fontsize=9, color="#57606a")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter("{x:g}")
    across, up = metrics.get("val/uniformity"), metrics.get("val/alignment")
    if across is None or up is None:
        return
    steps, left, right = np.intersect1d(across.steps, up.steps, return_indices=True)
    x, y = across.values[left], up.values[right]
    axes.plot(x, y, color="#c9ced6", linewidth=1.2, zorder=1)
    dots = axes.scatter(x, y, c=steps, cmap="viridis_r", s=26, zorder=2)
    if len(steps) > 1:
        _colorbar(axes, dots, "optimizer step").ax.yaxis.set_major_formatter(EngFormatter(sep=""))


def _rank(axes: Axes, metrics: Metrics) -> None:
    _title(axes, "Effective rank of the embeddings", "directions in use")
    for name, color in (("predicted", BLUE), ("target", ORANGE)):
        if series := metrics.get(f"val/effective_rank_{name}"):
            _line(axes, series, color, name)
    axes.set_ylim(bottom=0)
    _legend(axes)


def _single(
    key: str,
    title: str,
    ylabel: str,
    color: str,
    *,
    noisy: bool = True,
    log: bool = False,
    zero: bool = False,
) -> Panel:
    def panel(axes: Axes, metrics: Metrics) -> None:
        _title(axes, title, ylabel)
        series = metrics[key]
        _line(axes, series, color, noisy=noisy)
        if log and (series.values > 0).all():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        if zero and (series.values > 0).any():
            axes.set_ylim(0, 1.1 * series.values.max())

    return panel


def _gates(axes: Axes, metrics: Metrics) -> None:
    """Heat map, one row for each layer, of training's values or else of validation's."""
    _title(axes, "ANGN gate activity", "layer")
    part = "train" if "train/gate_activity_0" in metrics else "val"
    layers = sorted(int(m[1]) for key in metrics if (m := re.fullmatch(rf"{part}/gate_activity_(\d+)", key)))
    steps = metrics[f"{part}/gate_activity_{layers[0]}"].steps
    grid = np.full((len(layers), len(steps)), np.nan)
    for row, layer in enumerate(layers):
        series = metrics[f"{part}/gate_activity_{layer}"]
        _, left, right = np.intersect1d(steps, series.steps, return_indices=True)
        grid[row, left] = series.values[right]
    mesh = axes.pcolormesh(
        _edges(steps), np.arange(len(layers) + 1) - 0.5, grid, cmap="viridis", vmin=0, vmax=1, rasterized=True
    )
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.grid(visible=False)
    _colorbar(axes, mesh, "mean gate   (0 closed, 1 open)")


def _colorbar(axes: Axes, colored: ScalarMappable, label: str) -> Colorbar:
    assert isinstance(axes.figure, Figure)
    bar = axes.figure.colorbar(colored, ax=axes, pad=0.02)
    bar.set_label(label, fontsize=9, color="#57606a")
    bar.ax.tick_params(colors="#57606a", labelsize=9)
    bar.outline.set_visible(False)
    return bar


def _edges(steps: np.ndarray) -> np.ndarray:
    """Cell borders half-way between steps, so that each step has its column."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[1.5 * steps[0] - 0.5 * steps[1]], middle, [1.5 * steps[-1] - 0.5 * steps[-2]]])


_LOSS_KEYS = r"(train|val)/(\w+_)?loss"
_ANSWER_KEYS = r"val/answer_accuracy\w*"
_SWAP_KEYS = r"val/swap_accuracy\w*"
_GENERATED_KEYS = r"val/(caption_)?exact_match\w*"
_MAX_CURVES = 10  # in one panel

# For each picture its panels, each with the keys (a regular expression) that it needs at least one of.
_FIGURES: dict[str, list[tuple[str, Panel]]] = {
    "loss": [
        (_LOSS_KEYS, _loss),
        (r"train/accuracy", _single("train/accuracy", "Accuracy within the batch", "share right", GREEN)),
        (r"(train|val)/token_accuracy", _token_accuracy),
        (r"val/perplexity", _single("val/perplexity", "Perplexity", "per token", PURPLE, noisy=False, log=True)),
    ],
    "answers": [
        (_GENERATED_KEYS, _generated),
        (r"val/bleu", _single("val/bleu", "BLEU of generated texts", "0 to 100", GREEN, noisy=False, zero=True)),
    ],
    "retrieval": [
        (r"val/image_to_text_r\d+", _recall("image_to_text", "Image to text")),
        (r"val/text_to_image_r\d+", _recall("text_to_image", "Text to image")),
        (_ANSWER_KEYS, _accuracy("val/answer_accuracy", "Answers by nearest embedding", "all questions")),
        (_SWAP_KEYS, _accuracy("val/swap_accuracy", "Right text before exchanged ones", "all")),
    ],
    "embeddings": [
        (r"val/(alignment|uniformity)", _plane),
        (r"val/effective_rank_\w+", _rank),
    ],
    "optimization": [
        (r"train/lr", _single("train/lr", "Learning rate", "", BLUE, noisy=False, zero=True)),
        (r"train/temperature", _single("train/temperature", "Temperature", "", PURPLE, noisy=False)),
        (r"train/grad_norm", _single("train/grad_norm", "Gradient norm", "", ORANGE, log=True)),
        (
            r"train/samples_per_second",
            _single("train/samples_per_second", "Throughput", "samples per second", GREEN, zero=True),
        ),
    ],
    "gates": [(r"(train|val)/gate_activity_0", _gates)],
}
