"""Held-out splits by stable hash: the same on every machine, and new data does not move old data."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.errors import UserError


def stable_hash(text: str) -> int:
    """64-bit BLAKE2b of the UTF-8 text; unlike `hash`, the same in every process and on every machine."""
    # "surrogatepass": file names need not be valid UTF-8
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def split_by_hash(hashes: NDArray[np.uint64], val_fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits samples by their group, so that one group is never on both sides.

    Args:
        hashes: `stable_hash` of the group of each sample, in order.
        val_fraction: the expected share of groups held out, from 0 up to, but not including, 1.

    Returns:
        Indices of the training samples and of the validation samples, each ascending. Where there are two groups or
        more, neither side is empty, unless `val_fraction` is 0: the group that comes nearest to it goes there.

    Raises:
        UserError: `val_fraction` is no such share.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"`val_fraction` {val_fraction}: expected a share from 0 up to, but not including, 1")
    held_out = hashes < np.uint64(int(val_fraction * 2**64))
    if val_fraction and len(hashes) and hashes.min() < hashes.max():
        if not held_out.any():
            held_out = hashes == hashes.min()
        elif held_out.all():
            held_out = hashes < hashes.max()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def learned_in_phase3(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which validation samples phase 3 learns from, by the hashes (N,) of their groups: half of the groups, or none
    where that would be all; the others measure it."""
    learned = (hashes >> np.uint64(1)) % np.uint64(2) == 0
    return learned & (not learned.all())


def spread(indices: NDArray[np.int64], at_most: int) -> NDArray[np.int64]:
    """The same `at_most` indices on every machine, spread over all of them, in order."""
    if len(indices) <= at_most:
        return indices
    return np.sort(np.random.default_rng(0).permutation(indices)[:at_most])
