"""What `classify` and `search` print of a model's confusion by images."""

from __future__ import annotations

from collections.abc import Sequence

from mamba3_jepa.inference.confusion import Confusion


def confusion_values(confusion: Confusion | None) -> dict[str, object]:
    """The keys of one image, as JSON has them."""
    if confusion is None:
        return {"confusion": None, "confused": None, "signal": None}
    return {"confusion": confusion.score, "confused": confusion.confused, "signal": confusion.signal}


def confusion_cell(confusion: Confusion | None) -> str:
    """The cell of one image in a table."""
    if confusion is None:
        return ""
    return f"{'not sure ' if confusion.confused else ''}{confusion.score:.3f}"


def confusion_line(confusions: Sequence[Confusion | None]) -> str | None:
    """A line about all images in a table; None without recursion."""
    known = [confusion for confusion in confusions if confusion is not None]
    if not known:
        return None
    count = sum(confusion.confused for confusion in known)
    return f"confused about {count} of the {len(known)} shown (confusion over the threshold {known[0].threshold:.3f})"
