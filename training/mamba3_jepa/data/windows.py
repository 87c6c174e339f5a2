"""The order of shards that are read one after the other, because each is fetched whole: windows of a few shards, whose
samples are mixed.

An epoch's order of the shards is drawn from (seed, epoch) and dealt to the ranks in runs that are equally long in
samples; of the two shards at the ends of a run, two ranks may each have a part. The shards of a run are taken `window`
at a time, and the samples of a window drawn from (seed, epoch, rank, window). So an order needs no more memory than a
window, and any place in it is found by counting.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


class Window(NamedTuple):
    """Shards that are read together. batches: the first batch of the epoch with a sample of theirs, and the last."""

    shards: list[int]
    batches: tuple[int, int]


def windows_in_order(
    indices: NDArray[np.int64], ends: NDArray[np.int64], batch_size: int, skip_batches: int
) -> Iterator[Window]:
    """A window for each shard, where the samples `indices` are read in this order in batches of all ranks."""
    shards = np.searchsorted(ends, indices, side="right")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(shards)) + 1, [len(indices)]])
    for start, end in itertools.pairwise(starts.tolist()):
        if start < end and (end - 1) // batch_size >= skip_batches:
            yield Window([int(shards[start])], (start // batch_size, (end - 1) // batch_size))


class WindowPlan(Sampler[list[int]]):
    """Which samples make up each batch of one rank in one epoch; what `loader.BatchPlan` is for data that is here."""

    def __init__(
        self,
        indices: NDArray[np.int64],
        ends: NDArray[np.int64],
        batch_size: int,
        window: int,
        seed: int,
        rank: int,
        world_size: int,
        *,
        drop_last: bool,
    ) -> None:
        """
        Args:
            indices: the samples, ascending.
            ends: (shards,), where the samples of each shard end in the source.
            window: shards whose samples are mixed.
        """
        self._indices = indices
        self._bounds = np.searchsorted(indices, np.concatenate([[0], ends]))  # of each shard's samples in `indices`
        self._batch_size, self._window = batch_size, window
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._drop_last = drop_last
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        self.epoch, self._skip = epoch, skip_batches

    def __len__(self) -> int:
        full, rest = divmod(len(self._indices), self._batch_size * self._world_size)
        return max(0, full + (rest > 0 and not self._drop_last) - self._skip)

    def __iter__(self) -> Iterator[list[int]]:
        ready: list[NDArray[np.int64]] = []
        n_ready, batch = 0, self._skip
        left = self._skip * self._batch_size  # samples to pass over
        last = self._skip + len(self)
        for number, parts in enumerate(self._parts()):
            size = sum(end - start for _, start, end in parts)
            if left >= size:
                left -= size
                continue
            order = np.concatenate([self._indices[start:end] for _, start, end in parts])
            generator = np.random.default_rng([self._seed % 2**64, self.epoch, self._rank, number])
            ready.append(generator.permutation(order)[left:])
            n_ready, left = n_ready + size - left, 0
            while n_ready >= self._batch_size and batch < last:
                together = ready[0] if len(ready) == 1 else np.concatenate(ready)
                yield together[: self._batch_size].tolist()
                ready, n_ready, batch = [together[self._batch_size :]], n_ready - self._batch_size, batch + 1
        if batch < last:  # what is left, which may be nothing where other ranks have something
            yield np.concatenate([*ready, self._indices[:0]]).tolist()

    @property
    def skip(self) -> int:
        """The first batch."""
        return self._skip

    def windows(self, ends: NDArray[np.int64]) -> Iterator[Window]:
        """The windows from the first that is still needed, in order."""
        start = 0
        last = self._skip + len(self) - 1
        for parts in self._parts():
            end = start + sum(end - start for _, start, end in parts)
            batches = start // self._batch_size, min(last, (end - 1) // self._batch_size)
            if batches[1] >= self._skip and batches[0] <= last:
                yield Window([shard for shard, _, _ in parts], batches)
            start = end

    def _parts(self) -> Iterator[list[tuple[int, int, int]]]:
        """Of each window of this rank: shard, and from where to where in the indices."""
        counts = np.diff(self._bounds)
        order = np.random.default_rng([self._seed % 2**64, self.epoch]).permutation(np.flatnonzero(counts))
        ends = np.cumsum(counts[order])
        total = len(self._indices)
        first, last = (total * rank // self._world_size for rank in (self._rank, self._rank + 1))
        parts = []
        for shard, end in zip(order.tolist(), ends.tolist(), strict=True):
            start = end - int(counts[shard])
            low, high = max(first, start), min(last, end)
            if low < high:
                place = int(self._bounds[shard]) - start
                parts.append((shard, low + place, high + place))
                if len(parts) == self._window:
                    yield parts
                    parts = []
        if parts:
            yield parts
