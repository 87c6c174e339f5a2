"""What phase 3 learns from: pooled states of the frozen model, what is confused, and the knowledge that would help.

Letters: N samples, n of them with knowledge of their own, B rows, E embedding width, K length of a knowledge vector.
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
from mamba3_jepa.evaluation.memory_floor import MemoryFloor, choose_memory_floor
from mamba3_jepa.evaluation.retrieval import distinct
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Precision
from mamba3_jepa.training.distributed import on_every_rank
from mamba3_jepa.training.frozen import FrozenOutputs, frozen_outputs
from mamba3_jepa.training.spoken import Spoken, is_right, spoken

_FROZEN_BATCH = 64  # samples the frozen model sees at once
_TYPICAL = 4096  # samples whose knowledge says how large its elements are


@dataclass(frozen=True, kw_only=True)
class GivenKnowledge:
    """What the data itself says should be known. index: (n,) int64, samples of a source, ascending; vectors: (n, K)."""

    index: Tensor
    vectors: Tensor


@dataclass(frozen=True, kw_only=True)
class Phase3Data:
    """N samples of a `ConfusionSource` with what the frozen model makes of them.

    spoken: what it answers. confused: (N,) bool, what the source says, or that the answer is wrong where the source
    leaves that to the model (`answered`, (N,) bool). own: (N,) int64, each sample's row in `given`, -1 where it has
    none. Such a sample is told its right answer, as the Y-Encoder embeds it, if a knowledge vector is as long as that
    (`answers_are_knowledge`).
    """

    source: ConfusionSource
    frozen: FrozenOutputs
    spoken: Spoken
    answered: Tensor
    confused: Tensor
    own: Tensor
    given: GivenKnowledge
    answers_are_knowledge: bool

    def __len__(self) -> int:
        return len(self.frozen)

    def knowledge(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B,) int64 -> knowledge vectors (B, K), and whether there is one and a right answer to reach (B,).

        Zeros where not.
        """
        own, has_target = self.own[rows], self.frozen.has_target[rows]
        if self.answers_are_knowledge:
            vectors, known = self.frozen.target_embedding[rows], has_target
        else:
            vectors, known = self.given.vectors.new_zeros(len(rows), self.given.vectors.shape[1]), own >= 0
        if bool((own >= 0).any()):
            vectors[own >= 0] = self.given.vectors[own[own >= 0]]
        known = known & has_target
        return vectors * known.unsqueeze(1), known

    def knowledge_size(self) -> float:
        """Root mean square of the elements of the first knowledge vectors, to three digits; 1 if there are none."""
        vectors, known = self.knowledge(torch.arange(min(len(self), _TYPICAL)))
        size = float(vectors[known].double().square().mean().sqrt()) if bool(known.any()) else 0.0
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
        UserError: knowledge that does not fit the model (see `given_knowledge`), or a sample is unreadable.
        Interrupted: SIGTERM or Ctrl-C; complete parts are kept.
    """
    # first: what is wrong with it should be said at once
    given = on_every_rank(
        lambda: given_knowledge(model, source, indices, on_bad_sample=on_bad_sample, demand_vectors=demand_vectors)
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
    place = torch.full((len(source),), -1, dtype=torch.int64)
    place[given.index] = torch.arange(len(given.index))
    said = spoken(model, frozen)
    answered = torch.from_numpy(source.answered)[frozen.index] & frozen.has_target
    return Phase3Data(
        source=source,
        frozen=frozen,
        spoken=said,
        answered=answered,
        confused=torch.from_numpy(source.confused)[frozen.index] | _wrong(source, frozen, said, answered),
        own=place[frozen.index],
        given=given,
        answers_are_knowledge=model.config.knowledge_dim == model.config.embed_dim,
    )


def _wrong(source: ConfusionSource, frozen: FrozenOutputs, said: Spoken, answered: Tensor) -> Tensor:
    """(N,) bool: which of the `answered` samples are answered wrongly."""
    wrong = torch.zeros(len(frozen), dtype=torch.bool)
    for row in answered.nonzero().squeeze(1).tolist():
        wrong[row] = not is_right(said.texts[row], source.sample(int(frozen.index[row])))
    return wrong


def given_knowledge(
    model: Mamba3Jepa,
    source: ConfusionSource,
    indices: NDArray[np.int64],
    *,
    on_bad_sample: OnBadSample = "error",
    demand_vectors: bool = True,
) -> GivenKnowledge:
    """The knowledge that the data gives with some samples: vectors as they are, texts as the Y-Encoder embeds them.

    With "skip", a sample that cannot be read counts as one without knowledge; it is left out of the frozen model's
    outputs as well, which say so.

    Raises:
        BadSampleError: a sample cannot be read.
        UserError: a vector has another length than the model's `knowledge_dim`; or that is not `embed_dim`, and there
            is a text, or, with `demand_vectors`, no vector at all; or a number is too large for float32. Names the file
            and line.
    """
    length, embed_dim = model.config.knowledge_dim, model.config.embed_dim
    index = np.intersect1d(indices, source.indices("knowledge"))
    vectors = torch.zeros(len(index), length)
    texts: dict[str, list[int]] = {}
    for row, i in enumerate(index):
        try:
            sample = source.sample(int(i))
        except BadSampleError:
            if on_bad_sample == "error":
                raise
            continue
        if isinstance(sample.knowledge, str):
            if length != embed_dim:
                raise UserError(
                    f'{_origin(sample)}: field "knowledge" is a text, which the Y-Encoder turns into {embed_dim} '
                    f"numbers, but `knowledge_dim` is {length}: leave `knowledge_dim` out, or give only vectors of "
                    f"length {length}"
                )
            texts.setdefault(sample.knowledge, []).append(row)
        elif sample.knowledge is not None:
            if len(sample.knowledge) != length:
                raise UserError(
                    f'{_origin(sample)}: field "knowledge" is a vector of length {len(sample.knowledge)}, but this '
                    f"model takes {length}: correct it, or give `knowledge_dim` if all vectors have that length"
                )
            vectors[row] = torch.tensor(sample.knowledge, dtype=torch.float32)
            if not vectors[row].isfinite().all():
                raise UserError(f'{_origin(sample)}: field "knowledge" holds a number too large for float32')
    if demand_vectors and length != embed_dim and not len(index):
        raise UserError(
            f"`knowledge_dim` {length}: {source.name} has no knowledge vectors, and what the Y-Encoder makes of its "
            f"answers has length {embed_dim}; leave `knowledge_dim` out"
        )
    if texts:
        for rows, embedding in zip(texts.values(), model.embed_text(list(texts)).cpu(), strict=True):
            vectors[rows] = embedding
    return GivenKnowledge(index=torch.from_numpy(index), vectors=vectors)


def knowledge_text(sample: Sample) -> str | None:
    """The text whose embedding is the sample's knowledge; None where that is a vector, or nothing is known."""
    if sample.knowledge is None:
        return sample.target
    return sample.knowledge if isinstance(sample.knowledge, str) else None


def memory_floor(val: Phase3Data, samples: list[Sample]) -> MemoryFloor:
    """Chosen on lookups in a memory of all knowledge texts of the N validation samples, which are the same at every
    validation. Vectors are not looked up."""
    knowledge, usable = val.knowledge(torch.arange(len(val)))
    texts = {row: knowledge_text(samples[row]) for row in usable.nonzero().squeeze(1).tolist()}
    known = {row: text for row, text in texts.items() if text is not None and val.answers_are_knowledge}
    if not known:
        return MemoryFloor.none()
    labels, first = distinct(list(known.values()))
    rows = torch.tensor(list(known))
    confused = val.confused[rows]
    return choose_memory_floor(
        val.frozen.embedding[rows[confused]], torch.tensor(labels)[confused], knowledge[rows[first]]
    )


def _origin(sample: Sample) -> str:
    return str(sample.meta.get("origin", "a sample"))
