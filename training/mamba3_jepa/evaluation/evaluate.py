"""Measure a checkpoint on any data: what `mamba3-jepa evaluate` does."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from mamba3_jepa.checkpoint import Checkpoint, load_checkpoint
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.sample import Source
from mamba3_jepa.data.sources import SceneSource, open_source, open_splits
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.settings import EvaluateSettings
from mamba3_jepa.evaluation.showcase import write_contact_sheet
from mamba3_jepa.evaluation.validate import ValidationReport, collect, evaluate
from mamba3_jepa.jsonfile import write_json
from mamba3_jepa.models.vljepa import Mamba3Jepa

logger = logging.getLogger(__name__)

SCENES = 256  # as many distinct scenes as the gallery of the README's numbers


def evaluate_checkpoint(settings: EvaluateSettings) -> ValidationReport:
    """Run the model over the data and write what was asked for.

    Raises:
        UserError: the checkpoint, the data or the device cannot be used.
    """
    checkpoint = load_checkpoint(settings.checkpoint)
    model = Mamba3Jepa.from_loaded(checkpoint, str(settings.checkpoint), checked_device(settings.device))
    source, indices = _open(settings, checkpoint)
    loader = build_loader(
        source,
        indices[: settings.samples],
        model.tokenizer,
        model.config,
        settings.batch_size,
        shuffle=False,
        seed=0,
        drop_last=False,
        workers=settings.workers,
    )
    collected = collect(model, loader, model.device)
    report = evaluate(collected)
    for warning in report.warnings:
        logger.warning(warning)
    if settings.contact_sheet is not None:
        write_contact_sheet(collected, source, settings.contact_sheet)
    if settings.output is not None:
        values = {"checkpoint": str(settings.checkpoint), "data": source.name, **report.metrics("test")}
        write_json(settings.output, values)
    return report


def checked_device(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        UserError: there is no such device here.
    """
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from error


def _open(settings: EvaluateSettings, checkpoint: Checkpoint) -> tuple[Source, NDArray[np.int64]]:
    """The data to measure on. What was held out is what the checkpoint's own run held out."""
    image_size, seed = checkpoint.config.vision.image_size, int(checkpoint.run["seed"])
    if settings.data_dir is None:
        scenes = SceneSource(settings.scenes, n_scenes=SCENES, seed=seed, image_size=image_size)
        return scenes, scenes.indices("target")
    if settings.manifest is not None:
        source = open_source(settings.data_dir, manifest=settings.manifest)
        assert source is not None  # a named manifest is opened or is an error
        indices = source.indices("target")
        if not len(indices):
            raise UserError(f"{source.name}: no sample has an answer or a text to compare with")
        return source, indices
    val_fraction = float(checkpoint.run["val_fraction"])
    splits = open_splits(settings.data_dir, image_size=image_size, seed=seed, val_fraction=val_fraction)
    return splits.val, splits.val_indices
