"""What the frozen model answers to each sample of phase 3, whether that is right, and how much it doubted it.

Letters: N samples, S numbers of doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mamba3_jepa.data.plain_text import plain_text
from mamba3_jepa.data.sample import Sample
from mamba3_jepa.models.generation import N_DOUBTS, GenerationConfig, doubt, generate
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.training.distributed import all_gather_object, on_every_rank, rank, world_size
from mamba3_jepa.training.frozen import FrozenOutputs
from mamba3_jepa.training.interrupt import Interrupted, StopRequested, StopSignal
from mamba3_jepa.training.progress import CountReport

_TOGETHER = 256  # answers spoken at once; they do not depend on it


class Spoken(NamedTuple):
    """texts: N answers, greedily spoken; doubt: (N, S), see `generation.doubt`."""

    texts: list[str]
    doubt: Tensor


def spoken(model: Mamba3Jepa, frozen: FrozenOutputs) -> Spoken:
    """The Y-Decoder's answers from N predicted embeddings; several processes share the work.

    Raises:
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
        texts=[text for texts, _ in everything for text in texts],
        doubt=torch.cat([torch.empty(0, N_DOUBTS), *(doubts for _, doubts in everything)]),
    )


def is_right(said: str, sample: Sample) -> bool:
    """Whether `said` is one of the texts that are right, but for case and white space."""
    right = {plain_text(text) for text in (*sample.targets, *sample.answers)}
    return plain_text(said) in right


def _share(model: Mamba3Jepa, frozen: FrozenOutputs, pieces: Sequence[Tensor]) -> list[tuple[list[str], Tensor]]:
    done = []
    with StopSignal.heard_at_once(), CountReport("answers", len(frozen), "samples", rank() == 0) as report:
        for rows in pieces:
            done.append(_answers(model, frozen, rows))
            report.advance(len(rows) * world_size())
    return done


@torch.no_grad()
def _answers(model: Mamba3Jepa, frozen: FrozenOutputs, rows: Tensor) -> tuple[list[str], Tensor]:
    if model.y_decoder is None:
        raise ValueError("the model has no Y-Decoder")
    answers = generate(
        model.y_decoder,
        frozen.embedding[rows].to(model.device),
        bos_id=model.tokenizer.bos_id,
        eos_id=model.tokenizer.eos_id,
        config=GenerationConfig(),
        max_tokens=model.config.max_answer_tokens - 1,
        source=model.source,
    )
    return [model.tokenizer.decode(answer.ids).strip() for answer in answers], doubt(answers)
