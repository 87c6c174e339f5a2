"""Says aloud when what is held out has been trained on by an earlier phase, under whatever name and path."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.data.content import recognised
from mamba3_jepa.files.checkpoint import DataRecord

logger = logging.getLogger(__name__)


def warn_of_seen(
    phases: Iterable[tuple[int, DataRecord]], keys: NDArray[np.uint64], *, same_split_as: str | None = None
) -> None:
    """Warn if the data of these phases shows what samples held out now show.

    Args:
        phases: numbers of phases with what their checkpoints say of their data; made-up data is passed over.
        keys: `Content.keys` of the samples held out.
        same_split_as: fingerprint of data of which a phase held out what is held out now; of an older checkpoint it is
            all that can be compared. None: nothing is said of such a checkpoint.
    """
    seen, unknown = [], []
    for phase, record in phases:
        if record.synthetic is not False:
            continue
        if not record.seen:
            unknown += [str(phase)] if same_split_as not in (None, record.fingerprint) else []
            continue
        n_seen, n_told = recognised(keys, record.seen)
        if n_seen:
            about = "" if n_told == len(keys) else "about "
            seen.append(f"{about}{round(n_seen / n_told * len(keys)) or 1} what phase {phase} was trained on")
    if seen:
        logger.warning(
            "of %d held-out samples %s show: the numbers will look too good. Hold out what was held out there: the "
            "same data and `val_fraction`, or the same val.jsonl",
            len(keys), ", ".join(seen),
        )  # fmt: skip
    if unknown:
        logger.warning(
            "whether phase %s was trained on held-out samples cannot be told: its checkpoint is of an older version, "
            "and its data was another, or divided otherwise",
            " and ".join(unknown),
        )  # fmt: skip
