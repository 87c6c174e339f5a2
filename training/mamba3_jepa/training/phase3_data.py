"""What phase 3 learns from: pooled states of the frozen model, what is confused, and the knowledge that would help.

Letters: N samples, L lessons, E embedding width, K length of a knowledge vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba3_jepa.data.confusion import ConfusionSource
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.sample import OnBadSample, Sample
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Precision
from mamba3_jepa.training.distributed import on_every_rank
from mamba3_jepa.training.frozen import FrozenOutputs, frozen_outputs
from mamba3_jepa.training.lessons import Findable, Lessons
from mamba3_jepa.training.spoken import Spoken, is_right, spoken

_FROZEN_BATCH = 64  # samples the frozen model sees at once
_TYPICAL = 4096  # samples whose knowledge says how large its elements are


@dataclass(frozen=True, kw_only=True)
class Phase3Data:
    """N samples of a `ConfusionSource` with what the frozen model makes of them.

    spoken: what it answers. confused: (N,) bool, what the source says, or that the answer is wrong where the source
    leaves that to the model (`answered`, (N,) bool). lessons: what it may be told about them.
    """

    source: ConfusionSource
    frozen: FrozenOutputs
    spoken: Spoken
    answered: Tensor
    confused: Tensor
    lessons: Lessons
    findable: Findable

    def __len__(self) -> int:
        return len(self.frozen)

    def goals(self, lessons: Tensor, rows: Tensor) -> Tensor:
        """The embeddings (L, E) that lessons (L,) about samples (L,) should lead to.

        Who is confused believes what answers the question. Who is not keeps to what is seen, whatever is said against
        it; and what tells nothing changes nothing.
        """
        answer = self.lessons.answer[lessons]
        is_false = self.lessons.are(["false"], lessons)
        changes = (answer >= 0) & (self.confused[rows] | ~is_false)
        goals = self.frozen.embedding[rows].clone()
        goals[changes] = self.lessons.answers[answer[changes]]
        return goals

    def knowledge_size(self) -> float:
        """Root mean square of the elements of the first knowledge vectors, to three digits; 1 if there are none."""
        vectors = self.lessons.vectors[:_TYPICAL]
        size = float(vectors.double().square().mean().sqrt()) if len(vectors) else 0.0
        return float(f"{size:.3g}") or 1.0


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
    answered = torch.from_numpy(source.answered)[frozen.index] & frozen.has_target
    lessons = on_every_rank(lambda: Lessons.about(model, source, frozen.index.tolist()))
    return Phase3Data(
        source=source,
        frozen=frozen,
        spoken=said,
        answered=answered,
        confused=torch.from_numpy(source.confused)[frozen.index] | _wrong(source, frozen, said, answered),
        lessons=lessons,
        findable=Findable(lessons),
    )


def _wrong(source: ConfusionSource, frozen: FrozenOutputs, said: Spoken, answered: Tensor) -> Tensor:
    """(N,) bool: which of the `answered` samples are answered wrongly."""
    wrong = torch.zeros(len(frozen), dtype=torch.bool)
    for row in answered.nonzero().squeeze(1).tolist():
        wrong[row] = not is_right(said.texts[row], source.sample(int(frozen.index[row])))
    return wrong


def check_knowledge(
    model: Mamba3Jepa,
    source: ConfusionSource,
    indices: NDArray[np.int64],
    *,
    on_bad_sample: OnBadSample = "error",
    demand_vectors: bool = True,
) -> None:
    """See to it that the knowledge that the data gives fits the model: that of some samples, and of all the others, for
    those may be told of it.

    With "skip", a sample that cannot be read is passed over; it is left out of the frozen model's outputs as well,
    which say so.

    Raises:
        BadSampleError: a sample cannot be read.
        UserError: a vector has another length than the model's `knowledge_dim`; or that is not `embed_dim`, and there
            is a text, or, with `demand_vectors`, no vector at all; or a number is too large for float32. Names the file
            and line.
    """
    length, embed_dim = model.config.knowledge_dim, model.config.embed_dim
    index, wanted = source.indices("knowledge"), set(indices.tolist())
    for i in index.tolist():
        try:
            sample = source.sample(i)
        except BadSampleError:
            if on_bad_sample == "error" and i in wanted:
                raise
            continue
        if isinstance(sample.knowledge, str):
            if length != embed_dim:
                raise UserError(
                    f'{_origin(sample)}: field "knowledge" is a text, which the Y-Encoder turns into {embed_dim} '
                    f"numbers, but `knowledge_dim` is {length}: leave `knowledge_dim` out, or give only vectors of "
                    f"length {length}"
                )
        elif sample.knowledge is not None:
            if len(sample.knowledge) != length:
                raise UserError(
                    f'{_origin(sample)}: field "knowledge" is a vector of length {len(sample.knowledge)}, but this '
                    f"model takes {length}: correct it, or give `knowledge_dim` if all vectors have that length"
                )
            if not torch.tensor(sample.knowledge, dtype=torch.float32).isfinite().all():
                raise UserError(f'{_origin(sample)}: field "knowledge" holds a number too large for float32')
    if demand_vectors and length != embed_dim and not len(index):
        raise UserError(
            f"`knowledge_dim` {length}: {source.name} has no knowledge vectors, and what the Y-Encoder makes of its "
            f"answers has length {embed_dim}; leave `knowledge_dim` out"
        )


def _origin(sample: Sample) -> str:
    return str(sample.meta.get("origin", "a sample"))
