"""Which signals ask a run to stop, and which do not reach it."""

from __future__ import annotations

import os
import signal

import pytest

from mamba3_jepa.stop_signals import STOP_SIGNALS
from mamba3_jepa.training.interrupt import StopSignal


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_noted_and_its_handler_put_back(number: signal.Signals) -> None:
    outside = signal.signal(number, signal.SIG_DFL)  # under nohup one of them is ignored
    try:
        before = [signal.getsignal(each) for each in STOP_SIGNALS]
        with StopSignal() as stop:
            assert stop.received is None
            os.kill(os.getpid(), number)
            assert stop.received == number
        assert [signal.getsignal(each) for each in STOP_SIGNALS] == before
    finally:
        signal.signal(number, outside)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs POSIX signals")
def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")
def test_what_schedulers_send_before_a_time_limit_is_among_them() -> None:
    assert {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM} <= set(STOP_SIGNALS)
