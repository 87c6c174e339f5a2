"""Where to compute."""

from __future__ import annotations

import torch

from mamba3_jepa.errors import UserError

_TYPES = ("cpu", "cuda", "mps")


def checked_device(name: str) -> torch.device:
    """The device called `name`: cpu, cuda, cuda:1, mps.

    Raises:
        UserError: there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"`device` {name}: not available here; give cpu, cuda, cuda:1 or mps") from error
    if device.type not in _TYPES:
        raise UserError(f"`device` {name}: give one of {', '.join(_TYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"`device` {name}: not available here; cpu always is") from error
    return device
