"""Settings as the command line calls them: the library's messages name `val_fraction`, here it is --val-fraction."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from typing import get_origin, get_type_hints

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.settings import bench, cache, export, inference, language_model, memory, prepare, training

_NAMED = re.compile(r"`([a-z][a-z0-9_]*)`")
_SETTINGS = {
    field.name: str(field.type)
    for module in (bench, cache, export, inference, language_model, memory, prepare, training)
    for value in vars(module).values()
    if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    for field in dataclasses.fields(value)
}


def with_flags(message: str) -> str:
    """The message with every setting in backticks written as its flag."""
    return _NAMED.sub(lambda match: as_flag(match[1]) if match[1] in _SETTINGS else match[0], message)


def as_flag(name: str) -> str:
    """val_fraction -> --val-fraction."""
    return "--" + name.replace("_", "-")


def as_name(flag: str) -> str:
    """--val-fraction -> val_fraction."""
    return flag.removeprefix("--").replace("-", "_")


def demand_paths(arguments: Sequence[str]) -> None:
    """Refuse a path that is empty, which a shell variable without a value leaves: it would be the current directory.

    Raises:
        UserError: names the flag.
    """
    for before, argument in itertools.pairwise(["", *arguments]):
        name, equals, value = argument.partition("=")
        empty = before if argument == "" else name if equals and value == "" else None
        if empty is not None and "Path" in _SETTINGS.get(as_name(empty), ""):
            raise UserError(f"{empty}: the path is empty; give one (. is the current directory)")


def gathered(arguments: Sequence[str], settings: type | None) -> list[str]:
    """The arguments with every option once: one that takes several values has all of them where it stands last, so that
    what stands behind it still does.

    Args:
        settings: the dataclass that the arguments fill; None: they name no command, and stay as they are.

    Raises:
        UserError: an option that takes one value is given twice; names the flag.
    """
    several = {} if settings is None else dict(_options(settings))
    pieces: list[list[str]] = []  # an option, with its values if it takes several, or any other argument
    given: dict[str, list[str]] = {}
    current: list[str] | None = None  # the option that further values are of
    for number, argument in enumerate(arguments):
        if argument == "--":
            pieces.append(list(arguments[number:]))
            break
        flag, equals, value = argument.partition("=")
        name = as_name(flag) if flag.startswith("--") else ""
        if name in given and not several[name]:
            raise UserError(f"{flag} is given twice, and only one value counts: leave one of them out")
        if name in given:
            current = [*given[name], *([value] if equals else [])]
            given[name].clear()
            pieces.append(current)
            given[name] = current
        elif name in several:
            pieces.append([argument])
            given[name] = pieces[-1]
            current = pieces[-1] if several[name] else None
        elif current is not None and not argument.startswith("-"):
            current.append(argument)
        else:
            pieces.append([argument])
            current = None
    return list(itertools.chain.from_iterable(pieces))


def _options(settings: type) -> Iterator[tuple[str, bool]]:
    """The settings that take values, by name, and whether several; those in a part of the settings, too."""
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _options(hint)
        elif hint is not bool:
            yield field.name, get_origin(hint) is tuple


class FlagFilter(logging.Filter):
    """Lets every record pass, with flags in its message, and names of files as they are printed."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = path_text(with_flags(record.getMessage())), ()
        return True
