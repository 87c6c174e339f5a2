"""What a measurement was made on, and how to wait until it is done."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mamba3_jepa.export.environment import cpu_name


def hardware(device: torch.device, threads: int) -> str:
    """The name of the GPU, or of the CPU with the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    where = f"the GPU of {cpu_name()}" if device.type == "mps" else f"{cpu_name()}, {threads} threads"
    return f"{where}, torch {torch.__version__}"


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until all work given to the device is done; the CPU is never behind."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return torch.mps.synchronize if device.type == "mps" else lambda: None
