"""SIGTERM, Ctrl-C and what schedulers send before a time limit ask the loop to stop after the current step; a second
Ctrl-C stops at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from mamba3_jepa.stop_signals import STOP_SIGNALS, is_ignored


class StopSignal:
    """Context manager; `received` is the number of the first of `STOP_SIGNALS` since entry, or None."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in STOP_SIGNALS:
            if not is_ignored(number):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


class Interrupted(Exception):
    """The run was asked to stop and has saved its state.

    Attributes:
        exit_code: 128 + the signal's number, as shells report it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
