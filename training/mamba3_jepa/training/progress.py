"""Progress of a long run: a bar with rate and ETA on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from mamba3_jepa.count_report import LINE_EVERY_SECONDS, TerminalBar, clock
from mamba3_jepa.training.schedule import Position, Schedule

logger = logging.getLogger(__name__)


class ProgressReport(TerminalBar):
    """Counts samples and waiting time, and shows them. Silent on all but the main process."""

    def __init__(self, schedule: Schedule, position: Position, is_main: bool) -> None:
        super().__init__("epoch {task.fields[epoch]}", is_main)
        self._schedule = schedule
        self._start_step = position.step
        self._started = self._last_line = self._window_start = time.monotonic()
        self._samples = 0
        self._waited = 0.0
        self._rates = {"train/samples_per_second": 0.0, "train/data_wait": 0.0}
        if self._bar is not None:
            self._task = self._bar.add_task(
                "train",
                total=schedule.total_steps,
                completed=position.step,
                epoch=position.epoch + 1,
                status="",
            )

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - started

    def rates(self) -> dict[str, float]:
        """Samples per second and the share of time spent waiting for data, since the last call."""
        now = time.monotonic()
        elapsed = max(now - self._window_start, 1e-9)
        self._rates = {
            "train/samples_per_second": self._samples / elapsed,
            "train/data_wait": self._waited / elapsed,
        }
        self._window_start, self._samples, self._waited = now, 0, 0.0
        return self._rates

    def advance(self, position: Position, metrics: dict[str, float], samples: int) -> None:
        """Show that one more step is done."""
        self._samples += samples
        if not self._is_main:
            return
        now = time.monotonic()
        rate = (position.step - self._start_step) / max(now - self._started, 1e-9)
        status = f"loss {metrics['train/loss']:.3f}  {rate:.1f} steps/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=position.step, epoch=position.epoch + 1, status=status)
        elif now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            total = self._schedule.total_steps
            eta = (total - position.step) / max(rate, 1e-9)
            logger.info(
                "step %d/%d  epoch %d  %s  ETA %s",
                position.step,
                total,
                position.epoch + 1,
                status,
                clock(eta),
            )
