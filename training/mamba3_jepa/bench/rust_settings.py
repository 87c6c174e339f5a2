"""Settings of `mamba3-jepa bench rust`. Free of torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mamba3_jepa.config import PresetName
from mamba3_jepa.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RustBenchmarkSettings:
    """Time the Rust crate and PyTorch on the same weights, in turns."""

    command: Path = Path("../rust/target/release/kore-vljepa")
    """The Rust command; `make rust` builds it."""
    preset: PresetName = "small"
    """Model size; the weights are random, which changes nothing about the time."""
    rounds: int = 5
    """Rounds; in each both run, in turns as to which goes first, and the medians over the rounds count."""
    threads: int = 2
    """CPU threads of both."""
    question_tokens: int = 16
    """Tokens of the question that the predictor reads behind the image."""
    folder: Path | None = None
    """Where to keep the exported weights (several GiB at small), for another time; default: a temporary folder."""

    def check(self) -> None:
        """Raise UserError for values that cannot be measured."""
        for name in ("rounds", "threads", "question_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"bench rust: --{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not self.command.is_file():
            raise UserError(f"bench rust: {self.command}: there is no such command; `make rust` builds it")
