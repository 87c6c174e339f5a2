"""The fields of one object of a published file, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mamba3_jepa.errors import UserError


class Fields:
    """An object; what is missing or of another type than asked for is a UserError with `where`."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected an object, {{...}}, found {_shown(value)}")
        self._value, self.where = value, where

    def __contains__(self, name: str) -> bool:
        return name in self._value

    def text(self, name: str) -> str:
        """A text, without blanks around it."""
        return self._of(name, str, "a text").strip()

    def integer(self, name: str) -> int:
        """A whole number of at most 64 bits."""
        found = int(self._of(name, int, "a whole number"))
        if not -(2**63) <= found < 2**63:
            raise UserError(f'{self.where}: field "{name}": expected a whole number of at most 64 bits, found {found}')
        return found

    def identity(self, name: str) -> int | str:
        """A number or a text that tells one from the others."""
        return self._of(name, (int, str), "a whole number or a text")

    def objects(self, name: str) -> list[Fields]:
        """A list of objects."""
        found = self._of(name, list, "a list")
        return [Fields(each, f'{self.where}: "{name}" entry {i}') for i, each in enumerate(found, start=1)]

    def kept(self, *names: str) -> dict[str, Any]:
        """Those of the fields that are there, as they are."""
        return {name: self._value[name] for name in names if name in self._value}

    def _of(self, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        if name not in self._value:
            raise UserError(f'{self.where}: field "{name}" is missing: expected {expected}')
        found = self._value[name]
        if not isinstance(found, kind) or isinstance(found, bool):
            raise UserError(f'{self.where}: field "{name}": expected {expected}, found {_shown(found)}')
        return found


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
