"""When two texts count as the same."""

from __future__ import annotations


def plain_text(text: str) -> str:
    """What two equal texts have in common: no upper case, single blanks."""
    return " ".join(text.casefold().split())
