"""Pictures that are files all the same, for tests that do not look at them: drawing takes most of a short run."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from matplotlib.figure import Figure
from PIL import Image

from mamba3_jepa.evaluation import answer_sheet, contact_sheet, plots
from mamba3_jepa.files.whole_file import whole_file


def _savefig(figure: Figure, file: IO[bytes], **_: Any) -> None:
    Image.new("RGB", (1, 1)).save(file, "PNG")


def _draw(*arguments: Any) -> Path:
    with whole_file(arguments[-1]) as file:
        _savefig(Figure(), file)
    return arguments[-1]


# What to set which attribute of what to: a single pixel, and what it was.
UNDRAWN = [
    (Figure, "savefig", _savefig),
    (plots, "_draw", _draw),
    (contact_sheet, "draw_cards", _draw),
    (answer_sheet, "draw_cards", _draw),
]
DRAWN = [(owner, name, getattr(owner, name)) for owner, name, _ in UNDRAWN]
