"""What phase 3 may be told about its samples, embedded: knowledge vectors, and the embeddings that they should lead to.

Letters: N samples, n lessons about them, V different pieces of knowledge, A different answers, E embedding width, K
length of a knowledge vector, B rows, M texts that tell a question nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba3_jepa.data.confusion import ConfusionSource, topic
from mamba3_jepa.data.lesson import FINDABLE, LESSON_FORMS
from mamba3_jepa.data.plain_text import plain_text
from mamba3_jepa.data.question_type import asked_type
from mamba3_jepa.data.sample import Sample
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.models.vljepa import Mamba3Jepa

_TOGETHER = 256  # texts that the Y-Encoder sees at once
NOTHING = -1  # in the place of a row: there is none


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """n lessons, in the order of the N samples that they are about.

    start: (N + 1,) int64, sample i has the lessons start[i] to start[i + 1]. form: (n,) uint8, places in
    `LESSON_FORMS`. knowledge: (n,) int64, rows of `vectors` (V, K). answer: (n,) int64, rows of `answers` (A, E),
    `NOTHING` where the lesson tells nothing. texts: V, the empty text for a vector of the data's; answer_texts: A.
    question: (N,) int64, rows of `questions` (Q, E), `NOTHING` for captions; question_texts: Q. type: N,
    what is asked, None for captions. topic: (N,) uint64, equal for samples that ask the same. other_topics: (t,)
    uint64, what lessons answer whatever their own sample asks, and tell_them: (t,) int64, which knowledge does.
    """

    start: Tensor
    form: Tensor
    knowledge: Tensor
    vectors: Tensor
    texts: list[str]
    answer: Tensor
    answers: Tensor
    answer_texts: list[str]
    question: Tensor
    questions: Tensor
    question_texts: list[str]
    type: list[str | None]
    topic: NDArray[np.uint64]
    other_topics: NDArray[np.uint64]
    tell_them: NDArray[np.int64]

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The lessons about some samples (B,): their numbers (L,), and which of the B each is about (L,)."""
        counts = self.start[rows + 1] - self.start[rows]
        about = torch.repeat_interleave(torch.arange(len(rows)), counts)
        within = torch.arange(len(about)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return self.start[rows][about] + within, about

    def are(self, forms: Sequence[str], lessons: Tensor) -> Tensor:
        """(L,) bool: which of some lessons (L,) are of these forms."""
        return torch.isin(
            self.form[lessons], torch.tensor([LESSON_FORMS.index(form) for form in forms], dtype=torch.uint8)
        )

    def asked(self) -> list[str | None]:
        """N questions, None for captions."""
        return [None if row == NOTHING else self.question_texts[row] for row in self.question.tolist()]

    @staticmethod
    def about(
        model: Mamba3Jepa,
        source: ConfusionSource,
        indices: Sequence[int],
        see: Callable[[int, Sample], None] | None = None,
    ) -> Lessons:
        """Lessons about N samples of `source`, all texts embedded by the model's Y-Encoder.

        Texts are left out where the model takes no knowledge of that length; vectors have that length
        (`phase3_data.check_knowledge`).

        Args:
            see: called with each sample and its place among the N, so that it need not be read again.

        Raises:
            BadSampleError: a sample cannot be read.
        """
        takes_texts = model.config.knowledge_dim == model.config.embed_dim
        vectors, answers, questions = _Table(), _Table(), _Table()
        start, form, knowledge, answer, question, topics = [0], [], [], [], [], []
        types: list[str | None] = []
        others: dict[tuple[str, int], None] = {}
        for row, index in enumerate(indices):
            sample = source.sample(index)
            if see is not None:
                see(row, sample)
            question.append(NOTHING if sample.question is None else questions.row(sample.question))
            topics.append(stable_hash(topic(sample)))
            types.append(asked_type(sample))
            for lesson in source.lessons(index, sample):
                if isinstance(lesson.knowledge, str) and not takes_texts:
                    continue
                form.append(LESSON_FORMS.index(lesson.form))
                knowledge.append(vectors.row(lesson.knowledge))
                answer.append(NOTHING if lesson.answer is None else answers.row(lesson.answer))
                others |= dict.fromkeys((asked, knowledge[-1]) for asked in lesson.answers)
            start.append(len(form))
        return Lessons(
            start=torch.tensor(start),
            form=torch.tensor(form, dtype=torch.uint8),
            knowledge=torch.tensor(knowledge, dtype=torch.int64),
            vectors=vectors.embedded(model, model.config.knowledge_dim),
            texts=[each if isinstance(each, str) else "" for each in vectors.rows],
            answer=torch.tensor(answer, dtype=torch.int64),
            answers=answers.embedded(model, model.config.embed_dim),
            answer_texts=[str(each) for each in answers.rows],
            question=torch.tensor(question, dtype=torch.int64),
            questions=questions.embedded(model, model.config.embed_dim),
            question_texts=[str(each) for each in questions.rows],
            type=types,
            topic=np.array(topics, dtype=np.uint64),
            other_topics=np.array([stable_hash(plain_text(asked)) for asked, _ in others], dtype=np.uint64),
            tell_them=np.array([told for _, told in others], dtype=np.int64),
        )


class _Table:
    """Different texts and vectors, each with its row."""

    def __init__(self) -> None:
        self.rows: dict[str | bytes, int] = {}

    def row(self, value: str | Sequence[float]) -> int:
        key = value if isinstance(value, str) else np.array(value, dtype=np.float32).tobytes()
        return self.rows.setdefault(key, len(self.rows))

    def embedded(self, model: Mamba3Jepa, length: int) -> Tensor:
        """(rows, length) float32 on the CPU."""
        found = torch.zeros(len(self.rows), length)
        texts = {value: row for value, row in self.rows.items() if isinstance(value, str)}
        if texts:
            found[list(texts.values())] = model.embed_text(list(texts), batch_size=_TOGETHER).cpu()
        for value, row in self.rows.items():
            if not isinstance(value, str):
                found[row] = torch.frombuffer(bytearray(value), dtype=torch.float32)
        return found


class Findable:
    """Which texts answer which questions, for the memory's retriever."""

    def __init__(self, lessons: Lessons) -> None:
        self._lessons = lessons
        numbers = torch.arange(len(lessons.form))
        about = torch.repeat_interleave(torch.arange(len(lessons.start) - 1), lessons.start.diff())
        is_text = torch.tensor([bool(text) for text in lessons.texts])
        chosen = numbers[lessons.are(FINDABLE, numbers) & (lessons.question[about] >= 0)]
        chosen = chosen[is_text[lessons.knowledge[chosen]]] if len(chosen) else chosen
        # an answer by itself says nothing of what it answers
        says_more = [
            lessons.texts[told] != lessons.answer_texts[answer]
            for told, answer in zip(lessons.knowledge[chosen].tolist(), lessons.answer[chosen].tolist(), strict=True)
        ]
        chosen = chosen[torch.tensor(says_more, dtype=torch.bool)]
        # (F,) texts that answer, and the samples whose questions they answer
        self.text, self.about = lessons.knowledge[chosen], about[chosen]
        self.pool = self.text.unique()
        self._first = torch.searchsorted(self.about, torch.arange(len(lessons.start) - 1))
        self._count = torch.bincount(self.about, minlength=len(lessons.start) - 1)
        own = _pair(lessons.topic[self.about.numpy()], self.text.numpy())
        self._answering = np.unique(np.concatenate([own, _pair(lessons.other_topics, lessons.tell_them)]))

    def right(self, rows: Tensor, epoch: int) -> Tensor:
        """For samples (B,) a text that answers the question, another in other epochs; `NOTHING` where there is none."""
        count = self._count[rows]
        turn = torch.from_numpy(_mixed(rows.numpy(), epoch, 1)[:, 0].astype(np.int64) & 0xFFFFFF)
        place = self._first[rows] + turn % count.clamp(min=1)
        return (
            torch.where(count > 0, self.text[place.clamp(max=len(self.text) - 1)], NOTHING)
            if len(self.text)
            else torch.full_like(rows, NOTHING)
        )

    def others(self, rows: Tensor, epoch: int, n: int) -> Tensor:
        """For samples (B,) n texts (B, n) drawn from all; `NOTHING` where one was drawn that does answer."""
        if not len(self.pool):
            return torch.full((len(rows), n), NOTHING)
        drawn = self.pool[
            torch.from_numpy((_mixed(rows.numpy(), epoch, n) % np.uint64(len(self.pool))).astype(np.int64))
        ]
        topics = np.repeat(self._lessons.topic[rows.numpy()], n)
        answers = np.isin(_pair(topics, drawn.flatten().numpy()), self._answering).reshape(len(rows), n)
        return torch.where(torch.from_numpy(answers), NOTHING, drawn)

    def answering(self, rows: Tensor, places: Tensor) -> Tensor:
        """(B, C) bool: which of some texts, places (C,) in `pool`, answer the questions of some samples (B,)."""
        topics = np.repeat(self._lessons.topic[rows.numpy()], len(places))
        texts = np.tile(self.pool[places].numpy(), len(rows))
        return torch.from_numpy(np.isin(_pair(topics, texts), self._answering).reshape(len(rows), len(places)))


def _pair(topics: NDArray[np.uint64], texts: NDArray[np.int64]) -> NDArray[np.uint64]:
    return topics * np.uint64(0x9E3779B97F4A7C15) + texts.astype(np.uint64)


def _mixed(rows: NDArray[np.int64], epoch: int, n: int) -> NDArray[np.uint64]:
    """(B, n) numbers as if drawn, from row, epoch and place alone (the finaliser of splitmix64, Steele et al. 2014)."""
    key = np.uint64((epoch * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64)
    z = (rows.astype(np.uint64)[:, None] * np.uint64(n) + np.arange(n, dtype=np.uint64)) * np.uint64(
        0xBF58476D1CE4E5B9
    ) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
