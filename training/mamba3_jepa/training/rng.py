"""The state of the random numbers, to draw the same again."""

from __future__ import annotations

import torch
from torch import Tensor


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Of the CPU's generator, and of the GPU's where `device` is one."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Back to what `rng_state` gave."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
