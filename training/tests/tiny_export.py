"""A tiny model of which no number is what a reader would assume, exported: for the tests of writers and readers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tiny import GATES, tiny_model, write_checkpoint

from mamba3_jepa.config import AngnConfig
from mamba3_jepa.export.exporter import ExportReport, export_weights
from mamba3_jepa.files.checkpoint import DataRecord
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import ExportSettings

QUESTIONS = ["what color is the circle?", "is there a red square?"]
ANSWERS = ["red", "yes", "größer"]


def build(angn: bool = True, **changes: Any) -> Mamba3Jepa:
    """A model with all parts."""
    texts = [*QUESTIONS, "a small red circle"]
    model = tiny_model(3, texts, angn=GATES if angn else AngnConfig(), **changes)
    model.recursion.confusion_probe.temperature.fill_(1.7)  # type: ignore[union-attr]
    model.recursion.memory_floor.fill_(0.25)  # type: ignore[union-attr]
    if model.config.recursion.episodes:
        assert model.recursion is not None
        model.recursion.episode_blend.fill_(0.375)
        model.recursion.episode_floor.fill_(0.125)
        mean = model.recursion.episode_mean
        mean.copy_(torch.linspace(-0.3, 0.4, len(mean)))
    return model


def save(model: Mamba3Jepa, path: Path, phase: int) -> Path:
    """As a run of `phase` would leave it."""
    data = DataRecord(source="synthetic scenes", synthetic=True, train_samples=3, answers=ANSWERS)
    run = {"seed": 0, "vit_checkpoint": None}
    return write_checkpoint(
        path, model, phase, data=data, run=run, metrics={"val/loss": 0.5, "val/undefined": math.nan}
    )


def export(checkpoint: Path, output: Path, **settings: Any) -> ExportReport:
    """`export_weights`, by the names of its settings."""
    return export_weights(ExportSettings(checkpoint=checkpoint, output=output, **settings))
