"""Batches of one epoch, in order, prepared by worker processes.

What a batch holds depends on (seed, epoch, position) alone, never on the number of workers, so a run can stop
after any batch and continue as if it had not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.data.batch import Batch, BatchMaker, Failure, Looked
from mamba3_jepa.data.sample import Fetched, OnBadSample, Sharded, Source
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.data.windows import Window, WindowPlan, windows_in_order
from mamba3_jepa.data.workers import Workers, shut_down
from mamba3_jepa.errors import UserError


def build_loader(
    source: Source,
    indices: Sequence[int] | NDArray[np.int64],
    tokenizer: TextTokenizer,
    config: ModelConfig,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    skip_batches: int = 0,
    drop_last: bool,
    workers: int = 0,
    on_bad_sample: OnBadSample = "error",
    demand_target: bool = True,
    image_shift: int = 0,
    draw_captions: bool = False,
    hard_negatives: int | None = 0,
    twice: int = 0,
    window: int | None = None,
    looked: Looked | None = None,
) -> BatchLoader:
    """Batches of `indices` for one rank.

    Global batch k holds the samples [k G, (k + 1) G) of the epoch's order, G = batch_size * world_size, and
    rank r takes its r-th slice, so n ranks with batches of b see what one rank with batches of n b sees. An
    incomplete last batch is dropped, or divided as evenly as it goes, so that all ranks have equally many.

    With `on_bad_sample="skip"` an unreadable sample is left out of its batch, which becomes smaller, in the
    worst case empty; positions do not move, so resuming stays exact. `Batch.bad` says what was wrong.

    With `window` the order is that of `windows.WindowPlan` instead, in which a rank reads some shards of its own.

    Args:
        indices: samples of `source`; they must have a target unless `demand_target` is False.
        skip_batches: start after so many batches of the epoch, without decoding them.
        workers: processes that prepare batches; 0 prepares them where they are used.
        image_shift: move each sample's image by up to so many pixels, see `augment.shift`.
        draw_captions: where one image has several captions, take another in each epoch instead of the first.
        hard_negatives: how many of each sample's negatives are in its batch, see `hard_negatives.drawn`; None: all.
        twice: batches that are gone through together, and then once more before the next ones come; 0: none are.
        window: where a source in shards is shuffled, mix the samples of so many shards; None: all samples.
        looked: the pictures' visual tokens, where they are kept: no picture is read then.

    Raises:
        UserError: there is not one batch, or no room for the shards that are read together; while iterating, a
            sample that cannot be read, or workers that cannot go on.
    """
    global_size = batch_size * world_size
    if drop_last and len(indices) < global_size:
        ranks = f" ({batch_size} on each of {world_size} processes)" if world_size > 1 else ""
        raise UserError(
            f"{source.name}: `batch_size`: a batch of {global_size}{ranks} is larger than the {len(indices)} "
            f"samples there are; use at most {len(indices) // world_size}, or give more data"
        )
    if not len(indices):
        raise UserError(f"{source.name}: there are no samples to load")
    indices = np.asarray(indices, dtype=np.int64)
    plan: BatchPlan | WindowPlan
    if window is not None and shuffle and isinstance(source, Sharded):
        if twice:
            raise UserError(
                "`contrast_batch` reads its samples twice, which shards that are fetched do not allow: fetch them into "
                "a folder beforehand, and give that as `data_dir`"
            )
        plan = WindowPlan(indices, source.shard_ends, batch_size, window, seed, rank, world_size, drop_last=drop_last)
    else:
        plan = BatchPlan(indices, batch_size, shuffle, seed, rank, world_size, drop_last=drop_last, twice=twice)
    if isinstance(source, Fetched):
        source.demand_room(window if isinstance(plan, WindowPlan) else None)
    plan.set_epoch(epoch, skip_batches)
    maker = BatchMaker(
        source,
        tokenizer,
        config,
        on_bad_sample,
        demand_target,
        image_shift=image_shift,
        draw_captions=draw_captions,
        hard_negatives=hard_negatives,
        seed=seed,
        looked=looked,
    )
    return BatchLoader(plan, maker, workers, source if isinstance(source, Fetched) else None)


class BatchPlan(Sampler[list[int]]):
    """Which samples make up each batch of one rank in one epoch; its length counts a batch that comes twice once."""

    def __init__(
        self,
        indices: NDArray[np.int64],
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        *,
        drop_last: bool,
        twice: int = 0,
    ) -> None:
        self._indices = indices
        self._global_size = batch_size * world_size
        self._shuffle, self._seed = shuffle, seed
        self._rank, self._world_size = rank, world_size
        self._drop_last, self._twice = drop_last, twice
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        self.epoch, self._skip = epoch, skip_batches

    def windows(self, ends: NDArray[np.int64]) -> Iterator[Window]:
        """The shards in the order in which they are read, each for itself; none where that is no order."""
        if self._shuffle:
            return iter(())
        return windows_in_order(self._indices, ends, self._global_size, self._skip)

    @property
    def skip(self) -> int:
        """The first batch."""
        return self._skip

    def __len__(self) -> int:
        full, rest = divmod(len(self._indices), self._global_size)
        return max(0, full + (rest > 0 and not self._drop_last) - self._skip)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._indices
        if self._shuffle:
            order = np.random.default_rng([self._seed % 2**64, self.epoch]).permutation(order)
        for k in self._numbers():
            block = order[k * self._global_size : (k + 1) * self._global_size]
            yield np.array_split(block, self._world_size)[self._rank].tolist()

    def _numbers(self) -> Iterator[int]:
        end = self._skip + len(self)
        for first in range(self._skip, end, self._twice or 1):
            together = range(first, min(first + (self._twice or 1), end))
            yield from together
            if self._twice:
                yield from together


class _InEpoch(Sampler[tuple[int, list[int]]]):
    """The batches of a plan with their epoch, which worker processes are not told otherwise."""

    def __init__(self, plan: BatchPlan | WindowPlan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return ((self._plan.epoch, indices) for indices in self._plan)


class BatchLoader:
    """Iterates over the batches of one epoch; see `build_loader`.

    Worker processes start with the first iteration and stay until `close`, until the loader is dropped, or to
    the end of the process; `set_epoch` lets one loader, and its workers, serve a whole run.
    """

    def __init__(
        self, plan: BatchPlan | WindowPlan, maker: BatchMaker, workers: int, fetched: Fetched | None = None
    ) -> None:
        """`fetched`: the source, where its shards are fetched ahead of the batches."""
        self._plan, self._fetched = plan, fetched
        self._workers = Workers(workers) if workers else None
        here = {"dataset": maker, "num_workers": 0, "collate_fn": _unchanged}
        self._loader: DataLoader[Any] = DataLoader(
            sampler=_InEpoch(plan),
            batch_size=None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every iteration would draw from the global one
            **(here if self._workers is None else self._workers.options(maker)),
        )
        self._close = weakref.finalize(self, shut_down, self._loader)

    def __len__(self) -> int:
        """Batches that one iteration gives."""
        return len(self._plan)

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """What the next iteration goes through: `epoch`, without its first `skip_batches` batches."""
        self._plan.set_epoch(epoch, skip_batches)

    def __iter__(self) -> Iterator[Batch]:
        if self._fetched is None:
            yield from self._batches()
            return
        with self._fetched.ahead(self._plan.windows(self._fetched.shard_ends)) as ahead:
            for number, batch in enumerate(self._batches(), start=self._plan.skip):
                yield batch
                ahead.reached(number)

    def _batches(self) -> Iterator[Batch]:
        for batch in self._loader if self._workers is None else self._workers.batches(self._loader):
            if isinstance(batch, Failure):
                raise UserError(batch.message)
            yield batch

    def close(self) -> None:
        """Stops the worker processes."""
        self._close()


def _unchanged(batch: Any) -> Any:
    return batch
