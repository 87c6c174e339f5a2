"""Changing a saved memory in its file: what is added, and what is removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.file_lock import alone_with
from mamba3_jepa.inference.memory import Entry, KnowledgeMemory


@dataclass(frozen=True, kw_only=True)
class MemoryCounts:
    """How much was added and changed, and how much there is now."""

    added: int
    changed: int
    facts: int
    episodes: int


def counts_of(memory: KnowledgeMemory, added: int = 0, changed: int = 0) -> MemoryCounts:
    """What a memory holds."""
    facts = len(memory.texts)
    return MemoryCounts(added=added, changed=changed, facts=facts, episodes=len(memory) - facts)


def add_to_file(path: Path, new: KnowledgeMemory, load: Callable[[Path], KnowledgeMemory]) -> MemoryCounts:
    """Put all that `new` holds into the memory at `path`, which is made if need be; equal entries are not doubled.

    Args:
        load: reads what is there, if it is of the same model.

    Raises:
        UserError: what is there cannot be read, or is of another model; the file cannot be written.
    """
    with alone_with(path):
        if path.exists():
            memory, added, changed = load(path).joined(new)
        else:
            memory, added, changed = new, len(new), 0
        memory.save(path)
    return counts_of(memory, added, changed)


def remove_from_file(
    path: Path, numbers: Sequence[int] = (), text: str | None = None
) -> tuple[list[Entry], KnowledgeMemory]:
    """Take the entries of these numbers, or all with this text, out of the memory at `path`.

    Returns:
        what was removed, and what is left.

    Raises:
        UserError: the file cannot be read or written, or there is no such entry; it is unchanged then.
    """
    with alone_with(path):
        memory = KnowledgeMemory.read(path)
        wanted = [entry for entry in memory.entries if entry.number in numbers or entry.text == text]
        missing = [number for number in numbers if not 1 <= number <= len(memory)]
        if missing:
            raise UserError(
                f"{path}: there is no entry {missing[0]}: it has {len(memory)}; memory list {path} gives their numbers"
            )
        if not wanted:
            raise UserError(f"{path}: there is no entry with the text {text!r}; memory list {path} shows all")
        left = memory.without({entry.number for entry in wanted})
        left.save(path)
    return wanted, left
