"""Settings of `mamba3-jepa bench cache`. Free of torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from mamba3_jepa.config import PresetName
from mamba3_jepa.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CacheBenchmarkSettings:
    """Time phase 2 with the frozen model's outputs from the disk, and with that model run in every step."""

    preset: PresetName = "mini"
    """Model size; the weights are random, which changes nothing about the time."""
    batches: int = 24
    """Batches to time; each way takes one in turn, so that a busy machine slows all alike."""
    batch_size: int | None = None
    """Samples per batch; default: that of phase 2 for this preset."""
    epoch_samples: int = 24_000
    """Samples of the epoch that the times are extrapolated to."""
    threads: int = 2
    """CPU threads of torch."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""

    def check(self) -> None:
        """Raise UserError for values that cannot be measured."""
        for name in ("batches", "batch_size", "epoch_samples", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"bench cache: --{name.replace('_', '-')} {value}: must be at least 1")
