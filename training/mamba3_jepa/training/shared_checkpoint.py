"""What rank 0 reads is everybody's, whether or not the hosts share a disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import content_digest
from mamba3_jepa.training.distributed import all_gather_object, from_rank_0, rank, world_size

logger = logging.getLogger(__name__)

T = TypeVar("T")


def read_from_rank_0(path: Path, read: Callable[[], T]) -> T:
    """`read()`, which reads `path`, a checkpoint, as rank 0 does; called on every rank.

    Ranks that have the same file read it themselves; where one differs, rank 0 sends what it has read.

    Raises:
        UserError: what `read` raises on rank 0, on every rank; or there is a file, but not where rank 0 looks.
    """
    if world_size() == 1:
        return read()
    digests = all_gather_object(content_digest(path))
    if len(set(digests)) == 1:
        return read()
    if digests[0] is None:
        there = next(number for number, digest in enumerate(digests) if digest is not None)
        raise UserError(
            f"{path} is there on the host of rank {there}, but not on that of rank 0, which reads and writes it: copy "
            "it there, or give the hosts the ranks they had"
        )
    if rank() == 0:
        logger.warning("%s is not the same on all hosts: that of rank 0 is taken", path)
    return from_rank_0(read)
