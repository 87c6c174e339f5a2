"""Does the data keep up with the model? Samples per second of the loader, and how long a training loop waits.

Two sources are measured: JPEG files named by a manifest (made for the occasion from synthetic scenes, in a
temporary directory) and the synthetic scenes themselves. Torch is imported when the benchmark runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mamba3_jepa.config import ModelConfig, preset
from mamba3_jepa.settings.bench import DataBenchmarkSettings

if TYPE_CHECKING:
    import torch

    from mamba3_jepa.data.batch import Batch
    from mamba3_jepa.data.loader import BatchLoader
    from mamba3_jepa.data.sample import Source
    from mamba3_jepa.data.tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class LoaderRate:
    """The loader alone, once its workers run."""

    source: str
    workers: int
    samples_per_second: float


@dataclass(frozen=True, kw_only=True)
class LoopWait:
    """A training loop (forward, backward, optimizer step) fed by the loader, after one warm-up step."""

    source: str
    workers: int
    samples_per_second: float
    step_seconds: float
    wait_fraction: float


@dataclass(frozen=True, kw_only=True)
class DataBenchReport:
    """The measurements; `lines` are a table of them."""

    settings: DataBenchmarkSettings
    rates: tuple[LoaderRate, ...]
    waits: tuple[LoopWait, ...]

    def lines(self) -> list[str]:
        s = self.settings
        size = preset(s.preset).vision.image_size
        table = [f"loader alone, batches of {s.batch_size}, {size} px (samples/s)"]
        table += [f"  {r.source:<16} {r.workers} workers {r.samples_per_second:10,.0f}" for r in self.rates]
        if self.waits:
            model = f"the {s.preset} model on {s.device}"
            table.append(f"training loop of {model} (samples/s, step, share of the time spent waiting)")
        for w in self.waits:
            rate = f"{w.samples_per_second:10,.0f} {w.step_seconds * 1e3:8,.0f} ms {w.wait_fraction:7.1%}"
            table.append(f"  {w.source:<16} {w.workers} workers {rate}")
        return table


def run_data_benchmark(
    settings: DataBenchmarkSettings, train_step: Callable[[Batch], None] | None = None
) -> DataBenchReport:
    """Measures the loader on both sources, alone and in front of a training step.

    Args:
        train_step: what a training loop does with a batch; by default a step of Phase 1 on the settings' device with
            the preset's model (its X-Encoder has random weights).

    Raises:
        UserError: impossible settings, or a device that is not there.
    """
    from mamba3_jepa.data.files import ManifestSource
    from mamba3_jepa.data.sample import source_texts
    from mamba3_jepa.data.scenes import SceneSource
    from mamba3_jepa.data.tokenizer import TextTokenizer
    from mamba3_jepa.device import checked_device

    settings.check()
    device = checked_device(settings.device)
    settings = dataclasses.replace(settings, device=str(device))
    config = preset(settings.preset)
    scenes = SceneSource(n_scenes=2000, image_size=config.vision.image_size)
    tokenizer = TextTokenizer.train(source_texts(scenes, range(2000)), config.vocab_size)
    config = config.replace(vocab_size=tokenizer.vocab_size)
    if train_step is None and settings.steps:
        train_step = phase1_step(config, tokenizer, device)
    rates, waits = [], []
    with tempfile.TemporaryDirectory(prefix="mamba3-jepa-bench-") as folder:
        write_jpegs(Path(folder), settings)
        sources: dict[str, Source] = {
            f"JPEG {settings.jpeg_size} px": ManifestSource(folder),
            "synthetic scenes": scenes,
        }
        for (name, source), workers in itertools.product(sources.items(), settings.workers):
            loader = _loader(source, tokenizer, config, settings.batch_size, workers)
            try:
                rates.append(_measure_rate(name, workers, loader, settings.seconds))
                if train_step is not None:
                    waits.append(_measure_wait(name, workers, loader, settings.steps, train_step))
            finally:
                loader.close()
    return DataBenchReport(settings=settings, rates=tuple(rates), waits=tuple(waits))


def write_jpegs(folder: Path, settings: DataBenchmarkSettings) -> None:
    """A data directory with `n_images` JPEG files of `jpeg_size` pixels and a manifest of their captions."""
    from mamba3_jepa.data.scenes import SceneSource
    from mamba3_jepa.files.json_file import json_line

    source = SceneSource(n_scenes=settings.n_images, image_size=settings.jpeg_size, kinds=("caption",))
    with (folder / "manifest.jsonl").open("wb") as manifest:
        for i in range(len(source)):
            sample = source.sample(i)
            if sample.image is not None:
                sample.image().save(folder / f"{i}.jpg", quality=90)
            manifest.write(json_line({"image": f"{i}.jpg", "text": sample.target}))


def phase1_step(config: ModelConfig, tokenizer: TextTokenizer, device: torch.device) -> Callable[[Batch], None]:
    """One optimizer step of Phase 1, as a function of a batch."""
    import torch

    from mamba3_jepa.bench.hardware import synchronizer
    from mamba3_jepa.models.vljepa import Mamba3Jepa
    from mamba3_jepa.training.phase1 import Phase1Objective

    objective = Phase1Objective(Mamba3Jepa(config, tokenizer)).to(device)
    objective.train()
    synchronize = synchronizer(device)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-4)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        objective(batch.to(device)).loss.backward()
        optimizer.step()
        synchronize()

    return step


def _loader(
    source: Source, tokenizer: TextTokenizer, config: ModelConfig, batch_size: int, workers: int
) -> BatchLoader:
    from mamba3_jepa.data.loader import build_loader

    return build_loader(
        source,
        source.indices("target"),
        tokenizer,
        config,
        batch_size,
        shuffle=True,
        seed=0,
        drop_last=True,
        workers=workers,
    )


def epochs(loader: BatchLoader) -> Iterator[Batch]:
    """Epoch after epoch, without end, the same whenever it is asked for."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def _measure_rate(name: str, workers: int, loader: BatchLoader, seconds: float) -> LoaderRate:
    batches = epochs(loader)
    for _ in range(2 * workers + 1):  # the workers start, and what they prepared meanwhile is used up
        next(batches)
    n_samples, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not n_samples:
        n_samples += len(next(batches))
    return LoaderRate(source=name, workers=workers, samples_per_second=n_samples / elapsed)


def _measure_wait(
    name: str, workers: int, loader: BatchLoader, steps: int, train_step: Callable[[Batch], None]
) -> LoopWait:
    batches = epochs(loader)
    train_step(next(batches))
    n_samples, waited, start = 0, 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        train_step(batch)
        n_samples += len(batch)
    elapsed = time.perf_counter() - start
    return LoopWait(
        source=name,
        workers=workers,
        samples_per_second=n_samples / elapsed,
        step_seconds=elapsed / steps,
        wait_fraction=waited / elapsed,
    )
