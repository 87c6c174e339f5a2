"""Settings of `mamba3-jepa prepare ...`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mamba3_jepa.settings.limits import Checked, HashedSeed, Range


@dataclass(frozen=True, kw_only=True)
class EasyVqaSettings(Checked):
    """Where easy-VQA goes."""

    output: Path
    """The data directory to make."""


@dataclass(frozen=True, kw_only=True)
class SceneFilesSettings(Checked):
    """Which scenes, and where they go."""

    output: Path
    """The data directory to make."""
    scenes: Annotated[int, Range(1, 10_000_000)] = 32
    """How many pictures."""
    image_size: Annotated[int, Range(16, 16_384)] = 64
    """Their side in pixels."""
    seed: HashedSeed = 0
    """Other scenes with another seed."""
