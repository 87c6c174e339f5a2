"""Whether the other processes of a run are still there. One that is gone ends the run with a sentence, in a minute.

A collective waits as long as it takes, since a process may rightly work for an hour while the others wait for it, and a
connection whose other end has lost its power says nothing. So each process gives signs of life through the store that
brought them together, from a thread of its own, and listens for those of the next rank.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch.distributed as dist

from mamba3_jepa.settings.training import TrainSettings
from mamba3_jepa.training.distributed import keep_group, rank, world_size
from mamba3_jepa.training.interrupt import PeerLostError

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=TrainSettings)
P = ParamSpec("P")
T = TypeVar("T")

BEAT, SILENCE = 5.0, 40.0  # seconds between signs of life, and without one until a process counts as lost
_FAREWELL = 1 << 40  # more signs than a run gives: the process has left as it should
_LOST_CONNECTION = re.compile(
    r"gloo.transport|Connection (reset|closed|refused)|Broken pipe|remote process exited|nccl(Remote|System)Error"
)


def in_company(command: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Decorator of what a run's processes do together: the loss of one of them is an error on each of the others.

    Raises:
        PeerLostError: a connection broke. Where none does, since the other host is silent, this process waits in a
            collective that cannot be left: it says the same sentence and ends at once, with the error's exit code.
    """

    @functools.wraps(command)
    def together(settings: S, /, *arguments: P.args, **options: P.kwargs) -> T:
        try:
            return command(settings, *arguments, **options)
        except RuntimeError as error:
            if world_size() == 1 or not _LOST_CONNECTION.search(str(error)):
                raise
            keep_group()
            what = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]  # not where in gloo
            whom = f"another process of this run ({what})"
            raise PeerLostError(_sentence(whom, settings.output_dir)) from error
        finally:
            _Watch.end()

    return together


def watch_peers(output_dir: Path) -> None:
    """From now on, until the end of the function that is `in_company`, notice the silence of another process.

    Args:
        output_dir: where the run can be resumed from.
    """
    if world_size() > 1:
        _Watch.begin(output_dir)


def _sentence(who: str, output_dir: Path) -> str:
    return (
        f"lost {who}: it has ended, or its host is down or cut off. What it said last tells more. This run cannot go "
        f"on without it; the same command with `resume` continues from the last save in {output_dir}"
    )


class _Watch:
    """Two threads: one talks with the store, which may take for ever, the other one looks at the clock."""

    _running: _Watch | None = None

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENCE))
        # torchrun that starts a job's processes again keeps the store
        self._store = dist.PrefixStore(f"mamba3_jepa/peers/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self._store_host = host
        self._next = (rank() + 1) % world_size()
        self._reached = self._heard = time.monotonic()  # the store, the next rank
        self._found = ""  # whom this process misses
        self._told = ""  # whom some process misses
        self._left = threading.Event()
        self._talking = threading.Thread(target=self._talk, name="signs of life", daemon=True)
        self._looking = threading.Thread(target=self._look, name="watching peers", daemon=True)

    @classmethod
    def begin(cls, output_dir: Path) -> None:
        cls.end()
        cls._running = cls(output_dir)
        cls._running._talking.start()
        cls._running._looking.start()

    @classmethod
    def end(cls) -> None:
        """Say farewell, so that nobody misses this process."""
        running, cls._running = cls._running, None
        if running is not None:
            running._left.set()
            running._talking.join(BEAT)

    def _talk(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, which `_look` will notice
            self._store.set(f"host{rank()}", socket.gethostname())
            signs = 0
            while not self._left.wait(BEAT):
                self._store.add(str(rank()), 1)
                heard = self._store.add(str(self._next), 0)
                if heard != signs or heard >= _FAREWELL:
                    signs, self._heard = heard, time.monotonic()
                if self._found:
                    self._store.set("lost", self._named(self._next))
                if self._store.check(["lost"]):
                    self._told = self._store.get("lost").decode()
                self._reached = time.monotonic()
            self._store.add(str(rank()), _FAREWELL)

    def _named(self, number: int) -> str:
        host = self._store.get(f"host{number}").decode() if self._store.check([f"host{number}"]) else "its host"
        return f"rank {number} on {host}, which has given no sign of life for {SILENCE:.0f} s"

    def _look(self) -> None:
        looked = time.monotonic()
        while not self._left.wait(BEAT / 2):
            now = time.monotonic()
            if now - looked > SILENCE / 2:  # this process itself was suspended, and the others perhaps with it
                self._reached = self._heard = now
            looked = now
            if now - self._reached > SILENCE:
                return self._give_up(f"{self._store_host}, the host of rank 0, which does not answer")
            if now - self._heard > SILENCE:
                self._found = f"rank {self._next}"  # `_talk` tells all, this process too
            if self._told:
                return self._give_up(self._told)
        return None

    def _give_up(self, whom: str) -> None:
        """End this process from outside its main thread, which waits for what will not come."""
        logger.error("%s", _sentence(whom, self._output_dir))
        logging.shutdown()
        sys.stdout.flush()
        os._exit(PeerLostError.exit_code)
