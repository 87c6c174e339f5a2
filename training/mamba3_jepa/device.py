"""Where to compute: the one rule that chooses among what there is, and the check of what was named."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from mamba3_jepa.errors import UserError

logger = logging.getLogger(__name__)

# The best first; the last is always there.
AUTO = ("cuda", "mps", "cpu")
TRAINING = ("cuda", "cpu")  # it sums counts in float64, which Apple's GPUs lack

_TYPES = sorted(AUTO)


def best_device(among: Sequence[str]) -> str:
    """The first of these types of device that is here."""
    is_here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return next(name for name in among if is_here[name])


def checked_device(name: str) -> torch.device:
    """The device called `name`: cpu, cuda, cuda:1, mps, or for auto the best one that is here.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = best_device(AUTO)
        if name != "cpu":
            logger.info("computing on %s; `device` cpu does not", name)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"`device` {name}: not available here; give auto, cpu, cuda, cuda:1 or mps") from error
    if device.type not in _TYPES:
        raise UserError(f"`device` {name}: give auto or one of {', '.join(_TYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"`device` {name}: not available here; cpu always is") from error
    return device
