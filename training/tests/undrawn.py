"""Figures that are files all the same, for tests that do not look at them: drawing takes most of a short run."""

from __future__ import annotations

from typing import IO, Any

from matplotlib.figure import Figure
from PIL import Image

DRAWN = Figure.savefig


def savefig(figure: Figure, file: IO[bytes], **_: Any) -> None:
    """In place of `Figure.savefig`: a single pixel."""
    Image.new("RGB", (1, 1)).save(file, "PNG")
