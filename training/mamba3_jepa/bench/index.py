"""How long data of any size takes to open from its kept index, and how much memory a sample takes then.

The shards are simulated: files of their size without content, and an index for each as `data.shard_index` writes it.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mamba3_jepa.settings.bench import IndexBenchmarkSettings

if TYPE_CHECKING:
    from mamba3_jepa.data.sources import DataSplits

_IMAGE, _TEXT = 30_000, 80  # bytes of a sample


@dataclass(frozen=True, kw_only=True)
class Opening:
    """One opening, with the split. opening: first or later; cpu_seconds: what of its time it computed;
    bytes_per_sample: of memory that stays taken; peak_bytes_per_sample: at most."""

    opening: str
    seconds: float
    cpu_seconds: float
    bytes_per_sample: float
    peak_bytes_per_sample: float


@dataclass(frozen=True, kw_only=True)
class IndexBenchmark:
    """The first opening also finds the keys that several samples have, which is kept."""

    settings: IndexBenchmarkSettings
    samples: int
    index_bytes: int
    openings: tuple[Opening, ...]


def run_index_benchmark(settings: IndexBenchmarkSettings) -> IndexBenchmark:
    """Write the index of so many shards, and open it twice, each time in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="mamba3-jepa-bench-", dir=settings.folder) as folder:
        data, index = Path(folder) / "data", Path(folder) / "index"
        write_simulated(data, index, settings.shards, settings.samples)
        openings = tuple(_opened(data, index, opening) for opening in ("first", "later"))
        size = sum(entry.stat().st_size for entry in os.scandir(index))
    n = settings.shards * settings.samples
    return IndexBenchmark(settings=settings, samples=n, index_bytes=size, openings=openings)


def write_simulated(data: Path, index: Path, shards: int, samples: int) -> None:
    """`shards` files that are as large as shards of `samples` would be, and the index of each."""
    import numpy as np

    from mamba3_jepa.data.shard_index import index_path, state_of, write_index
    from mamba3_jepa.data.shard_scan import Found

    data.mkdir()
    step = -(-_IMAGE // 512) * 512 + 1536  # with both headers, and the text
    rows = np.zeros((samples, 6), dtype=np.int64)
    rows[:, 0] = np.arange(samples) * step + 512
    rows[:, 1], rows[:, 3] = _IMAGE, _TEXT
    rows[:, 2] = rows[:, 0] + step - 1024
    rows[:, 4] = 2 * 9 * np.arange(1, samples + 1)
    generator = np.random.default_rng(0)
    for shard in range(shards):
        path = data / f"{shard:05}.tar"
        with path.open("wb") as file:
            file.truncate(samples * step + 10_240)
        name = os.path.realpath(path)
        keys = [b"%05d%04d" % (shard, i) for i in range(samples)]
        columns = ("key", "sized_key", "text", "picture")
        hashes = {column: generator.integers(0, 2**64, samples, dtype=np.uint64) for column in columns}
        write_index(index_path(index, name), name, state_of(name), rows, keys, hashes, Found())


def _opened(data: Path, index: Path, opening: str) -> Opening:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_open, data, index, opening).result()


def _open(data: Path, index: Path, opening: str) -> Opening:
    import psutil

    from mamba3_jepa.data.sources import open_splits

    before = psutil.Process().memory_info().rss
    start, cpu_start = time.perf_counter(), time.process_time()
    splits: DataSplits = open_splits(data, image_size=32, index_dir=index)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    n = len(splits.train_indices) + len(splits.val_indices)
    held = psutil.Process().memory_info().rss - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) - before
    return Opening(
        opening=opening,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        bytes_per_sample=held / n,
        peak_bytes_per_sample=peak / n,
    )
