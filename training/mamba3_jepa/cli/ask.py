"""`mamba3-jepa ask`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.lib import format as npy
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mamba3_jepa.cli.output import printable, say, write_out
from mamba3_jepa.data.images import load_image
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint
from mamba3_jepa.files.lines import read_lines
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.files.whole_file import demand_writable
from mamba3_jepa.inference.answerer import Answer, Answerer, Knowledge, Signal
from mamba3_jepa.inference.episodes import Episode, demand_episodes, made_episodes
from mamba3_jepa.inference.known_answers import known_answers
from mamba3_jepa.inference.memory import KnowledgeMemory
from mamba3_jepa.inference.memory_changes import add_to_file
from mamba3_jepa.inference.opening import open_model
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.inference import AgentSettings, AskSettings

# The third version is for names of fields, which a row of numbers has not.
_NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def run_ask(settings: AskSettings) -> None:
    """Answer the questions and print the answers.

    Raises:
        UserError: the settings, the checkpoint, the image, a question or the knowledge cannot be used.
    """
    settings.check()
    demand_writable(settings.save_memory, settings.memory if settings.remember is not None else None)
    image = None if settings.image is None else load_image(settings.image)
    knowledge = _knowledge(settings)
    model, checkpoint = open_model(settings)
    if settings.remember is not None:
        demand_episodes(model)
    is_new = settings.remember is not None and settings.memory is not None and not settings.memory.exists()
    memory = None if settings.memory is None or is_new else KnowledgeMemory.open(settings.memory, model)
    answerer = Answerer(
        model,
        memory,
        known_answers_of(settings, model, checkpoint),
        settings.generation,
        smooth=settings.smooth,
        inject=settings.inject,
        top=settings.top,
    )
    questions = settings.questions or (None,)
    answers = answerer.ask_many([image] * len(questions), questions, knowledge)
    if memory is not None and settings.save_memory is not None:
        memory.save(settings.save_memory)
    asked = [question or model.config.query_prompt for question in questions]
    if settings.json:
        _remember(settings, answerer)
        write_out([_values(*pair, settings.remember) for pair in zip(asked, answers, strict=True)])
        return
    for said, question, answer in zip(asked, questions, answers, strict=True):
        looked_up = answerer.recall is not None and answerer.recall.can_look_up(question)
        panel = _panel(said, answer, smooth=settings.smooth, looked_up=looked_up, given=knowledge is not None)
        Console().print(panel)
    episode = _remember(settings, answerer)
    if episode is not None:
        say(f"remembered in {settings.memory}: {episode.text}")


def _remember(settings: AskSettings, answerer: Answerer) -> Episode | None:
    """Add what was asked with its right answer to the memory's file, if that is asked for."""
    if settings.remember is None or settings.memory is None or answerer.observed is None:
        return None
    model = answerer.model
    name = None if settings.image is None else path_text(settings.image)
    asked = settings.questions or (None,)
    episodes = made_episodes(model, answerer.observed, asked, [settings.remember], [name])
    add_to_file(
        settings.memory, KnowledgeMemory.build(model, [], episodes), lambda path: KnowledgeMemory.load(path, model)
    )
    return episodes.entries[0]


def _knowledge(settings: AskSettings) -> Knowledge | None:
    path = settings.knowledge_vector
    return settings.knowledge if path is None else _read_vector(path)


def _read_vector(path: Path) -> list[float]:
    expected = "expected a .npy file with one row of numbers, or a JSON list of numbers"
    try:
        values = _read_npy(path) if path.suffix == ".npy" else json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot read the knowledge vector: {error.strerror or error}") from error
    except (ValueError, RecursionError, TokenError) as error:  # the last from headers that are no Python
        raise UserError(f"{path}: not a knowledge vector ({error}); {expected}") from error
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise UserError(f"{path}: not a knowledge vector; {expected}")
    try:
        return [float(value) for value in values]
    except OverflowError as error:
        raise UserError(f"{path}: a number of the knowledge vector is too large") from error


