"""SIGTERM, Ctrl-C and what schedulers send before a time limit ask the loop to stop after the current micro-batch; a
second Ctrl-C stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType, TracebackType
from typing import Any, ClassVar

from mamba3_jepa.stop_signals import STOP_SIGNALS, is_ignored


class StopRequested(BaseException):
    """A request to stop that arrived inside `StopSignal.heard_at_once`; no `except Exception` takes it for a failure.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignal:
    """Context manager; `received` is the number of the first of `STOP_SIGNALS` since entry, or None."""

    _innermost: ClassVar[StopSignal | None] = None

    def __init__(self) -> None:
        self.received: int | None = None
        self._at_once = False
        self._outer: StopSignal | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._outer, StopSignal._innermost = StopSignal._innermost, self
        for number in STOP_SIGNALS:
            if not is_ignored(number):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        StopSignal._innermost = self._outer

    @staticmethod
    def heard_at_once() -> AbstractContextManager[None]:
        """For work that may be left at any moment, such as reading: inside, a request to the innermost `StopSignal`
        raises `StopRequested`; at the beginning, if it came before."""
        return nullcontext() if StopSignal._innermost is None else StopSignal._innermost._raising()

    @contextmanager
    def _raising(self) -> Iterator[None]:
        try:
            self._at_once = True
            if self.received is not None:
                raise StopRequested(self.received)
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
        if self._at_once:
            raise StopRequested(self.received)


class Interrupted(Exception):
    """The run was asked to stop and has saved its state.

    Attributes:
        exit_code: 128 + the signal's number, as shells report it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class PeerLostError(Exception):
    """Another process of the run has ended or cannot be reached; what was saved before stands."""

    exit_code: ClassVar[int] = 75  # EX_TEMPFAIL: nothing is wrong with the command, try again
