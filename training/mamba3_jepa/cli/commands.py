"""The command groups `mamba3-jepa prepare ...` and `mamba3-jepa bench ...`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from mamba3_jepa.bench.data import DataBenchSettings
from mamba3_jepa.bench.layer_settings import LayerBenchmarkSettings
from mamba3_jepa.bench.parity_settings import ParitySettings

prepare = tyro.extras.SubcommandApp()
bench = tyro.extras.SubcommandApp()


@prepare.command(name="easy-vqa")
def prepare_easy_vqa(output: Path) -> None:
    """Write the easy-VQA data set (PyPI package easy-vqa) as a data directory, with its own test split.

    Args:
        output: The data directory to make.
    """
    from mamba3_jepa.data.easy_vqa import prepare_easy_vqa as write

    summary = write(output)
    Console().print(
        f"{summary.output_dir}: {summary.train_questions:,} training questions on {summary.train_images:,} images "
        f"(manifest.jsonl), {summary.test_questions:,} test questions on {summary.test_images:,} images (test.jsonl), "
        f"{summary.answers} different answers",
        highlight=False,
    )


@bench.command(name="layer")
def bench_layer(settings: Annotated[LayerBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
    """Time one Mamba-3 layer, forward and backward, as ratios to its own two linear maps."""
    from mamba3_jepa.bench.layer import report_rows, run_layer_benchmark, scaling_rows

    result = run_layer_benchmark(settings)
    console = Console()
    console.print(result.hardware, highlight=False)
    console.print(
        f"d_model {settings.d_model}, d_state {settings.d_state}, headdim {settings.headdim}, batch {settings.batch}, "
        f"length {settings.length}: forward + backward, median of {settings.rounds} interleaved rounds",
        highlight=False,
    )
    console.print(_table(("implementation", "ratio to the floor", "time"), report_rows(result)))
    if result.scaling:
        console.print(_table(("length", "time", "peak memory"), scaling_rows(result)))


@bench.command(name="data")
def bench_data(settings: Annotated[DataBenchSettings, tyro.conf.arg(name="")]) -> None:
    """Samples per second of the data loader, and the share of time a training loop waits for it."""
    from mamba3_jepa.bench.data import run_data_benchmark

    for line in run_data_benchmark(settings).lines():
        Console().print(line, highlight=False)


@bench.command(name="parity")
def bench_parity(settings: Annotated[ParitySettings, tyro.conf.arg(name="")]) -> None:
    """What the complex state is for: learn the parity of bit strings, with rotation and without."""
    from mamba3_jepa.bench.parity import learn_parity, write_results

    console = Console()
    results = []
    for rotation in (True, False):
        console.print(f"rotation {'on' if rotation else 'off'}", highlight=False)
        results.append(
            learn_parity(settings, rotation, report=lambda line: console.print("  " + line, highlight=False))
        )
    rows = [
        (f"{length}", *(f"{result.accuracy[length]:.4f}" for result in results)) for length in settings.test_lengths
    ]
    console.print(_table(("length", "rotation on", "rotation off"), rows))
    for path in write_results(results, settings):
        console.print(f"written: {path}", highlight=False)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(box=box.SIMPLE)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
