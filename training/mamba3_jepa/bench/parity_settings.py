"""Settings of `scripts/learn_parity.py`. Free of torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParitySettings:
    """Train a small Mamba-3 stack on the parity of short bit strings, with rotation and without; test it on
    long ones."""

    n_layers: int = 1
    """Layers of the stack."""
    d_model: int = 32
    """Width."""
    d_state: int = 4
    """State size per head; 4 leaves one rotating pair, which cannot fit short strings with several slow turns."""
    headdim: int = 64
    """Size of a head; 64 makes it one head."""
    a_activation: Literal["heavy_tail", "softplus"] = "softplus"
    """How the decay rate is made; softplus comes close to zero soon, where a state lasts."""
    initial_decay_logit: float = 8.0
    """How far below zero the argument of the activation starts, on average."""
    dt_min: float = 0.5
    """Smallest initial step size; the language default, at most 0.1, turns the state by a tenth of pi at
    most."""
    dt_max: float = 1.5
    """Largest initial step size."""
    train_length: int = 40
    """Longest string in training."""
    test_lengths: tuple[int, ...] = (16, 40, 64, 128, 256, 512)
    """Lengths of the strings to test on."""
    test_strings: int = 2048
    """Fresh random strings per test length."""
    steps: int = 1000
    """Training steps."""
    batch_size: int = 128
    """Strings per step."""
    lr: float = 5e-3
    """Highest learning rate of Adam."""
    warm_up: int = 50
    """Steps of warm-up."""
    seed: int = 0
    """Decides weights and strings."""
    threads: int = 2
    """CPU threads of torch."""
    output_dir: Path = Path("outputs/parity")
    """Where parity.png and parity.json go."""
