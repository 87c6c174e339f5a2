"""Answers to questions about images, with what the model thinks of them.

Shape letters: B questions, G known answers, D width of the pooled state, E embedding width, K knowledge width.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mamba3_jepa.contract import CLASS_TEMPERATURE
from mamba3_jepa.errors import UserError
from mamba3_jepa.inference.confusion import Confusion, Signal, judge
from mamba3_jepa.inference.memory import KnowledgeMemory, MemoryKind
from mamba3_jepa.inference.recall import Recall, Recalled
from mamba3_jepa.inference.zero_shot import class_probabilities
from mamba3_jepa.models.finite import demand_finite
from mamba3_jepa.models.generation import Generated
from mamba3_jepa.models.recursion import Recursion
from mamba3_jepa.models.vljepa import Mamba3Jepa, Observation
from mamba3_jepa.settings.inference import GenerationConfig, Inject

logger = logging.getLogger(__name__)

Picture = str | Path | Image.Image | None
Knowledge = str | Sequence[float] | Tensor

_AVERAGES = 1024  # questions whose average is kept, so that what serves for ever stays as large as it is


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says to one question, and about it.

    text: the generated answer; of a model without Y-Decoder, the nearest known answer.
    confidence: in [0, 1], the geometric mean of the probabilities of the answer's tokens, the end mark included;
        without Y-Decoder, the share of the nearest known answer in a softmax over all of them (temperature
        `CLASS_TEMPERATURE`).
    confusion: P(confused) in this turn; smoothed_confusion: its moving average over the turns with this question so
        far. Both are None without recursion, as is `confused`.
    threshold: the one that travels with the model.
    confused: whether the score that is judged (see `Answerer`) is over it.
    signal: what confuses it, see `Signal`; None where it is not confused.
    confusion_after: P(confused) after something was injected: `confusion` times the probability that it does not answer
        what was asked. None where nothing was, or the model does not weigh knowledge.
    sure: whether the answer is worth giving: the model is not confused, or no longer, after something was injected (a
        model that does not weigh it takes everything for an answer). None without recursion.
    nearest: known answers and their cosines, nearest first.
    memory_used: what was injected from the memory, a fact's text, or an episode's question and answer; None if nothing
        was, because the model is not confused, or nothing in the memory is near enough.
    memory_kind: which of the two it is.
    knowledge_used: whether the knowledge that was given was injected.
    warnings: sentences to be said aloud.
    """

    text: str
    confidence: float
    confusion: float | None
    smoothed_confusion: float | None
    threshold: float | None
    confused: bool | None
    signal: Signal | None
    confusion_after: float | None
    sure: bool | None
    nearest: list[tuple[str, float]]
    memory_used: str | None
    memory_kind: MemoryKind | None
    knowledge_used: bool
    warnings: tuple[str, ...] = ()


class Turn(NamedTuple):
    """A question, the state (1, D) that it is answered from, what its picture looks like (`Observation.picture`), the
    answer, and the probability that what was told last answers the question (None where nothing was, or the model does
    not weigh it)."""

    question: str | None
    pooled: Tensor
    picture: Tensor
    answer: Answer
    told_answers: float | None = None


