"""The commands in several processes, as torchrun starts them, on one host or on hosts that share no disk."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

COMMAND = ["-m", "mamba3_jepa.cli.main"]
_TIMEOUT = 500  # seconds, for a machine that has much else to do
# No name is looked up, which takes long where no server answers.
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def torchrun(n: int, *arguments: str, program: Sequence[str] = COMMAND) -> tuple[int, str]:
    """`program` with `arguments` in n processes of this host: status, and what they said."""
    (result,) = _ended([_start([*_TORCHRUN, "--nproc-per-node", str(n), *program, *arguments])])
    return result


def hosts(folders: Sequence[Path], *arguments: str) -> list[tuple[int, str]]:
    """The command once in each folder, as the ranks of one run: status, and what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    size = {"WORLD_SIZE": str(len(folders)), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return _ended([
        _start([sys.executable, *COMMAND, *arguments], cwd=folder, RANK=str(rank), **size, **meeting)
        for rank, folder in enumerate(folders)
    ])  # fmt: skip


def _start(command: list[str], cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=cwd, env=os.environ | _ENVIRONMENT | environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _ended(running: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Those that hang are ended with all that they started, and say where they were."""
    results = []
    for process in running:
        try:
            said, _ = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            for each in running:
                os.killpg(each.pid, signal.SIGABRT)
            said = "\n".join(each.communicate()[0] for each in running)
            raise AssertionError(f"not ended after {_TIMEOUT} s:\n{said}") from None
        results.append((process.returncode, said))
    return results
