"""The signals that ask a command to stop, in one place: what holds them back or acts on them takes them from here."""

from __future__ import annotations

import signal

# SIGUSR1 and SIGUSR2 are what SLURM (`--signal=USR1@120`), submitit, LSF and Grid Engine send before a time limit;
# SIGHUP comes when a terminal is closed. Windows has only the first two.
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
STOP_SIGNALS: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


def is_ignored(number: signal.Signals) -> bool:
    """Whether who started this process wants it to live on after a closed terminal, as nohup does."""
    return number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN
