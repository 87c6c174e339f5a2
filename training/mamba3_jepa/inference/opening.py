"""Opening a checkpoint to use it."""

from __future__ import annotations

from mamba3_jepa.device import checked_device
from mamba3_jepa.files.checkpoint import Checkpoint, load_checkpoint
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.inference import ModelSettings


def open_model(settings: ModelSettings) -> tuple[Mamba3Jepa, Checkpoint]:
    """The model in eval mode on its device, and the checkpoint it came from.

    Raises:
        UserError: the device or the checkpoint cannot be used.
    """
    device = checked_device(settings.device)
    checkpoint = load_checkpoint(settings.checkpoint)
    return Mamba3Jepa.from_loaded(checkpoint, str(settings.checkpoint), device), checkpoint
