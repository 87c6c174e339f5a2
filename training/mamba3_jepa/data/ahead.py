"""Fetches the shards of an epoch ahead of need, in its order, and keeps those in use from being removed."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from mamba3_jepa.data.remote import FetchStoppedError, Listed
from mamba3_jepa.data.shard_cache import ShardCache
from mamba3_jepa.data.windows import Window
from mamba3_jepa.errors import UserError

logger = logging.getLogger(__name__)

_TOGETHER = 4  # shards fetched at once
_LOOK_SECONDS = 0.2


class Ahead:
    """Context manager; while it lasts, the window in use and the next one are fetched and stay.

    A shard that cannot be fetched is left to whoever reads it, who says why.
    """

    def __init__(self, cache: ShardCache, shards: list[Listed], windows: Iterable[Window]) -> None:
        self._cache, self._shards, self._windows = cache, shards, iter(windows)
        self._stop = threading.Event()
        self._reached = -1  # the last batch that is done
        self._moved = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shards ahead", daemon=True)

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._moved.set()
        self._thread.join(timeout=30)

    def reached(self, batch: int) -> None:
        """Batch `batch` of the epoch is done: windows that end with it or before are no longer needed."""
        self._reached = batch
        self._moved.set()

    def _run(self) -> None:
        held: list[tuple[Window, contextlib.ExitStack]] = []
        try:
            with ThreadPoolExecutor(_TOGETHER) as pool:
                for window in self._windows:
                    if not self._until(held, at_most=1):
                        return
                    if window.batches[1] <= self._reached:  # whoever read it was faster
                        continue
                    held.append((window, contextlib.ExitStack()))
                    for pin in [pool.submit(self._pin, shard) for shard in window.shards]:
                        self._keep(pin, held[-1][1])
            self._until(held, at_most=0)
        finally:
            for _, pins in held:
                pins.close()

    def _until(self, held: list[tuple[Window, contextlib.ExitStack]], at_most: int) -> bool:
        """Let go of the windows that are done with, until there are few enough; False if it is to stop before."""
        while not self._stop.is_set():
            self._moved.clear()
            while held and held[0][0].batches[1] <= self._reached:
                held.pop(0)[1].close()
            if len(held) <= at_most:
                return True
            self._moved.wait(_LOOK_SECONDS)
        return False

    def _pin(self, shard: int) -> contextlib.ExitStack:
        pin = contextlib.ExitStack()
        pin.enter_context(self._cache.pinned(self._shards[shard], wanted=lambda: not self._stop.is_set()))
        return pin

    def _keep(self, pin: Future[contextlib.ExitStack], pins: contextlib.ExitStack) -> None:
        try:
            pins.push(pin.result())
        except FetchStoppedError:
            pass
        except UserError as error:
            logger.warning("ahead of need: %s", error)
