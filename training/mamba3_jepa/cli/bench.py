"""The command group `mamba3-jepa bench ...`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from mamba3_jepa.cli.commands import Commands
from mamba3_jepa.cli.output import say, show, table, write_out
from mamba3_jepa.settings.bench import (
    CacheBenchmarkSettings,
    DataBenchmarkSettings,
    DecodeBenchmarkSettings,
    IndexBenchmarkSettings,
    LayerBenchmarkSettings,
    ParitySettings,
    RustBenchmarkSettings,
    StepBenchmarkSettings,
)

bench = Commands()


@bench.command(name="layer")
def bench_layer(settings: Annotated[LayerBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
    """Time one Mamba-3 layer, forward and backward, as ratios to its own two linear maps."""
    from mamba3_jepa.bench.layer import report_rows, run_layer_benchmark, scaling_rows

    result = run_layer_benchmark(settings)
    if settings.json:
        write_out(result)
        return
    say(result.hardware)
    say(
        f"d_model {settings.d_model}, d_state {settings.d_state}, headdim {settings.headdim}, batch {settings.batch}, "
        f"length {settings.length}: forward + backward, median of {settings.rounds} interleaved rounds",
    )
    show(table(("implementation", "ratio to the floor", "time"), report_rows(result)))
    if result.scaling:
        show(table(("length", "time", "peak memory"), scaling_rows(result)))


@bench.command(name="step")
def bench_step(settings: Annotated[StepBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
    """A whole training step: samples per second, share of peak arithmetic, memory, and where the time goes."""
    from mamba3_jepa.bench.step import report_rows, run_step_benchmark

    result = run_step_benchmark(settings)
    if settings.json:
        write_out(result)
        return
    measured = result.settings
    say(result.hardware)
    say(
        f"{measured.preset}, batch {measured.batch_size}, {measured.precision}, {measured.workers} workers, mean of "
        f"{measured.steps} steps; compiled: {'yes' if measured.compile else 'no'}; kernels: {result.kernels}",
    )
    show(table(("", "time", "share", "10^9 operations", "of the peak"), report_rows(result)))
    memory = "" if result.peak_bytes is None else f", {result.peak_bytes / 2**20:,.0f} MiB of memory at most"
    say(f"{result.samples_per_second:,.1f} samples/s{memory}")
    say(f"peak: {result.peak / 1e12:,.3g} x 10^12 operations a second ({result.peak_from})")


@bench.command(name="data")
def bench_data(settings: Annotated[DataBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
    """Samples per second of the data loader, and the share of time a training loop waits for it."""
    from mamba3_jepa.bench.data import run_data_benchmark

    result = run_data_benchmark(settings)
    if settings.json:
        write_out(result)
        return
    for line in result.lines():
        say(line)


@bench.command(name="index")
def bench_index(settings: Annotated[IndexBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
    """How long shards take to open from their kept index, and the memory of a sample."""
    from mamba3_jepa.bench.index import run_index_benchmark

    result = run_index_benchmark(settings)
    if settings.json:
        write_out(result)
        return
    size = f"{result.index_bytes / 1e9:.2f} GB"
    say(f"{settings.shards:,} shards of {settings.samples:,} samples; their index takes {size}")
    rows = [
        (
            each.opening,
            f"{each.seconds:.2f} s",
            f"{each.cpu_seconds:.2f} s",
            f"{each.bytes_per_sample:.1f}",
            f"{each.peak_bytes_per_sample:.1f}",
        )
        for each in result.openings
    ]
    show(table(("opening", "time", "of it computing", "bytes of memory a sample", "at most meanwhile"), rows))


@bench.command(name="parity")
def bench_parity(settings: Annotated[ParitySettings, tyro.conf.arg(name="")]) -> None:
    """What the complex state is for: learn the parity of bit strings, with rotation and without."""
    from mamba3_jepa.bench.parity import learn_parity, write_results

    def report(line: str) -> None:
        if not settings.json:
            say(line)

    results = []
    for rotation in (True, False):
        report(f"rotation {'on' if rotation else 'off'}")
        results.append(learn_parity(settings, rotation, report=lambda line: report("  " + line)))
    files = write_results(results, settings)
    if settings.json:
        write_out({"settings": settings, "results": results, "files": files})
        return
    rows = [
        (f"{length}", *(f"{result.accuracy[length]:.4f}" for result in results)) for length in settings.test_lengths
    ]
    show(table(("length", "rotation on", "rotation off"), rows))
    for path in files:
        say(f"written: {path}")


@bench.command(name="decode")
def bench_decode(settings: Annotated[DecodeBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
    """Time per generated token, near the beginning of a text and far into it."""
    from mamba3_jepa.bench.decode import report_rows, run_decode_benchmark

    result = run_decode_benchmark(settings)
    if settings.json:
        write_out(result)
        return
    say(result.hardware)
    say(
        f"{settings.preset}, batch {settings.batch}: windows of {settings.window} tokens, median of {settings.rounds} "
        "interleaved rounds",
    )
    show(table(("token", "one token with step", "state", "all tokens again"), report_rows(result)))
    say(f"token {settings.late:,} takes {result.ratio:.3f} times as long as token {settings.early:,}")


@bench.command(name="cache")
def bench_cache(settings: Annotated[CacheBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
    """An epoch of phase 2 from the frozen model's kept outputs, against one that computes them in every step."""
    from mamba3_jepa.bench.cache import report_rows, run_cache_benchmark

    result = run_cache_benchmark(settings)
    if settings.json:
        ratios = {"ratio": result.ratio, "ratio_same_batches": result.ratio_same_batches}
        write_out(dataclasses.asdict(result) | ratios)
        return
    say(result.hardware)
    say(
        f"{settings.preset}, {settings.batches} batches of {result.batch_size}, interleaved; filling the cache took "
        f"{result.fill_per_sample * 1e3:,.1f} ms per sample, once",
    )
    columns = ("frozen outputs", "batch", f"epoch of {settings.epoch_samples:,}", "ratio")
    show(table(columns, report_rows(result)))
    say(
        f"an epoch from the cache is {result.ratio:.2f} times as fast as one without "
        f"({result.ratio_same_batches:.2f} times if that one could take the same batches)",
    )


@bench.command(name="rust")
def bench_rust(settings: Annotated[RustBenchmarkSettings, tyro.conf.arg(name="")]) -> None:
    """The Rust crate beside PyTorch, on the same weights."""
    from mamba3_jepa.bench.rust import report_rows, run_rust_benchmark

    result = run_rust_benchmark(settings)
    if settings.json:
        write_out(result)
        return
    say(f"{result.hardware}; Rust: {result.instructions}")
    say(f"{settings.preset}, medians of {settings.rounds} interleaved rounds")
    show(table(("", "PyTorch", "Rust", "times as fast"), report_rows(result)))
    for dtype, ratio in result.late_over_early.items():
        say(f"{dtype}: token 2,000 takes {ratio:.3f} times as long as token 20")
    for dtype, ratio in result.peak_over_weights.items():
        say(f"{dtype}: peak memory {ratio:.2f} times the bytes of the weights")
    say(f"a folder opens in {result.open_over_read:.2f} times what reading its bytes takes")
