"""The commands in several processes, as torchrun starts them, on one host or on hosts that share no disk."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fork_server import Program

_TIMEOUT = 500  # seconds, for a machine that has much else to do
# No name is looked up, which takes long where no server answers.
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def torchrun(n: int, *arguments: str, program: Path) -> tuple[int, str]:
    """`program` with `arguments` in n processes of this host, by torchrun itself: status, and what they said."""
    process = subprocess.Popen(
        [*_TORCHRUN, "--nproc-per-node", str(n), str(program), *arguments], env=os.environ | _ENVIRONMENT, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        raise AssertionError(f"not ended after {_TIMEOUT} s:\n{process.communicate()[0]}") from None
    return process.returncode, said


def ranks(n: int, *arguments: str, program: Path | None = None) -> tuple[int, str]:
    """As `torchrun`, in less time: the first status that is not 0, and what all of them said."""
    results = _ended(_started([Path.cwd()] * n, arguments, program, one_host=True))
    return next((status for status, _ in results if status), 0), "".join(said for _, said in results)


def hosts(folders: Sequence[Path], *arguments: str) -> list[tuple[int, str]]:
    """The command once in each folder, as the ranks of one run: status, and what it said."""
    return _ended(_started(folders, arguments, None, one_host=False))


def _started(
    folders: Sequence[Path], arguments: Sequence[str], program: Path | None, *, one_host: bool
) -> list[Program]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    n = len(folders)
    return [
        Program(arguments, program=program, cwd=folder, environment={
            **meeting, "RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank if one_host else 0),
            "LOCAL_WORLD_SIZE": str(n if one_host else 1),
        })
        for rank, folder in enumerate(folders)
    ]  # fmt: skip


def _ended(running: Sequence[Program]) -> list[tuple[int, str]]:
    """Those that hang are ended with all that they started, and say where they were."""
    try:
        for program in running:
            program.wait(_TIMEOUT)
    except TimeoutError:
        for program in running:
            program.abort()
        said = "\n".join(program.said() for program in running)
        raise AssertionError(f"not ended after {_TIMEOUT} s:\n{said}") from None
    return [(program.wait(), program.said()) for program in running]
