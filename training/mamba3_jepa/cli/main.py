"""The `mamba3-jepa` command. Subcommands import what they need when they run, so that --help answers at once."""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import tyro
from rich.console import Console
from rich.logging import RichHandler

from mamba3_jepa.cli.bench import bench
from mamba3_jepa.cli.cache import cache
from mamba3_jepa.cli.commands import Commands
from mamba3_jepa.cli.export import export, inspect
from mamba3_jepa.cli.flags import FlagFilter, demand_paths, gathered, with_flags
from mamba3_jepa.cli.memory import memory
from mamba3_jepa.cli.output import open_streams, printable
from mamba3_jepa.cli.prepare import prepare
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.settings.inference import (
    AgentSettings,
    AskSettings,
    ClassifySettings,
    EmbedSettings,
    EvaluateSettings,
    SearchSettings,
)
from mamba3_jepa.settings.language_model import LanguageModelSettings
from mamba3_jepa.settings.training import Phase1Settings, Phase2Settings, Phase3Settings
from mamba3_jepa.stop_signals import STOP_SIGNALS, is_ignored
from mamba3_jepa.training.interrupt import Interrupted, PeerLostError

# what a standard output says that cannot be written: a full disk or quota, a terminal that is gone
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
_CLOSED_PIPE = 141  # 128 + SIGPIPE, which Windows lacks

app = Commands()


@app.command(name="train-jepa")
def train_jepa(settings: Annotated[Phase1Settings, tyro.conf.arg(name="")]) -> None:
    """Phase 1: train the Predictor, the Y-Encoder and the ANGN gates with InfoNCE; the X-Encoder stays frozen.

    Without --data-dir it trains on synthetic scenes (coloured shapes with captions and questions).
    """
    from mamba3_jepa.training.phase1 import train_phase1

    train_phase1(settings)


@app.command(name="train-decoder")
def train_decoder(settings: Annotated[Phase2Settings, tyro.conf.arg(name="")]) -> None:
    """Phase 2: train the Y-Decoder to say the answer that phase 1's model predicts; everything else stays frozen.

    Without --data-dir it trains on synthetic scenes (coloured shapes with captions and questions).
    """
    from mamba3_jepa.training.phase2 import train_phase2

    train_phase2(settings)


@app.command(name="train-agent")
def train_agent(settings: Annotated[Phase3Settings, tyro.conf.arg(name="")]) -> None:
    """Phase 3: train the confusion monitor and the state injector; the model of phases 1 and 2 stays frozen.

    Without --data-dir it trains on synthetic scenes (coloured shapes with captions and questions). Confused samples
    are made from the data: mismatched pairs, unanswerable questions, corrupted images.
    """
    from mamba3_jepa.training.phase3 import train_phase3

    train_phase3(settings)


@app.command
def evaluate(settings: Annotated[EvaluateSettings, tyro.conf.arg(name="")]) -> None:
    """Measure a checkpoint on any manifest: retrieval, zero-shot labels, questions by nearest and generated answer."""
    from mamba3_jepa.cli.evaluate import run_evaluate

    run_evaluate(settings)


@app.command
def ask(settings: Annotated[AskSettings, tyro.conf.arg(name="")]) -> None:
    """Ask a trained model about an image: answer, confidence, confusion, nearest known answers."""
    from mamba3_jepa.cli.ask import run_ask

    run_ask(settings)


@app.command
def agent(settings: Annotated[AgentSettings, tyro.conf.arg(name="")]) -> None:
    """Ask a trained model, which calls tools where it is confused: a memory, commands, Python functions."""
    from mamba3_jepa.cli.agent import run_agent

    run_agent(settings)


@app.command
def embed(settings: Annotated[EmbedSettings, tyro.conf.arg(name="")]) -> None:
    """Write the embeddings of images or texts to a .npy or .safetensors file."""
    from mamba3_jepa.cli.embed import run_embed

    run_embed(settings)


