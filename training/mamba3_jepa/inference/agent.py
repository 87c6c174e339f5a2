"""An agent: it looks, and where it is confused it calls a tool, is told what that says, and looks again.

The states are the predictor's; what a tool says is injected into them (`models.recursion.StateInjector`), and whether
it answers the question is judged (`KnowledgeProbe`). What does not answer is put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from mamba3_jepa.contract import MEMORY_TOOL
from mamba3_jepa.errors import UserError
from mamba3_jepa.inference.answerer import Answer, Answerer, Knowledge, Picture, Signal, Turn
from mamba3_jepa.inference.tools import ToolError, ToolRegistry

MAX_ROUNDS = 3
LEAST_PROBABILITY = 0.1  # a tool that the selector finds less likely is not called
LEAST_ANSWER = 0.5  # what a tool says is put back, if it is less likely to answer the question

Stop = Literal["sure", "no tool", "nothing new", "rounds"]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the model says and how confused it is, at first or after something was told.

    confusion: what is judged: after something was told, `Answer.confusion_after` where the model weighs that.
    """

    answer: str
    confidence: float
    confusion: float | None
    threshold: float | None
    sure: bool | None
    signal: Signal | None
    step: Literal["observe"] = "observe"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A tool that was called.

    probability: what the selector gave it among all tools; None where the model has no selector, or does not know it.
    result: what it said; None if it failed, or had nothing to say. error: how it failed.
    """

    tool: str
    probability: float | None
    result: str | None
    error: str | None
    step: Literal["call"] = "call"


@dataclass(frozen=True, kw_only=True)
class Injection:
    """What was told. answers: the probability that it answers the question, None where the model does not weigh it;
    kept: whether the next step goes on from it, or as if it had not been said."""

    knowledge: str
    answers: float | None
    kept: bool
    step: Literal["inject"] = "inject"


Step = Observation | Call | Injection


@dataclass(frozen=True, kw_only=True)
class AgentAnswer:
    """The last answer, and how it came about.

    stopped: "sure": the model is not confused, or no longer; "no tool": none is left that is likely to help; "nothing
    new": a tool said what was said before; "rounds": so many calls as are allowed. tools: the tools that were called.
    """

    question: str
    answer: Answer
    stopped: Stop
    tools: list[str]
    trace: list[Step]


class Agent:
    """Asks an `Answerer`, and tools where it is confused.

    The memory of the answerer, if it has one, is the tool "memory". Each tool is called at most once for a question: of
    those that are there, the one that the selector finds most likely, unless that is less than `LEAST_PROBABILITY`. A
    model without selector, or of whose tools none is there, tries all in their order, the memory first.
    """

    def __init__(self, answerer: Answerer, tools: ToolRegistry | None = None, *, max_rounds: int = MAX_ROUNDS) -> None:
        """
        Args:
            max_rounds: calls for one question.

        Raises:
            UserError: the model has no recursion, and so never knows that it needs help; or `max_rounds` is negative.
        """
        if answerer.model.recursion is None:
            raise UserError(
                "the model has no confusion monitor and no state injector, so it cannot know when to call a tool: "
                "phase 3 (train_agent.py) trains them"
            )
        if max_rounds < 0:
            raise UserError(f"`max_rounds` is {max_rounds}, it must be at least 0")
        self._answerer, self._max_rounds = answerer, max_rounds
        self._tools = ToolRegistry() if tools is None else tools
        self._recursion = answerer.model.recursion

    def run(self, image: Picture, question: str | None) -> AgentAnswer:
        """Answer one question.

        Raises:
            UserError: as `Answerer.ask_many`.
        """
        turn = self._answerer.observe(image, question)
        trace: list[Step] = [_seen(turn.answer)]
        called: list[str] = []
        said: set[str] = set()
        path = str(Path(image).absolute()) if isinstance(image, str | Path) else _path_of(image)
        while True:
            if turn.answer.sure:
                stopped: Stop = "sure"
                break
            choice = self._choice(turn, called)
            if choice is None:
                stopped = "no tool"
                break
            if len(called) == self._max_rounds:
                stopped = "rounds"
                break
            call, knowledge = self._call(*choice, turn, path)
            called.append(call.tool)
            trace.append(call)
            if call.result is None or knowledge is None:
                continue
            if call.result in said:
                stopped = "nothing new"
                break
            said.add(call.result)
            after = self._answerer.told(turn, knowledge)
            kept = after.told_answers is None or after.told_answers >= LEAST_ANSWER
            trace.append(Injection(knowledge=call.result, answers=after.told_answers, kept=kept))
            if kept:
                turn = after
                trace.append(_seen(turn.answer))
        asked = question or self._answerer.model.config.query_prompt
        return AgentAnswer(question=asked, answer=turn.answer, stopped=stopped, tools=called, trace=trace)

    def _choice(self, turn: Turn, called: Sequence[str]) -> tuple[str, float | None] | None:
        """The next tool with its probability; None if there is none to call."""
        there = [*([MEMORY_TOOL] if self._answerer.memory is not None else []), *self._tools]
        left = [name for name in there if name not in called]
        known = self._recursion.config.tools
        selector = self._recursion.tool_selector
        if selector is None or not set(known) & set(there):
            return (left[0], None) if left else None
        with torch.no_grad():
            probabilities = dict(zip(known, selector.score(turn.pooled)[0].tolist(), strict=True))
        likely = [name for name in left if probabilities.get(name, 0.0) >= LEAST_PROBABILITY]
        if not likely:
            return None
        best = max(likely, key=probabilities.__getitem__)
        return best, probabilities[best]

    def _call(
        self, name: str, probability: float | None, turn: Turn, image: str | None
    ) -> tuple[Call, Knowledge | None]:
        """What a tool said, and what of it is injected: its text, or of an episode the answer."""
        result: str | None = None
        knowledge: Knowledge | None = None
        error = None
        if name == MEMORY_TOOL:
            found = self._answerer.recalled(turn)
            if found is not None:
                result, knowledge = found.text, found.embedding
        else:
            try:
                knowledge = result = self._tools[name](turn.question, image).strip() or None
            except ToolError as problem:
                error = str(problem)
        return Call(tool=name, probability=probability, result=result, error=error), knowledge


def _seen(answer: Answer) -> Observation:
    return Observation(
        answer=answer.text,
        confidence=answer.confidence,
        confusion=answer.confusion if answer.confusion_after is None else answer.confusion_after,
        threshold=answer.threshold,
        sure=answer.sure,
        signal=answer.signal if not answer.sure else None,
    )


def _path_of(image: Image.Image | None) -> str | None:
    """The file that an opened image came from, if it did."""
    name = getattr(image, "filename", "")
    return str(Path(name).absolute()) if name else None
