"""A process that is gone ends the run on the others: soon, and with a sentence."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from mamba3_jepa.training.interrupt import PeerLostError

BEAT, SILENCE = 0.25, 4.0  # seconds, for a test


class Case(NamedTuple):
    """What becomes of one of two ranks."""

    happening: str
    rank: int


CASES = [Case(what, rank) for what in ("killed", "silent") for rank in (0, 1)]
PEACEFUL = [Case("farewell", 1), Case("suspended", 0)]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[int, str]]:
    """Of each case, all at once, the other rank's status and what it said. torch is loaded once for all of them."""
    folder = tmp_path_factory.mktemp("said")
    with subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as play:
        try:
            statuses = json.loads(play.communicate(timeout=120)[0])
        finally:
            os.killpg(play.pid, signal.SIGKILL)  # whoever still waits
    texts = [" ".join((folder / _name(case, 1 - case.rank)).read_text().split()) for case in CASES + PEACEFUL]
    return dict(zip(CASES + PEACEFUL, zip(statuses, texts, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_process_that_is_gone_ends_the_other_with_a_sentence(said: dict[Case, tuple[int, str]], case: Case) -> None:
    """A killed process's connections break. Those of a stopped one are silent, as those of a host without power."""
    status, sentence = said[case]
    assert status == PeerLostError.exit_code, sentence
    assert sentence.endswith("the same command with `resume` continues from the last save in runs/1")
    assert sentence.count("lost ") == 1
    assert "Traceback" not in sentence
    whom = {
        Case("killed", 0): "lost another process of this run (",
        Case("killed", 1): "lost another process of this run (",
        Case("silent", 0): "lost 127.0.0.1, the host of rank 0, which does not answer",
        Case("silent", 1): f"lost rank 1 on {socket.gethostname()}, which has given no sign of life for 4 s",
    }
    assert whom[case] in sentence


@pytest.mark.parametrize("case", PEACEFUL)
def test_who_is_done_early_or_suspended_is_not_missed(said: dict[Case, tuple[int, str]], case: Case) -> None:
    """Rank 0 works on after rank 1 said farewell; or a scheduler suspends the job and takes it up again."""
    assert said[case] == (0, "")


def _name(case: Case, rank: int) -> str:
    return f"{case.happening}{case.rank}.{rank}"


def _play(folder: Path) -> None:
    """Both ranks of each case in processes of their own, forked when torch is loaded; writes statuses as JSON."""
    import torch
    import torch.distributed as dist

    from mamba3_jepa.training import peers

    peers.BEAT, peers.SILENCE = BEAT, SILENCE

    @peers.in_company
    def run(settings: SimpleNamespace, case: Case, rank: int) -> None:
        dist.init_process_group("gloo")
        peers.watch_peers(settings.output_dir)
        dist.all_reduce(torch.ones(1))
        (folder / f"{_name(case, rank)}.ready").touch()
        if case in PEACEFUL:
            for _ in range(1 if case == Case("farewell", rank) else 20):
                time.sleep(SILENCE / 10)
            return
        if case.rank == rank:
            time.sleep(3 * BEAT)  # it has given signs
            os.kill(os.getpid(), signal.SIGKILL if case.happening == "killed" else signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))

    def rank_of(case: Case, rank: int, port: int) -> Callable[[], int]:
        def work() -> int:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                run(SimpleNamespace(output_dir=Path("runs/1")), case, rank)
            except PeerLostError as error:
                sys.stdout.write(str(error))
                sys.stdout.flush()
                return error.exit_code
            return 0

        return work

    ranks = {}
    for case in CASES + PEACEFUL:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks[case] = [_forked(rank_of(case, rank, port), folder / _name(case, rank)) for rank in (0, 1)]
    suspended = PEACEFUL[1]
    while not all((folder / f"{_name(suspended, rank)}.ready").exists() for rank in (0, 1)):
        time.sleep(BEAT)
    for number, pause in ((signal.SIGSTOP, 1.5 * SILENCE), (signal.SIGCONT, 0.0)):
        for pid in ranks[suspended]:
            os.kill(pid, number)
        time.sleep(pause)
    statuses = []
    for case, pids in ranks.items():
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pids[1 - case.rank], 0)[1]))
        os.kill(pids[case.rank], signal.SIGKILL)
    sys.stdout.write(json.dumps(statuses))


def _forked(work: Callable[[], int], output: Path) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            status = work()
        finally:
            os._exit(status)
    return pid


if __name__ == "__main__":
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command sets it
    _play(Path(sys.argv[1]))
