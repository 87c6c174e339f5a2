"""What a report of an error should say of the machine: versions, devices, and the kernels that would be used."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mamba3_jepa
from mamba3_jepa.models import kernels

PACKAGES = (  # those that pyproject.toml asks for
    "torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy", "pillow", "pydantic", "tyro", "rich",
    "torchmetrics", "sacrebleu", "matplotlib", "ijson", "fsspec",
)  # fmt: skip
OPTIONAL = (
    "mamba-ssm",
    "triton",
    "tilelang",
    "easy-vqa",
    "pyarrow",
    "tensorboard",
    "wandb",
    "s3fs",
    "huggingface-hub",
    "aiohttp",
)
_GIB = 2**30
_PATIENCE = 10  # seconds for another program's answer


def environment() -> dict[str, Any]:
    """A description of where this runs, ready for JSON. What is missing is None.

    Returns:
        `python`, `packages` and `optional` (versions by name), `system`, `devices`, and `kernels` (what computes the
        Mamba-3 layer's scan, by form). Memory is in GiB.
    """
    return {
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "packages": {"mamba3-jepa": mamba3_jepa.__version__, **{name: _version(name) for name in PACKAGES}},
        "optional": {name: _version(name) for name in OPTIONAL},
        "system": {
            "os": platform.platform(),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "memory_gib": _memory_gib(),
        },
        "devices": {
            "cuda_of_torch": torch.version.cuda,
            "nvidia_driver": _nvidia_driver(),
            **{f"cuda:{i}": _cuda_device(i) for i in range(torch.cuda.device_count())},
            "mps": torch.backends.mps.is_available(),
        },
        "kernels": {"siso": _scan(kernels.siso_kernel), "mimo": _scan(kernels.mimo_kernel)},
    }


def cpu_name() -> str:
    """The processor's name as it is sold, or the kind of its instructions."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    named = _said_by("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else None
    return named or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _nvidia_driver() -> str | None:
    said = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else None  # a line for each GPU, all the same


def _cuda_device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / _GIB, 1),
    }


def _scan(kernel: Callable[[], kernels.Kernel | None]) -> str:
    """What computes the scan where `kernel` is the fused one for it."""
    if not torch.cuda.is_available():
        return "chunked scan: there is no CUDA device"
    version = _version("mamba-ssm")
    if version is None:
        return "chunked scan: mamba-ssm is not installed"
    if kernel() is None:
        return f"chunked scan: mamba-ssm {version} has no fitting kernel, or it cannot be imported"
    return f"mamba-ssm {version} for bfloat16 on CUDA where the sizes fit, else chunked scan"


def _said_by(*command: str) -> str | None:
    """What a program prints, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
