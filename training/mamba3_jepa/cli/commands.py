"""The command groups `mamba3-jepa prepare ...` and `mamba3-jepa bench ...`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from mamba3_jepa.bench.data import DataBenchmarkSettings
from mamba3_jepa.settings.bench import (
    CacheBenchmarkSettings,
    DecodeBenchmarkSettings,
    LayerBenchmarkSettings,
    ParitySettings,
    RustBenchmarkSettings,
)

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


@prepare.command(name="scenes")
def prepare_scenes(output: Path, scenes: int = 32, image_size: int = 64, seed: int = 0) -> None:
    """Write held-out synthetic scenes as a data directory: pictures to look at and to ask about.

    Args:
        output: The data directory to make.
        scenes: How many pictures.
        image_size: Their side in pixels.
        seed: Other scenes with another seed.
    """
    from mamba3_jepa.data.scene_files import write_scenes

    lines = write_scenes(output, scenes, image_size, seed)
    Console().print(f"{output}: {scenes:,} scenes, {lines:,} lines in manifest.jsonl", highlight=False)


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
def bench_data(settings: Annotated[DataBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
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


@bench.command(name="decode")
def bench_decode(settings: Annotated[DecodeBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
    """Time per generated token, near the beginning of a text and far into it."""
    from mamba3_jepa.bench.decode import report_rows, run_decode_benchmark

    result = run_decode_benchmark(settings)
    console = Console()
    console.print(result.hardware, highlight=False)
    console.print(
        f"{settings.preset}, batch {settings.batch}: windows of {settings.window} tokens, median of {settings.rounds} "
        "interleaved rounds",
        highlight=False,
    )
    console.print(_table(("token", "one token with step", "state", "all tokens again"), report_rows(result)))
    console.print(
        f"token {settings.late:,} takes {result.ratio:.3f} times as long as token {settings.early:,}", highlight=False
    )


@bench.command(name="cache")
def bench_cache(settings: Annotated[CacheBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
    """An epoch of phase 2 from the frozen model's kept outputs, against one that computes them in every step."""
    from mamba3_jepa.bench.cache import report_rows, run_cache_benchmark

    result = run_cache_benchmark(settings)
    console = Console()
    console.print(result.hardware, highlight=False)
    console.print(
        f"{settings.preset}, {settings.batches} batches of {result.batch_size}, interleaved; filling the cache took "
        f"{result.fill_per_sample * 1e3:,.1f} ms per sample, once",
        highlight=False,
    )
    columns = ("frozen outputs", "batch", f"epoch of {settings.epoch_samples:,}", "ratio")
    console.print(_table(columns, report_rows(result)))
    console.print(
        f"an epoch from the cache is {result.ratio:.2f} times as fast as one without "
        f"({result.ratio_same_batches:.2f} times if that one could take the same batches)",
        highlight=False,
    )


@bench.command(name="rust")
def bench_rust(settings: Annotated[RustBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
    """The Rust crate beside PyTorch, on the same weights."""
    from mamba3_jepa.bench.rust import report_rows, run_rust_benchmark

    result = run_rust_benchmark(settings)
    console = Console()
    console.print(f"{result.hardware}; Rust: {result.instructions}", highlight=False)
    console.print(f"{settings.preset}, medians of {settings.rounds} interleaved rounds", highlight=False)
    console.print(_table(("", "PyTorch", "Rust", "times as fast"), report_rows(result)))
    for dtype, ratio in result.late_over_early.items():
        console.print(f"{dtype}: token 2,000 takes {ratio:.3f} times as long as token 20", highlight=False)
    for dtype, ratio in result.peak_over_weights.items():
        console.print(f"{dtype}: peak memory {ratio:.2f} times the bytes of the weights", highlight=False)
    console.print(f"a folder opens in {result.open_over_read:.2f} times what reading its bytes takes", highlight=False)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(box=box.SIMPLE)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
