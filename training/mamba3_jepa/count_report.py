"""Progress of what counts towards a known total: a bar with rate and ETA on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

LINE_EVERY_SECONDS = 10.0


B = TypeVar("B", bound="TerminalBar")


class TerminalBar:
    """Context manager of reports: a bar with time and ETA, on a terminal, of the main process alone."""

    def __init__(self, first: str, is_main: bool) -> None:
        """`first`: template of the column before the bar; a task has the field `status`."""
        self._is_main = is_main
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if is_main and console.is_terminal:
            self._bar = Progress(
                TextColumn(first), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
                console=console,
            )  # fmt: skip

    def __enter__(self: B) -> B:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class CountReport(TerminalBar):
    """Counts towards a known total, with rate and ETA. Silent on all but the main process."""

    def __init__(self, what: str, total: int, unit: str, is_main: bool) -> None:
        super().__init__("{task.description}", is_main)
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._started = self._last_line = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=total, status="")

    def advance(self, count: int) -> None:
        """Show that `count` more are done."""
        self._done += count
        if not self._is_main:
            return
        now = time.monotonic()
        rate = self._done / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, status=f"{rate:,.0f} {self._unit}/s")
        elif now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            logger.info(
                "%s: %d/%d  %.0f %s/s  ETA %s",
                self._what, self._done, self._total, rate, self._unit, clock((self._total - self._done) / rate),
            )  # fmt: skip


def clock(seconds: float) -> str:
    """1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
