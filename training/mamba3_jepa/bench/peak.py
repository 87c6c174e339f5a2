"""What a device can compute at most in a second: the number that a share of it is a share of."""

from __future__ import annotations

import re
import statistics
import time
from typing import Literal

import torch

from mamba3_jepa.bench.hardware import synchronizer

Arithmetic = Literal["bfloat16", "TF32", "float32"]

# 10^12 operations a second of products that are dense: in bfloat16, in TF32, in float32. From the data sheets of the
# makers; those that list "with sparsity" are halved.
_KNOWN: dict[str, tuple[float, float, float]] = {
    r"NVIDIA B200": (2250, 1125, 75),
    r"NVIDIA (H200|GH200 .*|H100 80GB HBM3)": (989, 494, 67),
    r"NVIDIA H100 NVL": (835, 417, 60),
    r"NVIDIA H100 PCIe": (756, 378, 51),
    r"NVIDIA A100.*(40|80)GB( PCIe)?": (312, 156, 19.5),
    r"NVIDIA L40S": (362, 183, 91.6),
    r"NVIDIA L4": (121, 60, 30.3),
    r"NVIDIA A10": (125, 62.5, 31.2),
    r"NVIDIA GeForce RTX 4090": (165, 82.6, 82.6),
    r"NVIDIA GeForce RTX 3090": (71, 35.6, 35.6),
}
_SIDE = {"cuda": 8192, "mps": 4096, "cpu": 1024}


def arithmetic(device: torch.device, bfloat16: bool) -> Arithmetic:
    """In what the device multiplies matrices as things are set."""
    if bfloat16:
        return "bfloat16"
    return "TF32" if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest" else "float32"


class Peak:
    """Operations a second of a device, by the data sheet of a GPU that is known, else measured.

    Attributes:
        source: where the number is from.
    """

    def __init__(self, device: torch.device, kind: Arithmetic) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._device, self._known = device, listed(name, kind)
        self._seconds: list[float] = []
        self.source = f"data sheet of {name}, dense {kind}"
        if self._known is None:
            side = self._side = _SIDE[device.type]
            self.source = (
                f"measured here, beside the steps: the median product of two matrices of {side} x {side} in {kind}"
            )
            self._dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
            self._product()  # the first is slower

    def measure(self) -> None:
        """Once more, unless it is known: between two steps, so that a busy machine slows both alike."""
        if self._known is None:
            self._seconds.append(self._product())

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self._known or 2 * self._side**3 / statistics.median(self._seconds)

    def _product(self) -> float:
        left, right = torch.rand(2, self._side, self._side, dtype=self._dtype, device=self._device)
        synchronize = synchronizer(self._device)
        synchronize()
        started = time.perf_counter()
        left @ right
        synchronize()
        return time.perf_counter() - started


def listed(name: str, kind: Arithmetic) -> float | None:
    """What the data sheet of a GPU of this name, as torch gives it, says; None if it is not known."""
    for pattern, rates in _KNOWN.items():
        if re.fullmatch(pattern, name):
            return rates[("bfloat16", "TF32", "float32").index(kind)] * 1e12
    return None