@app.command
def search(settings: Annotated[SearchSettings, tyro.conf.arg(name="")]) -> None:
    """Rank the images of a folder by how well they show what a text says."""
    from mamba3_jepa.cli.search import run_search

    run_search(settings)


@app.command
def classify(settings: Annotated[ClassifySettings, tyro.conf.arg(name="")]) -> None:
    """Choose among labels for images, without training for them (zero-shot)."""
    from mamba3_jepa.cli.classify import run_classify

    run_classify(settings)


@app.command
def lm(settings: Annotated[LanguageModelSettings, tyro.conf.arg(name="")]) -> None:
    """Let an official Mamba-3 language model go on from texts."""
    from mamba3_jepa.cli.lm import run_lm

    run_lm(settings)


app.command(prepare, name="prepare")
app.command(bench, name="bench")
app.command(cache, name="cache")
app.command(memory, name="memory")
app.command(export)
app.command(inspect)


def main(argv: Sequence[str] | None = None, prog: str = "mamba3-jepa") -> int:
    """Run the command line; returns the exit status.

    0 done, 2 user error, 75 another process of the run was lost, 128 + signal when interrupted, 141 (128 + SIGPIPE)
    when nobody reads the output any more.
    """
    open_streams()
    _set_up_logging()
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        with _ending_at_stop_signals(), _failing_output():
            demand_paths(arguments)
            arguments = gathered(arguments, app.settings_of(arguments))
            app.cli(prog=prog, args=arguments, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone))
    except UserError as error:
        _print_error(with_flags(str(error)))
        return 2
    except PermissionError as error:
        _print_error(f"{error.filename}: permission denied")
        return 2
    except _Terminated as terminated:
        return 128 + terminated.number
    except _ClosedPipe:
        return _CLOSED_PIPE
    except Interrupted as interrupted:
        logging.getLogger(__name__).warning("%s", interrupted)
        return interrupted.exit_code
    except PeerLostError as lost:
        logging.getLogger(__name__).error("%s", lost)
        return lost.exit_code
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _print_error(f"out of memory: {' '.join(str(error).split()) or 'none is left'}; use smaller sizes or batches")
        return 2
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Of Python and NumPy, torch on the CPU, or torch on a GPU; torch itself may not be loaded."""
    said = "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, MemoryError) or said or type(error).__name__ == "OutOfMemoryError"


class _Terminated(BaseException):
    """A stop signal other than Ctrl-C, where nothing else waits for it (training does)."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _ending_at_stop_signals() -> Iterator[None]:
    """SIGTERM and its like end what runs as Ctrl-C does: temporary files are removed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _Terminated(number)

    heard = [number for number in STOP_SIGNALS if number != signal.SIGINT and not is_ignored(number)]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _ClosedPipe(Exception):
    """Nobody reads the standard output any more."""


@contextmanager
def _failing_output() -> Iterator[None]:
    """Say why the standard output cannot be written, and keep the interpreter from trying again at its end.

    Raises:
        UserError: the disk is full, for instance.
        _ClosedPipe: its reader has gone.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit as end:
        if end.code != 1:
            raise
        raise _ClosedPipe from end  # what rich makes of a closed pipe
    except OSError as error:
        is_closed = isinstance(error, BrokenPipeError) and _has_no_reader()
        if not is_closed and (error.errno not in _CANNOT_WRITE or error.filename is not None):
            raise  # it is about something else; that a file cannot be written is a UserError
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if is_closed:
            raise _ClosedPipe from error
        raise UserError(f"cannot write to the standard output: {error.strerror}") from error


def _has_no_reader() -> bool:
    """Whether the standard output is a pipe or a socket whose other end is closed."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _print_error(message: str) -> None:
    console = Console(stderr=True, emoji=False)
    lines = "\n".join(map(printable, path_text(message).split("\n")))
    console.print(f"error: {lines}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def _set_up_logging() -> None:
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_time=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.addFilter(FlagFilter())
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a lost process is said in a sentence, not in pages of C++ frames
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, handlers=[handler])
    for noisy in ("httpx", "torch.distributed", "matplotlib", "PIL", "aiobotocore", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
