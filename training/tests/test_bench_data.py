"""The data benchmark: it counts what it says it counts, and its settings need no torch."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from mamba3_jepa.bench.data import DataBenchmarkSettings, run_data_benchmark
from mamba3_jepa.data.batch import Batch
from mamba3_jepa.errors import UserError

SETTINGS = DataBenchmarkSettings(
    preset="tiny", batch_size=4, workers=(0,), jpeg_size=48, n_images=9, seconds=0.05, steps=3
)


def test_waiting_is_told_from_working() -> None:
    seen: list[int] = []

    def step(batch: Batch) -> None:
        seen.append(len(batch))
        time.sleep(0.05)

    report = run_data_benchmark(SETTINGS, step)
    assert seen == [4] * 2 * (1 + 3)
    assert [(r.source, r.workers) for r in report.rates] == [("JPEG 48 px", 0), ("synthetic scenes", 0)]
    for wait in report.waits:
        assert 0.05 <= wait.step_seconds * (1 - wait.wait_fraction) < 0.5, "working, not waiting"
        assert wait.samples_per_second == pytest.approx(4 / wait.step_seconds)
    assert all(rate.samples_per_second > 4 for rate in report.rates)
    assert len(report.lines()) == 6


def test_with_the_real_training_step() -> None:
    report = run_data_benchmark(SETTINGS)
    assert all(0 < wait.wait_fraction < 1 for wait in report.waits)


def test_impossible_settings() -> None:
    for changes, message in (
        ({"batch_size": 0}, "`batch_size` 0: must be at least 1"),
        ({"workers": ()}, "`workers`: give at least one number"),
        ({"workers": (-1,)}, "`workers` -1: must be at least 0 and at most 1024"),
        ({"steps": -1}, "`steps` -1: must be at least 0"),
        ({"seconds": 0.0}, "`seconds` 0.0: must be finite and greater than 0"),
        ({"n_images": 3, "batch_size": 4}, "`n_images` 3 is less than one batch of 4"),
    ):
        with pytest.raises(UserError, match=message):
            run_data_benchmark(DataBenchmarkSettings(**changes))  # type: ignore[arg-type]


def test_the_settings_need_no_torch() -> None:
    code = "import sys, mamba3_jepa.bench.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
