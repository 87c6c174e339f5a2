"""Settings of `mamba3-jepa cache ...`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mamba3_jepa.settings.common import Json
from mamba3_jepa.settings.limits import Checked, Range

_CACHE_DIR = Path("checkpoints/frozen_outputs")


@dataclass(frozen=True, kw_only=True)
class CacheListSettings(Checked):
    """Which folder of frozen outputs to look into."""

    cache_dir: Path = _CACHE_DIR
    """The folder of frozen outputs, as --cache-dir of train-decoder and train-agent, frozen_outputs beside their
    --output-dir, or as --cache-visual of train-jepa."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class CacheCleanSettings(Checked):
    """What to remove from a folder of frozen outputs."""

    cache_dir: Path = _CACHE_DIR
    """The folder of frozen outputs, as --cache-dir of train-decoder and train-agent, frozen_outputs beside their
    --output-dir, or as --cache-visual of train-jepa."""
    unused_days: Annotated[float | None, tyro.conf.arg(metavar="FLOAT"), Range(0)] = None
    """Also remove what has not been used for so many days."""
    all: bool = False
    """Remove everything that no run is using at this moment."""
    dry_run: bool = False
    """Remove nothing, only say what would be removed."""
    json: Json = False
