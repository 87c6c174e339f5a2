"""What the frozen model answers to each sample of phase 3; several processes share the work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mamba3_jepa.count_report import CountReport
from mamba3_jepa.evaluation.spoken import Spoken
from mamba3_jepa.models.generation import N_DOUBTS
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.training.distributed import all_gather_object, on_every_rank, rank, world_size
from mamba3_jepa.training.frozen import FrozenOutputs
from mamba3_jepa.training.interrupt import Interrupted, StopRequested, StopSignal

_TOGETHER = 256  # answers spoken at once; they do not depend on it


def spoken(model: Mamba3Jepa, frozen: FrozenOutputs) -> Spoken:
    """The Y-Decoder's answers from the predicted embeddings of all samples.

    Raises:
        UserError: the decoder's outputs are not finite.
        Interrupted: SIGTERM or Ctrl-C.
    """
    pieces = torch.arange(len(frozen)).split(_TOGETHER)
    with StopSignal():
        try:
            shares = all_gather_object(on_every_rank(lambda: _share(model, frozen, pieces[rank() :: world_size()])))
        except StopRequested as request:
            raise Interrupted(
                "stopped by request while the model answered; the same command starts that again", request.number
            ) from None
    everything = [shares[number % world_size()][number // world_size()] for number in range(len(pieces))]
    return Spoken(
        texts=[text for said in everything for text in said.texts],
        doubt=torch.cat([torch.empty(0, N_DOUBTS), *(said.doubt for said in everything)]),
    )


def _share(model: Mamba3Jepa, frozen: FrozenOutputs, pieces: Sequence[Tensor]) -> list[Spoken]:
    done = []
    with StopSignal.heard_at_once(), CountReport("answers", len(frozen), "samples", rank() == 0) as report:
        for rows in pieces:
            done.append(Spoken.of(model, frozen.embedding[rows]))
            report.advance(len(rows) * world_size())
    return done
