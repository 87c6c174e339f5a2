"""What numbers a setting may have: declared beside its type, checked when the settings are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from mamba3_jepa.errors import UserError

LARGEST = 1_000_000_000  # of what only counts; more would not be more, and no longer fits a 64-bit product


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`: both included, or neither if `open`."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def complaint(self, value: float) -> str | None:
        """What `value` must be, or None if it is that."""
        inside = self.low < value < self.high if self.open else self.low <= value <= self.high
        return None if inside and abs(value) < math.inf else f"must be {self}"

    def __str__(self) -> str:
        least, most = ("greater than", "less than") if self.open else ("at least", "at most")
        sides = [] if self.high < math.inf else ["finite"]
        sides += [f"{least} {self.low}"] if self.low > -math.inf else []
        sides += [f"{most} {self.high}"] if self.high < math.inf else []
        return " and ".join(sides)


COUNT = Range(1, LARGEST)
FROM_ZERO = Range(0, LARGEST)
# What memory is taken for: far more than is of use, so that a slip of the hand is refused and not tried.
BATCH = Range(1, 65_536)  # samples, images or sequences at a time
BEAMS = Range(1, 1_000)  # each is a sequence with a state of its own
TOKENS = Range(1, 1_000_000)  # of one sequence
WIDTH = Range(1, 65_536)  # of a layer
PIXELS = Range(1, 16_384)  # the side of a picture
PROCESSES = Range(0, 1024)
POSITIVE = Range(0, open=True)
FRACTION = Range(0, 1)

Count = Annotated[int, COUNT]
Batch = Annotated[int, BATCH]
Tokens = Annotated[int, TOKENS]
Width = Annotated[int, WIDTH]
Threads = Annotated[int, Range(1, 1024)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what the generators of NumPy and of torch both take
HashedSeed = Annotated[int, Range(-(2**63), 2**63 - 1)]  # what is drawn by the hash of a text
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, Range(0)]
Finite = Annotated[float, Range()]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Settings whose numbers are in their ranges, however they are made.

    Raises:
        UserError: one is not; names its flag, what was given and the range.
    """

    def __post_init__(self) -> None:
        check_ranges(self, lambda name, value, rule: f"`{name}` {value}: {rule}")


def check_ranges(settings: Any, say: Callable[[str, float, str], str]) -> None:
    """Raise UserError with what `say` makes of field, value and rule for the first number out of its range."""
    for name, allowed in ranges(settings.__class__).items():
        for value in _numbers(getattr(settings, name)):
            rule = allowed.complaint(value)
            if rule is not None:
                raise UserError(say(name, value, rule))


@cache
def ranges(kind: type) -> dict[str, Range]:
    """The range of each field that has one: of the number, of that beside None, or of each item of a tuple."""
    hints = get_type_hints(kind, include_extras=True)
    found = {field.name: _range(hints[field.name]) for field in dataclasses.fields(kind)}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


def _range(hint: Any) -> Range | None:
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        declared = [part for part in parts[1:] if isinstance(part, Range)]
        return declared[0] if declared else _range(parts[0])
    return next((found for found in map(_range, parts) if found is not None), None)


def _numbers(value: Any) -> Iterator[float]:
    """The number, those of a tuple, or none."""
    if isinstance(value, tuple):
        yield from value
    elif value is not None:
        yield value