class Answerer:
    """Asks a model, turn by turn.

    Where the model has a recursion part, every question has a score of confusion. If it is greater than the threshold,
    the knowledge that is given is injected into the pooled state, and the answer read from there. If none is given and
    there is a memory, what is recalled from it is (see `recall.Recall`): the text of a fact, or the answer of an
    episode. Otherwise nothing is injected. Comparisons are in float32.

    Attributes:
        observed: what the model made of the last turns, before it was told anything; None before the first.
    """

    def __init__(
        self,
        model: Mamba3Jepa,
        memory: KnowledgeMemory | None = None,
        known_answers: KnowledgeMemory | Sequence[str] | None = None,
        generation: GenerationConfig | None = None,
        *,
        smooth: bool = False,
        inject: Inject = "confused",
        top: int = 5,
    ) -> None:
        """
        Args:
            model: in eval mode.
            memory: what to look up when confused.
            known_answers: candidates for `Answer.nearest`, and for the text itself where there is no Y-Decoder; with
                their embeddings, or to be embedded now.
            generation: how to choose the tokens; greedy by default.
            smooth: turns with the same question belong together, as of the frames of a film: judge confusion by its
                moving average over them. Otherwise each turn is judged by itself, which is what the threshold was
                chosen for.
            inject: given knowledge where the model is confused, or "always". Who is not confused is told nothing: it
                would turn some answers that are right.
            top: how many known answers to name.

        Raises:
            UserError: the model cannot do what is asked of it.
        """
        if model.y_decoder is None and not known_answers:
            raise UserError(
                "the model has no Y-Decoder yet (phase 2 trains it), so it can only choose among known answers, and "
                "none are known: give `answers`, a text file with one answer a line"
            )
        if memory is not None:
            _demand_text_knowledge(model, "a memory")
        self.model, self.memory, self.smooth, self.inject, self.top = model, memory, smooth, inject, top
        self.generation = GenerationConfig() if generation is None else generation
        if model.y_decoder is not None:
            self.generation.demand_choice(model.config.vocab_size)
        if isinstance(known_answers, KnowledgeMemory):
            self._known: KnowledgeMemory | None = known_answers
        else:
            self._known = KnowledgeMemory.build(model, known_answers) if known_answers else None
        self.recall = None if memory is None else Recall(model, _recursion(model), memory)
        self.observed: Observation | None = None
        self._smoothed: dict[str, Tensor] = {}  # by question, those asked last at the end
        self._turns = 0

    def reset(self) -> None:
        """Forget the turns so far: the next question starts a new conversation."""
        self._smoothed, self._turns = {}, 0

    def ask(self, image: Picture, question: str | None, knowledge: Knowledge | None = None) -> Answer:
        """One turn; see `ask_many`."""
        return self.ask_many([image], [question], knowledge)[0]

    def ask_many(
        self,
        images: Sequence[Picture],
        questions: Sequence[str | None],
        knowledge: Knowledge | None = None,
        batch_size: int = 32,
    ) -> list[Answer]:
        """B turns in their order, computed together.

        Args:
            images: per turn a file, an image, or None.
            questions: per turn a text, or None to describe the image.
            knowledge: a text, or a vector (K,), for every turn.

        Raises:
            UserError: an empty question, an image that cannot be read, knowledge that does not fit the model, an
                embedding or a score that is not finite.
        """
        return self._asked(images, questions, knowledge, batch_size, self.recall)[0]

    def observe(self, image: Picture, question: str | None) -> Turn:
        """One turn in which nothing is told and nothing is looked up.

        Raises:
            UserError: as `ask_many`.
        """
        answers, seen = self._asked([image], [question], None, 1, None)
        return Turn(question, seen.pooled, seen.picture, answers[0])

    @torch.no_grad()
    def told(self, turn: Turn, knowledge: Knowledge) -> Turn:
        """The same turn after something was injected, however confused the model is; once more, if it was before.

        Raises:
            UserError: knowledge that does not fit the model, an embedding that is not finite.
        """
        recursion, vector = _recursion(self.model), self._vector(knowledge).unsqueeze(0)
        pooled = recursion.injector(turn.pooled, vector)
        embedding = self._read(pooled)
        self._demand_finite(embedding, "the embedding with the knowledge", [turn.question])
        text, confidence = self._say(embedding, 1, None)
        before = turn.answer.confusion if turn.answer.confusion_after is None else turn.answer.confusion_after
        answers = self._answers(turn.pooled, vector)
        after = None if answers is None else float(torch.tensor([before]) * (1 - answers))
        answer = dataclasses.replace(
            turn.answer,
            text=text[0],
            confidence=confidence[0],
            nearest=self._nearest(embedding)[0],
            confusion_after=after,
            sure=self._is_sure(True, True, after),
            knowledge_used=True,
        )
        return turn._replace(pooled=pooled, answer=answer, told_answers=None if answers is None else float(answers))

    @torch.no_grad()
    def recalled(self, turn: Turn) -> Recalled | None:
        """What the memory has for a turn; None where there is none, or nothing near enough.

        Raises:
            UserError: as `ask_many`.
        """
        if self.recall is None:
            return None
        observed = Observation(self._read(turn.pooled), turn.pooled, turn.picture)
        return self.recall.look_up(observed, [turn.question])[0]

    @torch.no_grad()
    def _asked(
        self,
        images: Sequence[Picture],
        questions: Sequence[str | None],
        knowledge: Knowledge | None,
        batch_size: int,
        recall: Recall | None,
    ) -> tuple[list[Answer], Observation]:
        """B answers, and what was observed before anything was injected."""
        vector = None if knowledge is None else self._vector(knowledge)
        self.observed = self.model.observe(images, questions, batch_size)
        embedding, pooled = self.observed.embedding.clone(), self.observed.pooled
        self._demand_finite(embedding, "the embedding predicted", questions)
        warnings = [self._warnings(question) for question in questions]
        confusions, greedy = judge(self.model, embedding, pooled, self._texts(questions), batch_size)
        averages = [self._average(*turn) for turn in zip(self._texts(questions), confusions, strict=True)]
        judged = averages if self.smooth else confusions
        confused = [each is not None and each.confused for each in judged]
        used: dict[int, Recalled] = {}
        told = [False] * len(questions)
        if vector is not None:
            told = [self.inject == "always" or is_confused for is_confused in confused]
        elif recall is not None and any(confused):
            rows = [i for i, is_confused in enumerate(confused) if is_confused]
            some = Observation(*(values[rows] for values in self.observed))
            recalled = recall.look_up(some, [questions[i] for i in rows])
            used = {i: found for i, found in zip(rows, recalled, strict=True) if found is not None}
        rows, injected = list(used), None
        if vector is not None and any(told):
            rows = [i for i, is_told in enumerate(told) if is_told]
            injected = vector.expand(len(rows), -1)
        elif used:
            injected = torch.stack([found.embedding for found in used.values()]).to(pooled.device)
        after: dict[int, float] = {}
        if injected is not None:
            embedding[rows] = self._read(_recursion(self.model).injector(pooled[rows], injected))
            answers_it = self._answers(pooled[rows], injected)
            if answers_it is not None:
                before = torch.tensor([each.score for i in rows if (each := confusions[i]) is not None])
                after = dict(zip(rows, (before * (1 - answers_it)).tolist(), strict=True))
        self._demand_finite(embedding, "the embedding with the knowledge", questions)
        nearest = self._nearest(embedding)
        is_said = greedy is not None and self.generation == GenerationConfig() and not used and not any(told)
        texts, confidence = self._say(embedding, batch_size, greedy if is_said else None)
        self._turns += len(questions)
        answers = [
            Answer(
                text=texts[i],
                confidence=confidence[i],
                confusion=None if plain is None else plain.score,
                smoothed_confusion=None if average is None else average.score,
                threshold=None if plain is None else plain.threshold,
                confused=None if plain is None else confused[i],
                signal=None if plain is None or not confused[i] else plain.signal or "before",
                confusion_after=after.get(i),
                sure=None if plain is None else self._is_sure(confused[i], told[i] or i in used, after.get(i)),
                nearest=nearest[i],
                memory_used=used[i].text if i in used else None,
                memory_kind=used[i].kind if i in used else None,
                knowledge_used=told[i],
                warnings=warnings[i],
            )
            for i, (plain, average) in enumerate(zip(confusions, averages, strict=True))
        ]
        return answers, self.observed

    def _is_sure(self, confused: bool, is_told: bool, after: float | None) -> bool:
        if not confused or not is_told or after is None:
            return not confused or is_told
        return after <= float(_recursion(self.model).confusion_probe.threshold)

    def _answers(self, pooled: Tensor, knowledge: Tensor) -> Tensor | None:
        """(B,) probabilities that knowledge (B, K) answers what was asked in states (B, D); None where the model does
        not weigh it."""
        probe = _recursion(self.model).knowledge_probe
        return None if probe is None else probe.score(pooled, knowledge).cpu()

    def _demand_finite(self, values: Tensor, what: str, questions: Sequence[str | None]) -> None:
        demand_finite(values, self.model, f"{what} for", self._texts(questions))

    def _texts(self, questions: Sequence[str | None]) -> list[str]:
        """What the model is asked: its prompt where there is no question."""
        return [question or self.model.config.query_prompt for question in questions]

    def _average(self, question: str, confusion: Confusion | None) -> Confusion | None:
        """The next turn's confusion with the moving average of the turns with its question so far for its score."""
        if confusion is None:
            return None
        probe = _recursion(self.model).confusion_probe
        average = probe.smooth(torch.tensor(confusion.score), self._smoothed.pop(question, None))
        self._smoothed[question] = average
        if len(self._smoothed) > _AVERAGES:
            del self._smoothed[next(iter(self._smoothed))]
        return dataclasses.replace(confusion, score=float(average))

    def _read(self, pooled: Tensor) -> Tensor:
        """Pooled states (B, D), with knowledge or without -> embeddings (B, E)."""
        embedding = self.model.predictor.embed(pooled).float()
        is_unit = embedding.norm(dim=-1, keepdim=True) > 0.5  # finite numbers may have a length that is not
        return embedding.where(is_unit, torch.nan)

    def _nearest(self, embedding: Tensor) -> list[list[tuple[str, float]]]:
        """The nearest known answers of B embeddings (B, E)."""
        return [[] for _ in embedding] if self._known is None else self._known.search(embedding, self.top)

    def _say(self, embedding: Tensor, batch_size: int, said: list[Generated] | None) -> tuple[list[str], list[float]]:
        """Texts and confidences of B embeddings (B, E); `said`: what the decoder says of them, where that is known."""
        model = self.model
        if model.y_decoder is None:
            assert self._known is not None  # or there would be no Answerer
            shares = class_probabilities(embedding.cpu(), self._known.embeddings, CLASS_TEMPERATURE)
            best = shares.max(dim=-1)
            return [self._known.texts[i] for i in best.indices.tolist()], best.values.tolist()
        answers = self._generated(embedding, batch_size, self.generation) if said is None else said
        confidence = [math.exp(sum(answer.log_probs) / len(answer.log_probs)) for answer in answers]
        return [model.tokenizer.decode(answer.ids).strip() for answer in answers], confidence

    def _generated(self, embedding: Tensor, batch_size: int, config: GenerationConfig) -> list[Generated]:
        """What the decoder says of B embeddings (B, E)."""
        return self.model.say(embedding, config, batch_size=batch_size, first_row=self._turns)

    def _vector(self, knowledge: Knowledge) -> Tensor:
        """(K,) on the model's device."""
        model = self.model
        if isinstance(knowledge, str):
            _demand_text_knowledge(model, "a knowledge text")
            return model.embed_text([knowledge])[0]
        expected = _recursion(model).injector.projection.in_features
        vector = torch.as_tensor(knowledge, dtype=torch.float32, device=model.device)
        if vector.ndim != 1 or len(vector) != expected:
            found = f"length {len(vector)}" if vector.ndim == 1 else f"shape {tuple(vector.shape)}"
            raise UserError(f"the knowledge vector has {found}, but this model takes length {expected}")
        if not vector.isfinite().all():
            raise UserError("the knowledge vector has a value that is not finite")
        return vector

    def _warnings(self, question: str | None) -> tuple[str, ...]:
        """Says that the model cannot read the question, if so."""
        unlearned = "" if question is None else self.model.tokenizer.unlearned(question)
        if not unlearned:
            return ()
        letters = [character for character in question or "" if character.isalpha()]
        strange = sum(character in unlearned for character in letters)
        what = "this script" if 2 * strange > len(letters) else f"the characters {unlearned}"
        quoted = json.dumps(question, ensure_ascii=False)
        warning = f"{quoted}: the tokenizer has not seen {what} in training; the answer means little"
        logger.warning(warning)
        return (warning,)


def _recursion(model: Mamba3Jepa) -> Recursion:
    if model.recursion is None:
        raise UserError(
            "the model has no confusion monitor and no state injector, so it cannot use knowledge: phase 3 "
            "(train_agent.py) trains them"
        )
    return model.recursion


def _demand_text_knowledge(model: Mamba3Jepa, what: str) -> None:
    expected = _recursion(model).injector.projection.in_features
    if expected != model.config.embed_dim:
        raise UserError(
            f"this model takes knowledge vectors of length {expected}, but its Y-Encoder embeds texts as "
            f"{model.config.embed_dim} numbers, so {what} cannot be injected: give a vector of length {expected}"
        )
