"""Settings as the command line calls them: the library's messages name `val_fraction`, here it is --val-fraction."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Sequence

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.settings import bench, cache, export, inference, language_model, prepare, training

_NAMED = re.compile(r"`([a-z][a-z0-9_]*)`")
_SETTINGS = {
    field.name: str(field.type)
    for module in (bench, cache, export, inference, language_model, prepare, training)
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


def joined(arguments: Sequence[str], flag: str) -> list[str]:
    """The arguments with all values of `flag`, which takes several, where it stands first: no repetition loses one."""
    rest: list[str] = []
    values: list[str] = []
    place: int | None = None
    takes = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == flag:
            place = len(rest) if place is None else place
            takes = not equals
            values += [value] if equals else []
        elif takes and not argument.startswith("-"):
            values.append(argument)
        else:
            takes = False
            rest.append(argument)
    return rest if place is None else [*rest[:place], flag, *values, *rest[place:]]


class FlagFilter(logging.Filter):
    """Lets every record pass, with flags in its message, and names of files as they are printed."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = path_text(with_flags(record.getMessage())), ()
        return True
