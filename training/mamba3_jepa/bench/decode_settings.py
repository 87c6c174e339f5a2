"""Settings of `mamba3-jepa bench decode`. Free of torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from mamba3_jepa.config import PresetName


@dataclass(frozen=True, kw_only=True)
class DecodeBenchmarkSettings:
    """Time the Y-Decoder token by token, near the beginning of a text and far into it."""

    preset: PresetName = "small"
    """Model size; the weights are random, which changes nothing about the time."""
    batch: int = 1
    """Sequences at a time."""
    early: int = 20
    """Position of the early token."""
    late: int = 2000
    """Position of the late token."""
    window: int = 32
    """Tokens to time around each position."""
    rounds: int = 15
    """Rounds; in each both windows run, and the medians over the rounds count."""
    full_forward: bool = True
    """Also time what a model without a state would do: run all tokens so far again for the next one (slow)."""
    threads: int = 2
    """CPU threads of torch."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
