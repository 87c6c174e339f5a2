"""Where shards lie that are not on this machine: `s3://`, `hf://`, `https://`, and ranges `{00000..01242}` in them.

What may be secret in an address, a user's name and password before the host and all behind a question mark, is needed
to fetch and is never shown or kept.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from mamba3_jepa.errors import UserError

_SCHEMES = ("s3", "hf", "http", "https")
_ADDRESS = re.compile(rf"({'|'.join(_SCHEMES)})://", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST = 10_000_000  # addresses in a range; more are a slip of the hand


def is_address(place: str | Path | None) -> bool:
    """Whether it names something that is not on this machine."""
    return isinstance(place, str) and _ADDRESS.match(place) is not None


def scheme_of(address: str) -> str:
    """s3, hf, http or https."""
    return address.partition("://")[0].lower()


def shown(address: str) -> str:
    """The address without what may be secret in it."""
    if scheme_of(address) not in ("http", "https"):
        return address
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def shown_place(place: str | Path | None) -> str | None:
    """A path, or an address without what may be secret in it, as text."""
    return shown(place) if isinstance(place, str) and is_address(place) else None if place is None else str(place)


def has_range(address: str) -> bool:
    """Whether there is a range in it."""
    return _RANGE.search(address) is not None


def expanded(address: str) -> list[str]:
    """Every address that one with ranges stands for, in order: `{08..11}` is 08, 09, 10, 11.

    Raises:
        UserError: a range runs backwards or is very long, or a brace is not part of one.
    """
    pieces: list[list[str]] = []
    end, count = 0, 1
    for match in _RANGE.finditer(address):
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        if last < first or len(match[2]) < width:
            raise UserError(f"`data_dir` {shown(address)}: {match[0]} must run upwards, as {{00000..01242}} does")
        count *= last - first + 1
        if count > _MOST:
            raise UserError(f"`data_dir` {shown(address)}: {match[0]} makes more than {_MOST:,} addresses")
        pieces += [[address[end : match.start()]], [f"{number:0{width}}" for number in range(first, last + 1)]]
        end = match.end()
    pieces.append([address[end:]])
    if any(brace in piece for group in pieces for piece in group for brace in "{}"):
        raise UserError(f"`data_dir` {shown(address)}: expected a range such as {{00000..01242}} between braces")
    return list(_joined(pieces))


def _joined(pieces: list[list[str]]) -> Iterator[str]:
    return map("".join, itertools.product(*pieces))
