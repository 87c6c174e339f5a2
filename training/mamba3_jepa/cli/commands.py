"""Commands and groups of commands: tyro's, which also tell what settings a command line fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import tyro

Command = Callable[[Any], None]


class Commands(tyro.extras.SubcommandApp):
    """Commands by name; each takes one dataclass, called `settings`."""

    def __init__(self) -> None:
        super().__init__()
        self._targets: dict[str, Command | Commands] = {}

    def command(self, func: Any = None, *, name: str | None = None, **options: Any) -> Any:
        """As tyro's."""
        if func is None:
            return lambda target: self.command(target, name=name, **options)
        self._targets[name or func.__name__] = func
        return super().command(func, name=name, **options)

    def settings_of(self, arguments: Sequence[str]) -> type | None:
        """What the command that the first words name takes; None where they name none."""
        word = arguments[0].replace("_", "-") if arguments else ""
        target = self._targets.get(word)
        if isinstance(target, Commands):
            return target.settings_of(arguments[1:])
        return None if target is None else get_type_hints(target)["settings"]
