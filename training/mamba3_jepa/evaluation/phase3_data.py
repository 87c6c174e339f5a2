"""What phase 3 is learned from and measured on: pooled states of the frozen model, what is confused, and the knowledge
that would help.

Letters: N samples, L lessons, E embedding width, D width of the pooled state, K length of a knowledge vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba3_jepa.data.confusion import ConfusionSource
from mamba3_jepa.data.confusion_plan import CONFUSION_KINDS
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.sample import OnBadSample, Sample
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.confusion import WRONG_ANSWER
from mamba3_jepa.evaluation.lessons import NOTHING, Findable, Lessons
from mamba3_jepa.evaluation.spoken import Spoken, is_right
from mamba3_jepa.models.vljepa import Mamba3Jepa

_TYPICAL = 4096  # samples whose knowledge says how large its elements are


class Rows(Protocol):
    """(N, W) numbers, in memory or not."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Rows (B,) int64 -> (B, W)."""
        ...


class Outputs(Protocol):
    """What a frozen model made of N samples of one source, on the CPU.

    index: (N,) int64, the samples' numbers in their source; embedding: (N, E) predicted embeddings; pooled: (N, D) the
    states they were read from; has_target: (N,) bool; bad: what was wrong with each sample that was left out.
    """

    @property
    def index(self) -> Tensor: ...
    @property
    def embedding(self) -> Rows: ...
    @property
    def pooled(self) -> Rows: ...
    @property
    def has_target(self) -> Tensor: ...
    @property
    def bad(self) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class Phase3Data:
    """N samples of a `ConfusionSource` with what the frozen model makes of them.

    spoken: what it answers. answered: (N,) bool, whether that can be right; wrong: (N,) bool, whether it is not.
    confused: (N,) bool, what the source says, or, where it leaves that to the model, that the answer is wrong.
    lessons: what it may be told about them. tools: N names of the tools that are needed, None where none is; tool:
    (N,) int64, their places in the model's `tools`, `NOTHING` where there is none.
    """

    source: ConfusionSource
    frozen: Outputs
    spoken: Spoken
    answered: Tensor
    wrong: Tensor
    confused: Tensor
    lessons: Lessons
    findable: Findable
    tools: list[str | None]
    tool: Tensor

    @staticmethod
    def of(model: Mamba3Jepa, source: ConfusionSource, frozen: Outputs, said: Spoken) -> Phase3Data:
        """Reads each sample's texts once.

        Raises:
            BadSampleError: a sample cannot be read any more.
        """
        labelled = torch.from_numpy(source.confused)[frozen.index]
        left_open = torch.from_numpy(source.answered)[frozen.index]
        answered = ~labelled & frozen.has_target
        wrong = torch.zeros(len(frozen.index), dtype=torch.bool)
        is_answered = answered.tolist()
        tools: list[str | None] = []

        def compare(row: int, sample: Sample) -> None:
            tools.append(sample.tool_used)
            if is_answered[row]:
                wrong[row] = not is_right(said.texts[row], sample)

        known = {name: place for place, name in enumerate(model.config.recursion.tools)}
        lessons = Lessons.about(model, source, frozen.index.tolist(), compare)
        return Phase3Data(
            source=source,
            frozen=frozen,
            spoken=said,
            answered=answered,
            wrong=wrong,
            confused=labelled | (wrong & left_open),
            lessons=lessons,
            findable=Findable(lessons),
            tools=tools,
            tool=torch.tensor([known.get(name or "", NOTHING) for name in tools], dtype=torch.int64),
        )

    def __len__(self) -> int:
        return len(self.frozen.index)

    def kinds(self) -> list[str]:
        """N kinds of confusion: where the source leaves that to the model, "clear" where its answer is right and
        `WRONG_ANSWER` where it is not; else what the source says."""
        kinds = [CONFUSION_KINDS[kind] for kind in self.source.kinds[self.frozen.index.numpy()]]
        left_open = self.answered & torch.from_numpy(self.source.answered)[self.frozen.index]
        wrong = (left_open & self.wrong).tolist()
        right = (left_open & ~self.wrong).tolist()
        return [
            WRONG_ANSWER if is_wrong else "clear" if is_right else kind
            for kind, is_wrong, is_right in zip(kinds, wrong, right, strict=True)
        ]

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


def check_knowledge(
    model: Mamba3Jepa,
    source: ConfusionSource,
    indices: NDArray[np.int64],
    *,
    on_bad_sample: OnBadSample = "error",
    demand_vectors: bool = True,
    finished: bool = False,
) -> None:
    """See to it that the knowledge that the data gives fits the model: that of some samples, and of all the others, for
    those may be told of it.

    With "skip", a sample that cannot be read is passed over; it is left out of the frozen model's outputs as well,
    which say so.

    Args:
        finished: the model is trained, and its `knowledge_dim` no choice any more.

    Raises:
        BadSampleError: a sample cannot be read.
        UserError: a vector has another length than the model's `knowledge_dim`; or that is not `embed_dim`, and there
            is a text, or, with `demand_vectors`, no vector at all; or a number is too large for float32. Names the file
            and line.
    """
    length, embed_dim = model.config.knowledge_dim, model.config.embed_dim
    index, wanted = source.indices("knowledge"), set(indices.tolist())
    instead = "measure without it (`skip_recursion`)" if finished else None
    if source.synthetic:
        index = index[:0]  # its knowledge are texts
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
                    f"numbers, but `knowledge_dim` is {length}: {instead or 'leave `knowledge_dim` out'}, or give only "
                    f"vectors of length {length}"
                )
        elif sample.knowledge is not None:
            if len(sample.knowledge) != length:
                raise UserError(
                    f'{_origin(sample)}: field "knowledge" is a vector of length {len(sample.knowledge)}, but this '
                    f"model takes {length}: correct it, or "
                    f"{instead or 'give `knowledge_dim` if all vectors have that length'}"
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
