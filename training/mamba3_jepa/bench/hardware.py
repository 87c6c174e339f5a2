"""What a measurement was made on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def hardware(device: str, threads: int) -> str:
    """The name of the GPU, or of the CPU with the threads used."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return f"{cpu}, {threads} threads, torch {torch.__version__}"
