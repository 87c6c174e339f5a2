"""Folders that one command at a time writes into."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main
from mamba3_jepa.files import folder_lock
from mamba3_jepa.files.folder_lock import LOCK_NAME, FolderInUseError, FolderLock, alone_in
from mamba3_jepa.training import frozen
from mamba3_jepa.training.loop import _State

SHORT = ["--tiny", "--cpu", "--synthetic-scenes", "8", "--val-samples", "12", "--batch-size", "8", "--epochs", "1"]
COMMANDS = {1: "train-jepa", 2: "train-decoder", 3: "train-agent"}

pytestmark = pytest.mark.skipif(folder_lock.fcntl is None, reason="no locks on this system")


@dataclass
class Settings:
    output_dir: Path


def hold(folder: Path) -> subprocess.Popen:
    """A process of its own that holds `folder`, until it is told to go on."""
    script = (
        "import sys; from pathlib import Path\n"
        "from mamba3_jepa.files.folder_lock import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_held_folder_is_refused_and_its_holder_named(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    holder = hold(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    for path in (folder, Path(os.path.relpath(folder)), link):
        with pytest.raises(FolderInUseError, match=rf"in use by process {holder.pid} on {socket.gethostname()}, since"):
            FolderLock(path).take()
    with FolderLock(tmp_path / "runs" / "b"):
        pass
    assert holder.communicate("\n")[0] == ""
    with FolderLock(folder):  # and now it is free
        pass
    assert list(tmp_path.iterdir()) == [link], "a folder that stayed empty is gone, and those made for it"


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    with FolderLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_NAME).read_text()
    assert not any(tmp_path.iterdir())


def test_what_is_in_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("kept")
    with FolderLock(tmp_path), pytest.raises(FolderInUseError):
        FolderLock(tmp_path).take()
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_readers_share_a_folder_and_keep_others_out(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path, shared=True), FolderLock(tmp_path, shared=True)
    first.take()
    second.take()
    for _ in range(2):
        with pytest.raises(FolderInUseError):
            FolderLock(tmp_path).take()
        first.release()
    second.release()
    with FolderLock(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


def test_readers_are_not_taken_for_a_killed_writer(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("process 1 on elsewhere, since long ago\n")
    with FolderLock(tmp_path, shared=True), pytest.raises(FolderInUseError, match="in use by another process"):
        FolderLock(tmp_path).take()


def test_a_folder_that_nothing_can_be_made_in(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/self"), Path("/proc/nowhere/run")):
        with FolderLock(folder) as lock:
            assert not lock.is_certain
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_many_at_once_never_hold_it_together(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def enter_often() -> None:
        entered = 0
        while entered < 50:
            try:
                with FolderLock(tmp_path / "folder"):
                    inside[0] += 1
                    most[0], entered = max(most[0], inside[0]), entered + 1
                    inside[0] -= 1
            except FolderInUseError:
                pass

    threads = [threading.Thread(target=enter_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert not list(tmp_path.rglob(LOCK_NAME))


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder_lock.fcntl, "flock", fails)
    with FolderLock(tmp_path), FolderLock(tmp_path):
        pass
    assert "this file system has no locks (No locks available)" in caplog.text


def test_a_system_without_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "fcntl", None)
    with FolderLock(tmp_path / "folder"), FolderLock(tmp_path / "folder"):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"])
def test_the_processes_of_one_run_do_not_refuse_each_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @alone_in("output_dir")
    def command(settings: Settings, then: Callable[[], object] = bool) -> object:
        return then()

    settings = Settings(tmp_path)

    def other_rank() -> object:
        monkeypatch.setenv(name, "1")
        return command(settings)

    for each in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(each, raising=False)
    assert command(settings, other_rank) is False
    monkeypatch.setenv(name, "0")
    with pytest.raises(FolderInUseError, match=r"`output_dir` .* is in use by process"):
        command(settings, lambda: command(settings))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {phase: write_checkpoint(folder / f"{phase}.pt", tiny_model(phase), phase) for phase in (1, 2)}


def train(phase: int, checkpoints: dict[int, Path], folder: Path, *arguments: str) -> int:
    start = [] if phase == 1 else [f"--phase{phase - 1}-checkpoint", str(checkpoints[phase - 1])]
    return main([COMMANDS[phase], *SHORT, *start, "--output-dir", str(folder), *arguments])


@pytest.mark.parametrize("phase", COMMANDS)
def test_a_second_run_is_refused_from_the_first_moment_on(
    phase: int,
    checkpoints: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    folder, refused = tmp_path / "run", []
    assert train(phase, checkpoints, folder) == 0
    expected = (folder / f"phase{phase}_best.pt").stat().st_size

    def refusing(real):  # type: ignore[no-untyped-def]
        def also_tries(*arguments, **options):  # type: ignore[no-untyped-def]
            for resume in ([], ["--resume"]):
                capfd.readouterr()
                refused.append((train(phase, checkpoints, folder, *resume), capfd.readouterr().err))
            return real(*arguments, **options)

        return also_tries

    monkeypatch.setattr(_State, "evaluate", refusing(_State.evaluate))  # after the earlier run was moved aside
    monkeypatch.setattr(frozen._Pass, "_compute", refusing(frozen._Pass._compute))  # and before
    assert train(phase, checkpoints, folder, "--seed", "1") == 0
    assert len(refused) >= (2 if phase == 1 else 4)
    for status, message in refused:
        assert status == 2
        assert message.startswith(f"error: --output-dir {folder} is in use by process {os.getpid()}")
        assert message.count("\n") == 1
    monkeypatch.undo()
    assert train(phase, checkpoints, folder, "--resume", "--seed", "1") == 0
    kept = [path for path in tmp_path.iterdir() if path.name.startswith("run.")]
    assert len(kept) == 1
    assert (kept[0] / f"phase{phase}_best.pt").stat().st_size == pytest.approx(expected, rel=0.1)
    assert not list(tmp_path.rglob(LOCK_NAME))


def test_two_exports_into_one_folder(
    checkpoints: dict[int, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    arguments = ["export", "--checkpoint", str(checkpoints[1]), "--output", str(tmp_path / "weights")]
    holder = hold(tmp_path / "weights")
    assert main(arguments) == 2
    assert f"--output {tmp_path / 'weights'} is in use by process {holder.pid}" in capfd.readouterr().err
    holder.communicate("\n")
    assert main(arguments) == 0
    assert not (tmp_path / "weights" / LOCK_NAME).exists()
