"""Settings of `mamba3-jepa evaluate`. Free of torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mamba3_jepa.errors import UserError
from mamba3_jepa.inference.settings import GenerationConfig

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
    on_bad_sample: Literal["error", "skip"] = "error"
    """An unreadable image is an error, or is left out with a warning."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    labels: _Path = None
    """Zero-shot classification among the lines of this text file, of the samples whose answer or caption is one."""
    label_template: str = "{}"
    """The text that stands for a label, such as "a photo of a {}"."""
    skip_generation: bool = False
    """Leave out the generated answers, which take the most time."""
    output: _Path = None
    """Write the numbers to this JSON file."""
    contact_sheet: _Path = None
    """Write a picture of some images with their nearest texts to this PNG file."""
    answer_sheet: _Path = None
    """Write a picture of some images with their generated answers to this PNG file."""
    answers_plot: _Path = None
    """Write a bar chart of the answers by question type to this PNG file."""
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = field(default_factory=GenerationConfig)

    def check(self) -> None:
        """Raise UserError for contradictory or impossible settings."""
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: must not be negative")
        if self.label_template.count("{}") != 1:
            raise UserError(f"--label-template {self.label_template!r}: must contain {{}} once, where the label goes")
        if self.manifest is not None and self.data_dir is None:
            raise UserError(f"--manifest {self.manifest} is looked for in --data-dir; give that too")
        if self.skip_generation and self.answer_sheet is not None:
            raise UserError("--answer-sheet shows generated answers; it cannot go with --skip-generation")
