"""The same questions about the same pictures, answered by Python from a checkpoint and by Rust from its export.

`python scripts/side_by_side.py --checkpoint phase3_best.pt --weights weights --data-dir scenes` prints both answers
beside each other and exits with 1 where they differ; with `--tools` both are agents, and every step must be the same.
`KORE_VLJEPA` names the Rust command.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mamba3_jepa.cli.flags import gathered
from mamba3_jepa.cli.main import main as python_command
from mamba3_jepa.cli.output import printable
from mamba3_jepa.errors import UserError

DEFAULT_COMMAND = Path(__file__).resolve().parents[2] / "rust/target/release/kore-vljepa"
TOLERANCE = 1e-4  # of scores, probabilities and cosines; everything else must be equal


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to ask, and of whom."""

    checkpoint: Path
    """What Python answers from."""
    weights: Path
    """Its export, with the X-Encoder, which Rust answers from."""
    data_dir: Path
    """A data directory with pictures and questions, as `mamba3-jepa prepare scenes` writes it."""
    manifest: str = "manifest.jsonl"
    """Which of its files names the questions; `demonstrations.jsonl` has some that need a tool."""
    questions: int | None = None
    """How many questions, the first ones; all unless given."""
    memory: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A text file with one text a line, which both may look up when they are confused."""
    tools: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A JSON file with commands, which both may call when they are confused: both are agents then."""
    show: int = 12
    """Rows to print; those that differ are printed always."""


@dataclass(frozen=True)
class Pair:
    """Both answers to one question, as the commands' JSON gives them, and what differs."""

    image: str
    python: dict[str, Any]
    rust: dict[str, Any]
    differences: list[str]


def side_by_side(settings: Settings) -> list[Pair]:
    """Ask both, picture by picture.

    Raises:
        UserError: there is nothing to ask, or one of the commands failed.
    """
    pairs = []
    for image, questions in _questions(settings).items():
        arguments = ["--json"] if image is None else ["--json", "--image", str(settings.data_dir / image)]
        for flag, path in (("--memory", settings.memory), ("--tools", settings.tools)):
            arguments += [] if path is None else [flag, str(path)]
        command = "ask" if settings.tools is None else "agent"
        model = ["--checkpoint", str(settings.checkpoint), "--device", "cpu"]  # where Rust computes, too
        by_python = _ask_python([command, *model, *arguments, *questions])
        by_rust = _ask_rust([command, "--weights", str(settings.weights), *arguments, *questions])
        pairs += [Pair(image or "", p, r, list(differences(p, r))) for p, r in zip(by_python, by_rust, strict=True)]
    return pairs


def differences(python: Any, rust: Any, place: str = "") -> Iterator[str]:
    """Where two answers differ, such as `nearest.0.text`."""
    if isinstance(python, dict) and isinstance(rust, dict) and list(python) == list(rust):
        pairs = [(name, python[name], rust[name]) for name in python]
    elif isinstance(python, list) and isinstance(rust, list) and len(python) == len(rust):
        pairs = list(zip(range(len(python)), python, rust, strict=True))
    else:
        is_number = isinstance(python, float) and isinstance(rust, float)
        if not (math.isclose(python, rust, rel_tol=0, abs_tol=TOLERANCE) if is_number else python == rust):
            yield place or "fields"
        return
    for name, here, there in pairs:
        yield from differences(here, there, f"{place}.{name}" if place else str(name))


def _questions(settings: Settings) -> dict[str | None, list[str]]:
    """The first questions of the manifest, by picture; under None those without one."""
    found: dict[str | None, list[str]] = {}
    path, left = settings.data_dir / settings.manifest, settings.questions
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}; `mamba3-jepa prepare scenes` writes one") from error
    asked = [record for record in records if record.get("question")]
    if not asked or len(asked) < (left or 0):
        raise UserError(f"{path}: {len(asked)} questions, {left or 'some'} were wanted")
    for record in asked[:left]:
        found.setdefault(record.get("image"), []).append(record["question"])
    return found


def _ask_python(arguments: Sequence[str]) -> list[dict[str, Any]]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = python_command(arguments)
    if status:
        raise UserError(f"mamba3-jepa {' '.join(arguments)}: ended with {status}")
    return json.loads(said.getvalue())


def _ask_rust(arguments: Sequence[str]) -> list[dict[str, Any]]:
    command = os.environ.get("KORE_VLJEPA") or str(DEFAULT_COMMAND)
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"{command}: cannot be run ({error.strerror}); `make rust` builds it") from error
    if done.returncode:
        raise UserError(f"{command} {' '.join(arguments)}: ended with {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def _row(pair: Pair) -> tuple[str, ...]:
    cells = [pair.image, pair.python["question"]]
    for answer in (pair.python, pair.rust):
        first = answer["trace"][0] if "trace" in answer else answer
        confusion = "" if first["confusion"] is None else f"  ({first['confusion']:.3f})"
        cells.append(f"{answer['text']}{confusion}")
    return (*cells, ", ".join(pair.differences) or "same")


def main() -> int:
    """Print the table; 0 when all answers agree, 1 when some do not, 2 for what cannot be asked."""
    console = Console()
    try:
        settings = tyro.cli(Settings, description=__doc__, args=gathered(sys.argv[1:], Settings))
        pairs = side_by_side(settings)
    except (UserError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 2
    table = Table("picture", "question", "Python (confusion)", "Rust (confusion)", "", box=box.SIMPLE)
    for number, pair in enumerate(pairs):
        if number < settings.show or pair.differences:
            table.add_row(*(Text(printable(cell)) for cell in _row(pair)))
    console.print(table)
    differing = sum(bool(pair.differences) for pair in pairs)
    console.print(f"{len(pairs)} questions, {len(pairs) - differing} answered alike", highlight=False)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