def _read_npy(path: Path) -> list[float]:
    """One row of numbers. The size of the file is compared with what its header claims before memory is taken."""
    with path.open("rb") as file:
        version = npy.read_magic(file)
        if version not in _NPY_HEADERS:
            raise ValueError(f"its format is {version}")
        shape, _, dtype = _NPY_HEADERS[version](file)
        if len(shape) != 1 or dtype.kind not in "fiu":
            raise ValueError(f"its shape is {shape}, its type {dtype}")
        present = os.fstat(file.fileno()).st_size - file.tell()
        if not 0 <= shape[0] * dtype.itemsize <= present:
            raise ValueError(f"its header claims {shape[0]} numbers, but {present} bytes follow")
        return np.fromfile(file, dtype, shape[0]).tolist()


def known_answers_of(
    settings: AskSettings | AgentSettings, model: Mamba3Jepa, checkpoint: Checkpoint
) -> KnowledgeMemory | None:
    """Those that the settings name, or else those that the checkpoint was trained on; None if there are none."""
    if settings.answers is not None:
        return KnowledgeMemory.build(model, read_lines(settings.answers, "answer"))
    return known_answers(model, settings.checkpoint, checkpoint.data.answers)


def _values(question: str, answer: Answer, remembered: str | None) -> dict[str, object]:
    nearest = [{"text": text, "cosine": cosine} for text, cosine in answer.nearest]
    return {"question": question, **dataclasses.asdict(answer), "nearest": nearest, "remembered": remembered}


_WHY: dict[Signal, str] = {
    "state": "this picture and question are not like those it knows",
    "answer": "the decoder hesitates over its answer",
    "before": "this question was confusing in the turns before",
}


def _note(answer: Answer, *, smooth: bool, given: bool) -> str | None:
    """Why an answer is not sure, or knowledge that was given was not used."""
    judged = answer.smoothed_confusion if smooth else answer.confusion
    if answer.sure is False and answer.signal is not None:
        return f"confusion {judged:.2f} over the threshold {answer.threshold:.2f}: {_WHY[answer.signal]}"
    if given and not answer.knowledge_used:
        return "not confused: the knowledge was not used (--inject always uses it)"
    return None


def _panel(question: str, answer: Answer, *, smooth: bool, looked_up: bool, given: bool) -> Panel:
    """smooth: see `Answerer`. looked_up: the memory was asked, if the model is confused. given: there was knowledge."""
    facts = Table.grid(padding=(0, 3))
    facts.add_row(Text("confidence", style="dim"), f"{answer.confidence:.3f}")
    if answer.confusion is not None and answer.smoothed_confusion is not None:
        smoothed = answer.smoothed_confusion
        average = "" if smoothed == answer.confusion else f", {smoothed:.3f} over the turns with this question"
        verdict = "confused" if answer.confused else "not confused"
        facts.add_row(Text("confusion", style="dim"), f"{answer.confusion:.3f}{average} ({verdict})")
        used = "not used"
        if answer.memory_used is not None:
            kind = "" if answer.memory_kind == "fact" else f" ({answer.memory_kind})"
            used = f"used: {printable(answer.memory_used)}{kind}"
        elif looked_up and answer.confused:
            used = "nothing near enough"
        facts.add_row(Text("memory", style="dim"), Text(used))
    if answer.knowledge_used:
        facts.add_row(Text("knowledge", style="dim"), Text("used"))
    for number, (text, cosine) in enumerate(answer.nearest):
        label = "nearest known answers" if number == 0 else ""
        facts.add_row(Text(label, style="dim"), Text(f"{cosine: .3f}  {printable(text)}"))
    said = [Text(printable(answer.text) or "(nothing)", style="bold")]
    if answer.sure is False:
        said[0] = Text("not sure: ", style="yellow") + said[0]
    note = _note(answer, smooth=smooth, given=given)
    if note is not None:
        said.append(Text(note, style="dim"))
    return Panel(Group(*said, "", facts), title=Text(printable(question)), title_align="left", expand=False)
