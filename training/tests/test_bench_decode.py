"""The decoding benchmark: it measures where it says, and sees a decoder whose time or memory grows."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from mamba3_jepa.bench.decode import report_rows, run_decode_benchmark
from mamba3_jepa.cli.main import main
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.y_decoder import YDecoder
from mamba3_jepa.settings.bench import DecodeBenchmarkSettings

SETTINGS = DecodeBenchmarkSettings(preset="tiny", early=4, late=40, window=4, rounds=3, threads=1)


def test_the_state_is_as_large_late_as_early() -> None:
    result = run_decode_benchmark(SETTINGS)
    assert result.early.state_bytes == result.late.state_bytes > 0
    assert result.ratio > 0  # how close to 1 is for a quiet machine and more rounds to say
    assert (result.early.position, result.late.position) == (4, 40)
    assert result.late.full_forward_seconds is not None
    assert len(report_rows(result)) == 2


def test_it_sees_time_and_memory_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    step = YDecoder.step

    def slow_step(self: YDecoder, ids: torch.Tensor, state: list) -> tuple[torch.Tensor, list]:
        """Keeps what it had before every token, and waits as many milliseconds."""
        layers, history = state[:2], state[2:]
        time.sleep(1e-3 * len(history))
        logits, after = step(self, ids, layers)
        return logits, [*after, *history, layers[0]]

    monkeypatch.setattr(YDecoder, "step", slow_step)
    result = run_decode_benchmark(dataclasses.replace(SETTINGS, full_forward=False))
    # Windows of 4 around 4 and 40: mean positions 3.5 and 39.5, a millisecond each, and the decoder's own time.
    assert result.early.seconds > 3.5e-3
    assert result.late.seconds > 39.5e-3
    assert result.ratio > 2
    assert result.late.state_bytes > 3 * result.early.state_bytes
    assert result.late.full_forward_seconds is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early": 1}, "starts before the text"),
        ({"late": 4}, "`late` 4 must come after `early` 4"),
        ({"rounds": 0}, "`rounds` 0: must be at least 1"),
        ({"device": "cuda:7"}, "`device` cuda:7: not available here"),
    ],
)
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_decode_benchmark(dataclasses.replace(SETTINGS, **changes))


def test_the_command_prints_the_ratio(capsys: pytest.CaptureFixture) -> None:
    arguments = ["--preset", "tiny", "--early", "4", "--late", "12", "--window", "4", "--rounds", "1", "--threads", "1"]
    assert main(["bench", "decode", *arguments, "--no-full-forward"]) == 0
    out = capsys.readouterr().out
    assert "token 12 takes" in out
    assert "not measured" in out
