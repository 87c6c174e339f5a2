"""What phase 3 learns from, gathered by several processes and kept over runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.data.confusion import ConfusionSource
from mamba3_jepa.data.sample import OnBadSample
from mamba3_jepa.evaluation.phase3_data import Phase3Data, check_knowledge
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Precision
from mamba3_jepa.training.distributed import on_every_rank
from mamba3_jepa.training.frozen import frozen_outputs
from mamba3_jepa.training.spoken import spoken

_FROZEN_BATCH = 64  # samples the frozen model sees at once


def phase3_data(
    model: Mamba3Jepa,
    source: ConfusionSource,
    indices: NDArray[np.int64],
    *,
    cache_dir: Path | None,
    workers: int = 0,
    on_bad_sample: OnBadSample = "error",
    precision: Precision = "fp32",
    demand_vectors: bool = True,
    try_again: bool = True,
) -> Phase3Data:
    """Everything about some samples of `source`; the frozen model's part comes from `cache_dir` as far as it is there.

    Raises:
        UserError: knowledge that does not fit the model (see `check_knowledge`), or a sample is unreadable.
        Interrupted: SIGTERM or Ctrl-C; complete parts are kept.
    """
    # first: what is wrong with it should be said at once
    on_every_rank(
        lambda: check_knowledge(model, source, indices, on_bad_sample=on_bad_sample, demand_vectors=demand_vectors)
    )
    frozen = frozen_outputs(
        model,
        source,
        indices,
        cache_dir=cache_dir,
        batch_size=_FROZEN_BATCH,
        workers=workers,
        on_bad_sample=on_bad_sample,
        precision=precision,
        try_again=try_again,
    )
    said = spoken(model, frozen)
    return on_every_rank(lambda: Phase3Data.of(model, source, frozen, said))
