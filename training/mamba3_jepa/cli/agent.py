"""`mamba3-jepa agent`."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from mamba3_jepa.cli.ask import known_answers_of
from mamba3_jepa.cli.output import printable, write_out
from mamba3_jepa.data.images import load_image
from mamba3_jepa.files.json_file import write_json
from mamba3_jepa.files.whole_file import demand_writable
from mamba3_jepa.inference.agent import Agent, AgentAnswer, Call, Injection, Observation, Step
from mamba3_jepa.inference.answerer import Answerer
from mamba3_jepa.inference.memory import KnowledgeMemory
from mamba3_jepa.inference.opening import open_model
from mamba3_jepa.inference.tools import ToolRegistry, read_tools
from mamba3_jepa.settings.inference import AgentSettings

_STOPPED = {
    "sure": "not confused",
    "no tool": "confused, and no tool is left that is likely to help",
    "nothing new": "confused, and a tool said what was said before",
    "rounds": "confused, and as many tools were called as --max-rounds allows",
}


def run_agent(settings: AgentSettings) -> None:
    """Answer the questions, print the answers with their steps, and write the trace if that is asked for.

    Raises:
        UserError: the settings, the checkpoint, the image, the memory, the tools or a question cannot be used.
    """
    settings.check()
    demand_writable(settings.trace)
    if settings.image is not None:
        load_image(settings.image)  # what is wrong with it is said at once
    tools = ToolRegistry() if settings.tools is None else read_tools(settings.tools)
    model, checkpoint = open_model(settings)
    memory = None if settings.memory is None else KnowledgeMemory.open(settings.memory, model)
    answerer = Answerer(model, memory, known_answers_of(settings, model, checkpoint), settings.generation)
    agent = Agent(answerer, tools, max_rounds=settings.max_rounds)
    answered = []
    for question in settings.questions or (None,):
        answer = agent.run(settings.image, question)
        answered.append(answer)
        if not settings.json:
            Console().print(_panel(answer))
    values = [_values(each) for each in answered]
    if settings.trace is not None:
        write_json(settings.trace, values)
    if settings.json:
        write_out(values)


def _values(answered: AgentAnswer) -> dict[str, Any]:
    answer = answered.answer
    return {
        "question": answered.question,
        "text": answer.text,
        "confidence": answer.confidence,
        "confused": answer.confused,
        "sure": answer.sure,
        "nearest": [{"text": text, "cosine": cosine} for text, cosine in answer.nearest],
        "warnings": answer.warnings,
        "stopped": answered.stopped,
        "tools": answered.tools,
        "trace": [{"step": step.step, **_fields(step)} for step in answered.trace],
    }


def _fields(step: Step) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(step).items() if name != "step"}


def _panel(answered: AgentAnswer) -> Panel:
    said = Text(printable(answered.answer.text) or "(nothing)", style="bold")
    if answered.answer.sure is False:
        said = Text("not sure: ", style="yellow") + said
    steps = [Text(printable(_words(step))) for step in answered.trace]
    end = Text(_STOPPED[answered.stopped], style="dim")
    return Panel(
        Group(said, "", *steps, end), title=Text(printable(answered.question)), title_align="left", expand=False
    )


def _words(step: Step) -> str:
    """A step in a line."""
    if isinstance(step, Observation):
        return f"looks: {step.answer or '(nothing)'}, confusion {step.confusion or 0.0:.3f}"
    if isinstance(step, Call):
        likely = "" if step.probability is None else f" ({step.probability:.3f})"
        return f"calls {step.tool}{likely}: {step.error or step.result or 'nothing to say'}"
    assert isinstance(step, Injection)
    likely = "" if step.answers is None else f", answers the question {step.answers:.3f}"
    return f"is told that{likely}" + ("" if step.kept else ": put back")
