"""The worker processes of a loader: how they are started, watched and ended.

The training process decides when to stop, so signals to the whole group do not reach them; and it never waits without
end for one that is dead or hangs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader

from mamba3_jepa.data.batch import BatchMaker
from mamba3_jepa.data.pulse import Pulse, beat
from mamba3_jepa.data.spawned import Spawned
from mamba3_jepa.data.transfer import packed
from mamba3_jepa.errors import UserError
from mamba3_jepa.stop_signals import STOP_SIGNALS

STALLED_SECONDS = 600.0  # in which no worker begins a sample while a batch is waited for
_LOOK_SECONDS = 2.0  # between two looks at them

_LOST = ("DataLoader worker", "Pin memory thread", "ulimit -n")  # in what torch says of workers that are gone
_FEWER = "use fewer `workers`, or `workers` 0"


class Workers:
    """The workers of one `DataLoader`, `count` of them, at least one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._waiting_since, self._seen = 0.0, 0
        self._pulse = Pulse(count)
        self._dataset: Spawned | None = None

    def options(self, maker: BatchMaker) -> dict[str, Any]:
        """What the `DataLoader` must be told, whose batches `maker` makes; the workers do not hold a copy each."""
        maker.sign_of_life = beat
        self._dataset = Spawned(maker)
        return {
            "dataset": self._dataset,
            "num_workers": self.count,
            "collate_fn": packed,
            # "spawn": forking a process that already runs threads (torch, tokenizers, CUDA) can hang.
            "multiprocessing_context": multiprocessing.get_context("spawn"),
            "persistent_workers": True,
            "worker_init_fn": partial(_start, parent=os.getpid(), pulse=self._pulse),
        }

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """What `loader` gives in one iteration; its workers are started if they are not running yet.

        Raises:
            UserError: they cannot be started, one of them is dead, or none has moved for `STALLED_SECONDS`.
        """
        try:
            self._wait_anew()
            batches = self._started(loader)
            while True:
                self._wait_anew()
                batch = next(batches, None)
                if batch is None:
                    return
                yield batch
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _LOST):
                raise
            raise UserError(
                f"a data worker process is lost ({str(error).partition('. ')[0]}): the machine may be out of memory, "
                f"of shared memory (/dev/shm) or of file descriptors (ulimit -n): {_FEWER}"
            ) from error
        except (OSError, EOFError) as error:
            raise UserError(
                f"a data worker's batch cannot be fetched ({error or type(error).__name__}): {_FEWER}"
            ) from error

    def _started(self, loader: DataLoader[Any]) -> Iterator[Any]:
        is_new = loader._iterator is None
        try:
            with signals_held_back():
                batches = iter(loader)
        except (OSError, ImportError, RuntimeError) as error:  # of semaphores, processes, threads
            if isinstance(error, RuntimeError) and "new thread" not in str(error):
                raise
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot start {self.count} data workers: {why}; what they need of /dev/shm, "
                f"file descriptors or processes is used up: {_FEWER}, or raise the limit (docker run --shm-size=1g, "
                "ulimit)"
            ) from error
        finally:
            if self._dataset is not None:
                self._dataset.started()
        if is_new:
            watched: Any = batches
            watched._try_get_data = partial(self._look, watched._try_get_data)
        return batches

    def _wait_anew(self) -> None:
        self._waiting_since = time.monotonic()

    def _look(self, get: Any, timeout: float = _LOOK_SECONDS) -> tuple[bool, Any]:
        """As torch's loader looks for the next batch, for ever if need be, but not past `STALLED_SECONDS`."""
        found: tuple[bool, Any] = get(min(timeout, _LOOK_SECONDS))
        beats = self._pulse.total()
        if found[0] or beats != self._seen:
            self._seen = beats
            self._wait_anew()
        elif time.monotonic() - self._waiting_since > STALLED_SECONDS:
            raise UserError(
                f"no data worker has begun a sample for {STALLED_SECONDS / 60:g} minutes: what they read from may not "
                f"answer, or something has stopped them; continue with `resume`, {_FEWER}"
            )
        return found


def shut_down(loader: DataLoader[Any]) -> None:
    """End the workers of `loader`, if there are any, whatever they are doing."""
    iterator: Any = loader._iterator
    loader._iterator = None
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():  # it may be stopped, or in a call that does not return
                worker.kill()


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Processes started inside never see a stop signal to the group; this one gets them afterwards.

    The training process decides when to stop and needs its workers until then. A blocked signal stays blocked
    in a child from its first instruction on, before any Python code in it could choose to ignore it.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # a process of its own, which must not see them either; it unblocks some of them here when it starts
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _start(worker_id: int, parent: int, pulse: Pulse) -> None:
    pulse.belongs_to(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=obey_parent_only, args=(parent,), daemon=True).start()


def obey_parent_only(parent: int) -> None:
    """Ends this worker when its parent asks with SIGTERM or is gone; a SIGTERM from anybody else is dropped.

    The parent may have died while this worker was still starting, which torch's own watch would not notice.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
