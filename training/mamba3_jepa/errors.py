"""The one exception meant for the person at the keyboard, and how its messages list names."""

from __future__ import annotations

from collections.abc import Collection

_SHOWN = 4


class UserError(Exception):
    """Something the user can put right: bad input, a wrong file, impossible settings.

    The message names what was wrong (file, line, field, shape) and what to do. The command line prints it
    without a traceback and exits with status 2.
    """


def shorten(names: Collection[str], separator: str = ", ") -> str:
    """The first few of `names`, and how many more there are."""
    shown = separator.join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
