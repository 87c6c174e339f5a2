"""The commands `mamba3-jepa memory ...`: what a model is to look up when it is confused."""

from __future__ import annotations

from typing import Annotated

import tyro

from mamba3_jepa.cli.commands import Commands
from mamba3_jepa.cli.output import say, show, table, write_out
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.settings.memory import MemoryAddSettings, MemoryListSettings, MemoryRemoveSettings

memory = Commands()


@memory.command(name="add")
def memory_add(settings: Annotated[MemoryAddSettings, tyro.conf.arg(name="")]) -> None:
    """Remember sentences, and answers to questions about images, in a memory file for ask --memory."""
    from mamba3_jepa.files.lines import read_lines
    from mamba3_jepa.inference.episodes import demand_episodes, made_episodes
    from mamba3_jepa.inference.memory import KnowledgeMemory
    from mamba3_jepa.inference.memory_changes import add_to_file
    from mamba3_jepa.inference.opening import open_model

    settings.check()
    texts = list(settings.facts)
    if settings.texts is not None:
        texts += read_lines(settings.texts, "text to remember")
    model, _ = open_model(settings)
    episodes = None
    if settings.answer is not None:
        demand_episodes(model)
        observed = model.observe([settings.image], [settings.question])
        name = None if settings.image is None else path_text(settings.image)
        episodes = made_episodes(model, observed, [settings.question], [settings.answer], [name])
    new = KnowledgeMemory.build(model, texts, episodes)
    counts = add_to_file(settings.file, new, lambda path: KnowledgeMemory.load(path, model))
    if settings.json:
        write_out({"file": settings.file, "added": counts.added, "changed": counts.changed, "facts": counts.facts,
                   "episodes": counts.episodes})  # fmt: skip
        return
    say(f"{settings.file}: {counts.added} added, {counts.changed} changed; now {held(counts.facts, counts.episodes)}")


@memory.command(name="list")
def memory_list(settings: Annotated[MemoryListSettings, tyro.conf.arg(name="")]) -> None:
    """What a memory file holds."""
    from mamba3_jepa.inference.memory import KnowledgeMemory
    from mamba3_jepa.inference.memory_changes import counts_of

    settings.check()
    found = KnowledgeMemory.read(settings.file)
    if settings.json:
        write_out(found.entries)
        return
    if len(found):
        rows = [(str(entry.number), entry.kind, entry.text, entry.image or "") for entry in found.entries]
        show(table(("number", "kind", "text", "image"), rows))
    counts = counts_of(found)
    say(f"{settings.file}: {held(counts.facts, counts.episodes)}")


@memory.command(name="remove")
def memory_remove(settings: Annotated[MemoryRemoveSettings, tyro.conf.arg(name="")]) -> None:
    """Take entries out of a memory file."""
    from mamba3_jepa.inference.memory_changes import counts_of, remove_from_file

    settings.check()
    removed, left = remove_from_file(settings.file, settings.numbers, settings.text)
    counts = counts_of(left)
    if settings.json:
        write_out({"file": settings.file, "removed": removed, "facts": counts.facts, "episodes": counts.episodes})
        return
    for entry in removed:
        say(f"removed {entry.kind} {entry.number}: {entry.text}")
    say(f"{settings.file}: {held(counts.facts, counts.episodes)}")


def held(facts: int, episodes: int) -> str:
    """How much a memory holds, in words."""
    if not facts and not episodes:
        return "empty"
    parts = [f"{facts} fact{'' if facts == 1 else 's'}"] if facts else []
    parts += [f"{episodes} episode{'' if episodes == 1 else 's'}"] if episodes else []
    return " and ".join(parts)
