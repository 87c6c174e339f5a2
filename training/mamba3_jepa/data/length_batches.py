"""Batches of texts of similar length, so that short answers do not pay for the padding of long captions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SORTED_TOGETHER = 64  # batches; more of them means less padding, and batches that are less random


def length_batches(lengths: NDArray[np.int64], batch_size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The rows of each batch of one epoch.

    The rows are shuffled, sorted by length within groups of some batches, cut into batches, and the batches shuffled.
    Rows that fill no batch are left out; in every epoch they are others.

    Args:
        lengths: (N,) of the rows 0 to N - 1.

    Returns:
        (N // batch_size, batch_size), which depends on the arguments alone.
    """
    rng = np.random.default_rng([seed % 2**64, epoch])
    n_batches = len(lengths) // batch_size
    order = rng.permutation(len(lengths))[: n_batches * batch_size]
    group = _SORTED_TOGETHER * batch_size
    for start in range(0, len(order), group):
        rows = order[start : start + group]
        order[start : start + group] = rows[np.argsort(lengths[rows], kind="stable")]
    return order.reshape(n_batches, batch_size)[rng.permutation(n_batches)]
