"""Settings of `mamba3-jepa evaluate`. Free of torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What to measure, on which data."""

    checkpoint: Path
    """A checkpoint of any phase."""
    data_dir: _Path = None
    """Data directory; without it, synthetic scenes the model never saw."""
    manifest: str | None = None
    """A manifest in --data-dir, such as test.jsonl; default: the held-out validation split."""
    scenes: Literal["val", "compositional"] = "val"
    """Without --data-dir: ordinary held-out scenes, or only scenes with colour-shape pairs kept out of training."""
    samples: int = 100_000
    """Measure on at most this many samples."""
    batch_size: int = 64
    """Samples per forward pass."""
    workers: int = 0
    """Data-loading processes."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    output: _Path = None
    """Write the numbers to this JSON file."""
    contact_sheet: _Path = None
    """Write a picture of some images with their nearest texts to this PNG file."""
