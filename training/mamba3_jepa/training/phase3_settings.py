"""Settings of phase 3. Free of torch, so that --help answers at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mamba3_jepa.config import PresetName
from mamba3_jepa.errors import UserError
from mamba3_jepa.training.settings import TrainSettings

# The names of `data.confusion.MADE_KINDS`, repeated here because that module needs numpy and more.
ConfusionKind = Literal["mismatched", "unanswerable", "corrupted"]

_DEFAULTS: dict[str, dict[str, Any]] = {
    "small": {"epochs": 10, "batch_size": 16, "lr": 5e-5, "synthetic_scenes": 20_000, "val_samples": 2048},
    "mini": {"epochs": 10, "batch_size": 128, "lr": 2e-3, "synthetic_scenes": 8_000, "val_samples": 2048},
    "tiny": {"epochs": 2, "batch_size": 16, "lr": 3e-3, "synthetic_scenes": 64, "val_samples": 160, "workers": 0},
}


@dataclass(frozen=True, kw_only=True)
class Phase3Settings(TrainSettings):
    """Phase 3: train the confusion monitor and the state injector; the model of phases 1 and 2 stays frozen."""

    output_dir: Path = Path("checkpoints/phase3")
    """Where phase3_best.pt, phase3_last.pt, recursion.safetensors, config.json, metrics.jsonl and the plots go."""
    phase2_checkpoint: Path = Path("checkpoints/phase2/phase2_best.pt")
    """The model of phase 2; its size, its tokenizer and its weights are kept."""
    tiny: bool = False
    """A short run, for the checkpoint of --tiny phases 1 and 2 only."""
    knowledge_dim: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Length of the knowledge vectors in the data; default: what the Y-Encoder makes of a text."""
    injection_weight: float = 1.0
    """Weight of the injection error in the loss, beside the confusion loss."""
    confusion_kinds: tuple[ConfusionKind, ...] = ("mismatched", "unanswerable", "corrupted")
    """Confusion to make from the data, beside its own "confused" labels: questions with another image, questions
    without what they are about, destroyed images. Leave out mismatched where every question fits every image."""
    cache_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Where the frozen model's outputs are kept for later epochs and runs; default: frozen_outputs beside
    --output-dir."""

    def resolved(self, preset_name: PresetName) -> Phase3Settings:
        """A copy in which the checkpoint's preset has filled every value the command line left open.

        Raises:
            UserError: impossible settings, or --tiny for a checkpoint that is not tiny.
        """
        self.check()
        if self.knowledge_dim is not None and self.knowledge_dim < 1:
            raise UserError(f"--knowledge-dim {self.knowledge_dim}: must be greater than 0")
        if not 0 <= self.injection_weight < float("inf"):
            raise UserError(f"--injection-weight {self.injection_weight}: must not be negative")
        if self.tiny and preset_name != "tiny":
            raise UserError(
                f"--tiny: {self.phase2_checkpoint} is a {preset_name} model; leave --tiny out, or give the checkpoint "
                "of a --tiny phase 2"
            )
        filled = self.with_defaults(_DEFAULTS[preset_name])
        return dataclasses.replace(
            filled,
            # in one order, so that a resumed run may name them in another
            confusion_kinds=tuple(sorted(set(self.confusion_kinds))),
            cache_dir=self.cache_dir or self.output_dir.parent / "frozen_outputs",
        )
