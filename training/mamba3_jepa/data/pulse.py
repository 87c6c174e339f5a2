"""A sign of life from worker processes: how many samples each of them has begun."""

from __future__ import annotations

import multiprocessing
from typing import Any


class Pulse:
    """Counts in memory that all processes see; of n workers, each writes its own."""

    def __init__(self, workers: int) -> None:
        self._counts: Any = multiprocessing.get_context("spawn").RawArray("q", max(1, workers))

    def total(self) -> int:
        """Samples that all workers together have begun."""
        return sum(self._counts)

    def belongs_to(self, worker: int) -> None:
        """From now on `beat` in this process counts for `worker`."""
        _own.append((self._counts, worker))


_own: list[tuple[Any, int]] = []


def beat() -> None:
    """This process begins another sample; of interest in a worker only."""
    for counts, worker in _own:
        counts[worker] += 1
