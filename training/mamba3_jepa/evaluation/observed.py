"""What a frozen model makes of some samples, in memory.

Letters: N samples, E embedding width, D width of the pooled state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba3_jepa.data.left_out import LeftOut
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.sample import OnBadSample, Source
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.finite import demand_finite
from mamba3_jepa.models.network import eval_mode
from mamba3_jepa.models.vljepa import Mamba3Jepa


@dataclass(frozen=True, kw_only=True)
class Observed:
    """N samples of one source, on the CPU in float32; see `phase3_data.Outputs`."""

    index: Tensor
    embedding: Tensor
    pooled: Tensor
    has_target: Tensor
    bad: list[str]


@torch.no_grad()
def observe(
    model: Mamba3Jepa,
    source: Source,
    indices: NDArray[np.int64],
    *,
    batch_size: int,
    workers: int = 0,
    on_bad_sample: OnBadSample = "error",
) -> Observed:
    """Run the model once over some samples of `source`, which need no target.

    Raises:
        UserError: a sample is unreadable (with "skip" it is left out), none is left, or an output is not finite.
    """
    loader = build_loader(
        source,
        indices,
        model.tokenizer,
        model.config,
        batch_size,
        shuffle=False,
        seed=0,
        drop_last=False,
        workers=workers,
        on_bad_sample=on_bad_sample,
        demand_target=False,
    )
    parts = []
    bad: list[str] = []
    with eval_mode(model):
        for batch in loader:
            bad += batch.bad
            if len(batch):
                outputs = model(*batch.to(model.device).inputs())
                parts.append((batch.index, outputs.embedding.float().cpu(), outputs.pooled.float().cpu(),
                              batch.has_target))  # fmt: skip
    loader.close()
    if model.angn is not None:
        model.angn.reset_context()  # its moving average is for inference
    LeftOut().say(source.name, bad)
    if not parts:
        raise UserError(f"{source.name}: not one of {len(bad)} samples could be read")
    index, embedding, pooled, has_target = (torch.cat(part) for part in zip(*parts, strict=True))
    for what, values in (("predicted embedding", embedding), ("pooled state", pooled)):
        demand_finite(values, model, f"the {what} of sample", index.tolist())
    return Observed(index=index, embedding=embedding, pooled=pooled, has_target=has_target, bad=bad)
