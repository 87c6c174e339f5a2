"""What a measurement was made on, how to wait until it is done, and how much memory it took."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

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


def watch_memory(device: torch.device) -> int | None:
    """Forget the highest use of memory so far; gives the bytes in use now, or None where they are not known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # where that is allowed
        Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use since `watch_memory`, of the GPU by torch or else of the process; None where they are not
    known."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
