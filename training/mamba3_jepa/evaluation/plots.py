"""PNG plots of a run, from its `metrics.jsonl`: everything that moved during training."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from mamba3_jepa.evaluation.figure import add_panel, legend_beside, new_figure, save_figure, set_title, shortened
from mamba3_jepa.evaluation.palette import (
    ALL,
    FAINT,
    GUIDE,
    MAX_KINDS,
    PREDICTED,
    RECALL,
    REST,
    TARGET,
    TRAINING,
    VALIDATION,
    kind_colors,
)
from mamba3_jepa.files.metrics_log import read_metrics

_STEP = "optimizer step"
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

    loss (each one that was logged, in training and validation), answers (exact match, BLEU), retrieval (both
    directions, answers, swaps), embeddings (alignment, uniformity, effective rank), optimization (learning rate,
    temperature, gradient norm, throughput) and gates (activity of each layer). What was not logged is left out.

    Raises:
        UserError: the metrics cannot be read, or a picture cannot be written.
    """
    run_dir = Path(run_dir)
    metrics = read_series(run_dir / "metrics.jsonl")
    written = []
    for name, panels in _figures(metrics).items():
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
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(7.0 * columns, 3.7 * rows)
    for number, panel in enumerate(panels):
        axes = add_panel(figure, rows, columns, number + 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel(axes, metrics)
        left, right = axes.dataLim.intervalx
        if left == right:  # a single step
            axes.set_xlim(left - 1, left + 1)
    return save_figure(figure, path)


def _line(axes: Axes, series: Series, color: str, label: str = "", *, noisy: bool = False, style: str = "-") -> None:
    """A curve with points while there are few; `noisy` ones are smoothed once there are many."""
    many = len(series) > _SMOOTH_FROM
    values = series.values
    if noisy and many:
        axes.plot(series.steps, values, color=color, linewidth=0.8, alpha=0.25)
        values = _smooth(values)
    marker = "" if many else "o"
    axes.plot(series.steps, values, color=color, label=label, marker=marker, markersize=3.5, linewidth=1.8,
              linestyle=style)  # fmt: skip


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a thirtieth of the points, or what of it is there at both ends."""
    half = max(1, len(values) // 60)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    first, behind = np.maximum(positions - half, 0), np.minimum(positions + half + 1, len(values))
    return (sums[behind] - sums[first]) / (behind - first)


def _both_parts(name: str, title: str, ylabel: str) -> Panel:
    """A metric of that name in training and in validation."""

    def panel(axes: Axes, metrics: Metrics) -> None:
        set_title(axes, title, _STEP, ylabel)
        for part, shown, color in (("train", "training", TRAINING), ("val", "validation", VALIDATION)):
            if series := metrics.get(f"{part}/{name}"):
                _line(axes, series, color, f"{shown}   {series.values[-1]:.3g}", noisy=part == "train")
        legend_beside(axes)

    return panel


def _recall(direction: str, title: str) -> Panel:
    def panel(axes: Axes, metrics: Metrics) -> None:
        set_title(axes, title, _STEP, "recall")
        for k, color in RECALL.items():
            if series := metrics.get(f"val/{direction}_r{k}"):
                _line(axes, series, color, f"R@{k}   {series.values[-1]:.3f}")
        axes.set_ylim(-0.02, 1.02)
        legend_beside(axes)

    return panel


def _by_kind(title: str, ylabel: str, wholes: dict[str, tuple[str, str, str]], prefix: str) -> Panel:
    """Shares of several kinds, the most frequent ones, in colours of their own, and of all of them together.

    Args:
        wholes: metrics of all, by key: label, colour, line style.
        prefix: of the keys of single kinds, which are frequent first.
    """

    def panel(axes: Axes, metrics: Metrics) -> None:
        set_title(axes, title, _STEP, ylabel)
        kinds = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix) and key not in wholes]
        colors = kind_colors(kinds[:MAX_KINDS])
        curves = [(key, *wholes[key]) for key in wholes if key in metrics]
        curves += [(prefix + kind, kind.replace("_", " "), colors[kind], "-") for kind in kinds[:MAX_KINDS]]
        for key, label, color, style in curves:
            last = metrics[key].values[-1]
            _line(axes, metrics[key], color, f"{shortened(label, _LONGEST_KIND)}   {last:.3f}", style=style)
        if len(kinds) > MAX_KINDS:
            axes.plot([], [], linestyle="", label=f"{len(kinds) - MAX_KINDS} rarer ones: metrics.jsonl")
        axes.set_ylim(-0.02, 1.02)
        legend_beside(axes)

    return panel


def _plane(axes: Axes, metrics: Metrics) -> None:
    """The path of (uniformity, alignment), dark at the end; both are better when lower."""
    set_title(
        axes, "Alignment and uniformity", "uniformity   (lower: space is used)", "alignment   (lower: pairs agree)"
    )
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter("{x:g}")
    across, up = metrics.get("val/uniformity"), metrics.get("val/alignment")
    if across is None or up is None:
        return
    steps, left, right = np.intersect1d(across.steps, up.steps, return_indices=True)
    x, y = across.values[left], up.values[right]
    axes.plot(x, y, color=GUIDE, linewidth=1.2, zorder=1)
    dots = axes.scatter(x, y, c=steps, cmap="viridis_r", s=26, zorder=2)
    if len(steps) > 1:
        _colorbar(axes, dots, _STEP).ax.yaxis.set_major_formatter(EngFormatter(sep=""))


def _rank(axes: Axes, metrics: Metrics) -> None:
    set_title(axes, "Effective rank of the embeddings", _STEP, "directions in use")
    highest = 1.0
    for name, color in (("predicted", PREDICTED), ("target", TARGET)):
        if series := metrics.get(f"val/effective_rank_{name}"):
            _line(axes, series, color, f"{name}   {series.values[-1]:.3g}")
            highest = max(highest, series.values.max())
    axes.set_ylim(0, 1.08 * highest)
    legend_beside(axes)


def _single(key: str, title: str, ylabel: str, *, noisy: bool = True, log: bool = False, zero: bool = False) -> Panel:
    def panel(axes: Axes, metrics: Metrics) -> None:
        set_title(axes, title, _STEP, ylabel)
        series = metrics[key]
        _line(axes, series, TRAINING if key.startswith("train/") else VALIDATION, noisy=noisy)
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
    set_title(axes, "ANGN gate activity", _STEP, "layer")
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
    bar.set_label(label, fontsize=9, color=FAINT)
    bar.ax.tick_params(colors=FAINT, labelsize=9)
    bar.outline.set_visible(False)
    return bar


def _edges(steps: np.ndarray) -> np.ndarray:
    """Cell borders half-way between steps, so that each step has its column."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[1.5 * steps[0] - 0.5 * steps[1]], middle, [1.5 * steps[-1] - 0.5 * steps[-2]]])


_LOSS = r"(train|val)/((\w+_)?loss)"
_LOSS_UNITS = {"loss": "nats", "confusion_loss": "nats", "injection_loss": "squared error"}
_LONGEST_KIND = 22
_ANSWERS, _SWAPS, _GENERATED = "val/answer_accuracy", "val/swap_accuracy", "val/exact_match"
_ALL_GENERATED = {
    "val/led_exact_match": ("questions, all samples", ALL, "-"),
    _GENERATED: ("questions, generated", ALL, ":"),
    "val/caption_exact_match": ("captions, generated", REST, "-"),
}


def _losses(metrics: Metrics) -> list[tuple[str, Panel]]:
    """A panel for each loss, the one that training minimises first."""
    names = {found[2] for key in metrics if (found := re.fullmatch(_LOSS, key))}
    panels = []
    for name in sorted(names, key=lambda name: (name != "loss", name)):
        title, unit = name.replace("_", " ").capitalize(), _LOSS_UNITS.get(name, "")
        panels.append((rf"(train|val)/{name}", _both_parts(name, title, unit)))
    return panels


def _figures(metrics: Metrics) -> dict[str, list[tuple[str, Panel]]]:
    """For each picture its panels, each with the keys (a regular expression) that it needs at least one of."""
    return {
        "loss": [
            *_losses(metrics),
            (r"train/accuracy", _single("train/accuracy", "Accuracy within the batch", "share right")),
            (r"(train|val)/token_accuracy",
             _both_parts("token_accuracy", "Next token, led by the answer", "share right")),
            (r"val/perplexity", _single("val/perplexity", "Perplexity", "per token", noisy=False, log=True)),
        ],
        "answers": [
            (r"val/((caption|led)_)?exact_match\w*",
             _by_kind("Generated answers", "exact match", _ALL_GENERATED, f"{_GENERATED}_")),
            (r"val/bleu", _single("val/bleu", "BLEU of generated texts", "0 to 100", noisy=False, zero=True)),
        ],
        "retrieval": [
            (r"val/image_to_text_r\d+", _recall("image_to_text", "Image to text")),
            (r"val/text_to_image_r\d+", _recall("text_to_image", "Text to image")),
            (rf"{_ANSWERS}\w*",
             _by_kind("Answers by nearest embedding", "accuracy", {_ANSWERS: ("all questions", ALL, "-")},
                      f"{_ANSWERS}_")),
            (rf"{_SWAPS}\w*",
             _by_kind("Right text before exchanged ones", "accuracy", {_SWAPS: ("all", ALL, "-")}, f"{_SWAPS}_")),
        ],
        "embeddings": [
            (r"val/(alignment|uniformity)", _plane),
            (r"val/effective_rank_\w+", _rank),
        ],
        "optimization": [
            (r"train/lr", _single("train/lr", "Learning rate", "", noisy=False, zero=True)),
            (r"train/temperature", _single("train/temperature", "Temperature", "", noisy=False)),
            (r"train/grad_norm", _single("train/grad_norm", "Gradient norm", "", log=True)),
            (r"train/samples_per_second",
             _single("train/samples_per_second", "Throughput", "samples per second", zero=True)),
        ],
        "gates": [(r"(train|val)/gate_activity_0", _gates)],
    }  # fmt: skip
