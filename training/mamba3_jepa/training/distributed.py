"""The only module that knows about ranks. With one process every function here does nothing.

Letters: B local batch, G global batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mamba3_jepa.errors import UserError
from mamba3_jepa.training.interrupt import StopRequested, StopSignal

T = TypeVar("T")


_kept: list[Any] = []


def keep_group() -> None:
    """Before the process group is ended: it stays in memory as long as the process does.

    Its destructor waits, with the interpreter's lock in hand, for a thread that may need this lock to free its last
    tensors; under load the two waited for each other for ever (gloo, torch 2.6).
    """
    if dist.is_initialized():
        _kept.append(dist.group.WORLD)


def world_size() -> int:
    """Number of training processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_world_size() -> int:
    """Number of training processes on this host, as torchrun and accelerate say it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """Index of this process among those of its host."""
    return int(os.environ.get("LOCAL_RANK", "0")) if local_world_size() > 1 else 0


def all_gather(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Rows of every rank, in rank order, of each tensor (B, ...) -> (G, ...), and at which of them the own ones begin;
    without gradients.

    The ranks may have different numbers of rows (a skipped bad sample, hard negatives). Shorter ones are padded for the
    transfer and cut again afterwards.
    """
    if world_size() == 1:
        return tensors, (0,) * len(tensors)
    own = torch.tensor([len(x) for x in tensors], device=tensors[0].device)
    counts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    rows = torch.stack(counts).T.tolist()  # of each tensor, of each rank
    gathered = tuple(_gathered(x.detach(), of_ranks) for x, of_ranks in zip(tensors, rows, strict=True))
    return gathered, tuple(sum(of_ranks[: rank()]) for of_ranks in rows)


def _gathered(x: Tensor, rows: list[int]) -> Tensor:
    longest = max(rows)
    if longest == 0:
        return x
    padded = torch.cat([x, x.new_zeros(longest - x.shape[0], *x.shape[1:])]) if x.shape[0] < longest else x
    gathered = x.new_empty(longest * len(rows), *x.shape[1:])
    slices = list(gathered.split(longest))
    dist.all_gather(slices, padded.contiguous())
    if min(rows) == longest:
        return gathered
    return torch.cat([part[:n] for part, n in zip(slices, rows, strict=True)])


def all_gather_object(value: Any) -> list[Any]:
    """`value` of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, which alone does it, on every rank; so is a user's error."""
    result: T | None = None
    error: UserError | None = None
    if rank() == 0:
        try:
            result = work()
        except UserError as own:
            error = own
    fail_together(error)
    return cast(T, all_gather_object(result)[0])


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """The sum of every rank's `values`, one by one."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(value) for value in total]


def any_rank(*flags: bool, device: torch.device) -> tuple[bool, ...]:
    """For each flag, whether it is set on at least one rank: all ranks then take the same decision."""
    if world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


def on_every_rank(work: Callable[[], T]) -> T:
    """`work()` on each rank, each for itself; what ends it early on one of them ends it on all, so that none waits.

    Raises:
        UserError: one rank's, on all of them.
        StopRequested: a stop signal arrived at one of them.
    """
    error: UserError | None = None
    stopped: int | None = None
    try:
        with StopSignal.heard_at_once():
            result = work()
    except UserError as own:
        error = own
    except StopRequested as own:
        stopped = own.number
    for number in all_gather_object(stopped):
        if number is not None:
            raise StopRequested(number)
    fail_together(error)
    return result


def fail_together(error: UserError | None) -> None:
    """Raise a user's error on all ranks if there is one on any: the own one, or else the first.

    Raises:
        UserError: there is one.
    """
    for message in all_gather_object(None if error is None else str(error)):
        if message is not None:
            raise error or UserError(message)
