"""The `mamba3-jepa` command. Subcommands import what they need when they run, so that --help answers at once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Column, Table

from mamba3_jepa.cli.commands import bench, prepare
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.settings import EvaluateSettings
from mamba3_jepa.training.interrupt import Interrupted
from mamba3_jepa.training.settings import Phase1Settings

app = tyro.extras.SubcommandApp()


@app.command(name="train-jepa")
def train_jepa(settings: Annotated[Phase1Settings, tyro.conf.arg(name="")]) -> None:
    """Phase 1: train the Predictor, the Y-Encoder and the ANGN gates with InfoNCE; the X-Encoder stays frozen.

    Without --data-dir it trains on synthetic scenes (coloured shapes with captions and questions).
    """
    from mamba3_jepa.training.phase1 import train_phase1

    train_phase1(settings)


@app.command
def evaluate(settings: Annotated[EvaluateSettings, tyro.conf.arg(name="")]) -> None:
    """Measure a checkpoint on a manifest: retrieval both ways, and questions answered by nearest answer embedding."""
    from mamba3_jepa.evaluation.evaluate import evaluate_checkpoint

    metrics = evaluate_checkpoint(settings).metrics("test")
    table = Table("metric", Column("value", justify="right"), box=box.SIMPLE)
    for name, value in metrics.items():
        table.add_row(name.removeprefix("test/"), f"{value:.4g}")
    Console().print(table)


app.command(prepare, name="prepare")
app.command(bench, name="bench")


def main(argv: Sequence[str] | None = None, prog: str = "mamba3-jepa") -> int:
    """Run the command line; returns the exit status (0 done, 2 user error, 128 + signal when interrupted)."""
    _set_up_logging()
    try:
        app.cli(prog=prog, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except Interrupted as interrupted:
        logging.getLogger(__name__).warning("%s", interrupted)
        return interrupted.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _set_up_logging() -> None:
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_time=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, handlers=[handler])
    for noisy in ("httpx", "torch.distributed", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
