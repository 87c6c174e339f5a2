"""What a measurement was made on."""

from __future__ import annotations

import torch

from mamba3_jepa.export.environment import cpu_name


def hardware(device: str, threads: int) -> str:
    """The name of the GPU, or of the CPU with the threads used."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {threads} threads, torch {torch.__version__}"
