"""The precision of forward passes outside the module that accelerate has prepared."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from mamba3_jepa.settings.training import Precision

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """What a prepared module's forward pass runs under."""
    dtype = _AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
