"""Programs of this project in processes of their own, without the seconds that each would take to import torch.

A server imports everything once, and every program is a fork of it. It begins as one from a shell does, with streams,
an environment, a folder and a session of its own, and ends with the interpreter's own end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from undrawn import UNDRAWN

_IMPORTED = (
    "mamba3_jepa.cli.agent", "mamba3_jepa.cli.ask", "mamba3_jepa.cli.classify", "mamba3_jepa.cli.embed",
    "mamba3_jepa.cli.evaluate", "mamba3_jepa.cli.main", "mamba3_jepa.cli.search", "mamba3_jepa.export.exporter",
    "mamba3_jepa.training.phase1", "mamba3_jepa.training.phase2", "mamba3_jepa.training.phase3", "torch._dynamo",
)  # fmt: skip
_COMMAND = "mamba3-jepa"


class Program:
    """The command with `arguments`, or the file `program` with them, started at once.

    What it says is kept in a file for each stream that is not given, as `outputs` reads it. Its figures are single
    pixels unless they are to be drawn.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        program: Path | None = None,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        drawn: bool = False,
    ) -> None:
        self._kept: list[IO[bytes] | None] = []
        streams = []
        for given in (stdout, stderr):
            file = tempfile.TemporaryFile() if given is None else None  # noqa: SIM115
            self._kept.append(file)
            streams.append(given if file is None else file.fileno())
        self._watcher, theirs = socket.socketpair()
        wanted = {
            "program": None if program is None else str(program),
            "arguments": list(arguments),
            "drawn": drawn,
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(os.environ) | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
        }
        with theirs, open(os.devnull) as nothing:
            socket.send_fds(_server(), [b"."], [theirs.fileno(), nothing.fileno(), *streams])
        self._watcher.sendall(json.dumps(wanted).encode() + b"\n")
        self.pid = self._told()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its status, once it has one."""
        with contextlib.suppress(TimeoutError):
            self.wait(timeout=0.001)
        return self.returncode

    def wait(self, timeout: float = 500) -> int:
        """Its status, minus the number of the signal that ended it; TimeoutError after so many seconds."""
        if self.returncode is None:
            self._watcher.settimeout(timeout)
            self.returncode = os.waitstatus_to_exitcode(self._told())
        return self.returncode

    def _told(self) -> int:
        number = self._watcher.recv(4, socket.MSG_WAITALL)
        if len(number) < 4:
            raise ConnectionError("the server of the tests' programs has ended")
        return int.from_bytes(number, "little")

    def send_signal(self, number: int) -> None:
        """To the program alone, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def abort(self) -> None:
        """End it with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGABRT)

    def outputs(self, timeout: float = 500) -> tuple[bytes, bytes]:
        """What it has said on standard output and error when it has ended; nothing of a stream that was given."""
        self.wait(timeout)
        for file in self._kept:
            if file is not None:
                file.seek(0)
        return tuple(b"" if file is None else file.read() for file in self._kept)  # type: ignore[return-value]

    def said(self) -> str:
        """All that it has said, when it has ended."""
        return b"".join(self.outputs()).decode(errors="replace")


@functools.cache
def _server() -> socket.socket:
    """The end of which means the server's."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    return ours


def _serve(control: socket.socket) -> None:
    """Return in a process that is the program that was asked for, and nowhere else."""
    while True:
        _, files, _, _ = socket.recv_fds(control, 1, 4)
        if not files:
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            control.close()
            return _watch(socket.socket(fileno=files[0]), files[1:])
        for file in files:
            os.close(file)


def _watch(asked: socket.socket, streams: Sequence[int]) -> None:
    """Return in the program; the process before it tells its number and how it ended."""
    text = asked.makefile("r", encoding="utf-8")
    wanted = json.loads(text.readline())
    pid = os.fork()
    if pid:
        asked.sendall(pid.to_bytes(4, "little"))
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):
            asked.sendall(status.to_bytes(4, "little"))
        os._exit(0)
    text.close()
    asked.close()
    os.setsid()
    for number, file in enumerate(streams):
        os.dup2(file, number)
        os.close(file)
    faulthandler.enable()
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    sys.stdout = open(1, "w", encoding=encoding, errors=errors or "strict", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if not wanted["drawn"]:
        for undrawn in UNDRAWN:
            setattr(*undrawn)
    sys.argv = [wanted["program"] or _COMMAND, *wanted["arguments"]]


if __name__ == "__main__":
    for module in _IMPORTED:
        importlib.import_module(module)
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
    if sys.argv[0] == _COMMAND:
        from mamba3_jepa.cli.main import main

        sys.exit(main())
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
