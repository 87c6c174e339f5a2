"""Data workers on machines with little shared memory or few file descriptors, and workers that die or hang."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from mamba3_jepa.config import preset
from mamba3_jepa.data import spawned, transfer, workers
from mamba3_jepa.data.batch import Batch, Failure
from mamba3_jepa.data.files import FolderSource, ManifestSource
from mamba3_jepa.data.loader import BatchLoader, build_loader
from mamba3_jepa.data.sample import Source
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.strings import Strings
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError


def _loader(source: Source, tokenizer: TextTokenizer, n_workers: int) -> BatchLoader:
    order = {"shuffle": True, "seed": 3, "drop_last": False}
    return build_loader(source, np.arange(39), tokenizer, preset("tiny"), 25, workers=n_workers, **order)


def _arrived(batch: Batch) -> Batch:
    """Through a queue of torch's and out at its other end."""
    return pickle.loads(ForkingPickler.dumps(transfer.packed(batch)))


def _assert_equal(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


@pytest.fixture
def batch(scenes: SceneSource, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> Batch:
    found = next(iter(_loader(scenes, tokenizer, 0)))
    monkeypatch.setattr(transfer, "_LARGE", found.pixels.nbytes)
    return found


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(transfer, "_said", [])
    return caplog


def test_pixels_are_shared_and_the_rest_is_not(batch: Batch, said: pytest.LogCaptureFixture) -> None:
    sent = transfer.packed(batch)
    assert isinstance(sent, transfer.Parcel)
    assert len(sent._content) < batch.pixels.nbytes
    arrived = pickle.loads(ForkingPickler.dumps(sent))
    _assert_equal(arrived, batch)
    shared = {name for name, value in vars(arrived).items() if isinstance(value, torch.Tensor) and value.is_shared()}
    assert shared == {"pixels"}
    assert not said.text


def test_without_room_a_batch_goes_through_the_pipe(
    batch: Batch, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = os.statvfs_result((4096, 4096, 60, 8, 8, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: little)
    for _ in range(2):
        arrived = _arrived(batch)
        _assert_equal(arrived, batch)
        arrived.pixels += 1  # it is the receiver's own
    assert said.text.count("go through pipes") == 1
    assert "/dev/shm has 32,768 bytes free" in said.text
    assert "--shm-size" in said.text


def test_where_sharing_fails_a_batch_goes_through_the_pipe(
    batch: Batch, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to open shared memory object: Too many open files (24)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fails)
    _assert_equal(_arrived(batch), batch)
    assert "Too many open files" in said.text


def test_a_failure_arrives_as_it_is() -> None:
    assert transfer.packed(Failure("no such file")) == Failure("no such file")


_SCRIPT = """
import logging, resource, sys, zlib
import numpy as np
from mamba3_jepa.config import preset
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.sample import Source
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.strings import Strings
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError

def main(workers, files):
    logging.basicConfig(level="WARNING", stream=sys.stdout)
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    loader = build_loader(SceneSource(n_scenes=200, image_size=64), np.arange(600), TextTokenizer.train(["a b"], 300),
                          preset("mini"), 60, shuffle=True, seed=0, drop_last=True, workers=workers)
    try:
        print("sum", sum(zlib.crc32(batch.pixels.numpy().tobytes()) for batch in loader))
    except UserError as error:
        print("UserError", error)
    loader.close()

if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
"""


def _run(folder: Path, *arguments: int, before: str = "") -> str:
    """What the script prints; `before`: shell commands in a mount namespace of its own."""
    (folder / "script.py").write_text(_SCRIPT)
    command = [sys.executable, str(folder / "script.py"), *map(str, arguments)]
    if before:
        command = ["unshare", "--mount", "--map-root-user", "sh", "-c", f'{before} && exec "$@"', "sh", *command]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    trial = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs a mount namespace")
def test_a_container_with_little_shared_memory(tmp_path: Path) -> None:
    expected = _run(tmp_path, 0, 0)
    with_240_kb = _run(tmp_path, 2, 0, before="mount -t tmpfs -o size=240k tmpfs /dev/shm")
    assert with_240_kb.endswith(expected)
    assert "batches of the data workers go through pipes" in with_240_kb
    with_next_to_none = _run(tmp_path, 2, 0, before="mount -t tmpfs -o size=4k tmpfs /dev/shm")
    assert with_next_to_none.startswith("UserError cannot start 2 data workers: No space left on device")
    assert "`workers` 0" in with_next_to_none
    assert "--shm-size" in with_next_to_none


@pytest.mark.skipif(sys.platform != "linux", reason="numbers of descriptors differ")
def test_few_file_descriptors(tmp_path: Path) -> None:
    expected = _run(tmp_path, 0, 0)
    assert _run(tmp_path, 2, 64) == expected
    lost = _run(tmp_path, 2, 14)
    assert lost.startswith("UserError cannot start 2 data workers: Too many open files")
    assert "ulimit" in lost


@pytest.mark.parametrize(
    "error",
    [
        BlockingIOError(11, "Resource temporarily unavailable"),
        RuntimeError("can't start new thread"),
        ImportError("This platform lacks a functioning sem_open implementation"),
    ],
)
def test_workers_that_cannot_be_started(error: Exception, scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    loader = _loader(scenes, tokenizer, 3)

    def fails() -> None:
        raise error

    loader._loader._get_iterator = fails
    why = str(error).partition("] ")[2] or str(error)
    with pytest.raises(UserError, match=f"cannot start 3 data workers: {why}; .*`workers` 0"):
        next(iter(loader))
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        next(iter(loader))


def test_a_killed_worker_is_said(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    loader = _loader(scenes, tokenizer, 1)
    batches = iter(loader)
    next(batches)
    for worker in loader._loader._iterator._workers:
        os.kill(worker.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"a data worker process is lost .*`workers` 0"):
        list(loader)
    assert time.monotonic() - started < 60
    loader.close()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")
def test_a_worker_that_hangs_is_said_and_ended(
    scenes: SceneSource, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_LOOK_SECONDS", 0.1)
    loader = _loader(scenes, tokenizer, 1)
    list(loader)
    assert loader._workers is not None
    assert loader._workers._pulse.total() == 39
    processes = loader._loader._iterator._workers
    monkeypatch.setattr(workers, "STALLED_SECONDS", 1.0)
    for worker in processes:
        os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="no data worker has begun a sample"):
        list(loader)
    loader.close()
    for worker in processes:
        worker.join(10)
        assert worker.exitcode == -signal.SIGKILL


def test_a_slow_worker_is_waited_for(
    scenes: SceneSource, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch may take as long as it likes, as long as its samples follow each other."""
    monkeypatch.setattr(workers, "STALLED_SECONDS", 10.0)
    watched = workers.Workers(1)
    moments = iter(range(0, 100, 9))
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    watched._wait_anew()
    for _ in range(5):  # nothing arrives for 45 seconds
        watched._pulse._counts[0] += 1
        assert watched._look(lambda timeout: (False, None)) == (False, None)
    assert watched._look(lambda timeout: (False, None)) == (False, None)
    with pytest.raises(UserError, match="no data worker has begun a sample"):
        watched._look(lambda timeout: (False, None))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="looks into /proc")
def test_workers_share_one_copy_of_the_index(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f'{{"image": null, "query": "{i}", "answer": "{-i}"}}\n' for i in range(39)]
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    source = ManifestSource(tmp_path)
    expected = list(_loader(source, tokenizer, 0))
    monkeypatch.setattr(spawned, "_WORTH_IT", 0)
    loader = _loader(source, tokenizer, 2)
    for _ in range(2):
        for mine, batch in zip(expected, loader, strict=True):
            _assert_equal(mine, batch)
    mapped = set()
    for worker in loader._loader._iterator._workers:
        maps = Path(f"/proc/{worker.pid}/maps").read_text().splitlines()
        mapped |= {line.split()[4] for line in maps if "/memfd:mamba3-jepa index" in line}  # by inode
    assert len(mapped) == 1
    open_files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [name for name in open_files if "memfd:mamba3-jepa" in name]
    loader.close()


def test_without_shared_memory_each_worker_has_a_copy(
    scenes: SceneSource, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> int:
        raise OSError("no descriptor left")

    monkeypatch.setattr(spawned, "_WORTH_IT", 0)
    monkeypatch.setattr(spawned, "_anonymous_file", fails)
    loader = _loader(scenes, tokenizer, 1)
    for mine, batch in zip(_loader(scenes, tokenizer, 0), loader, strict=True):
        _assert_equal(mine, batch)
    loader.close()


def test_file_names_are_kept_in_little_memory(tmp_path: Path) -> None:
    names = ["", "a.png", "bl\u00e5/\u732b.jpg", "not utf-8 \udcff.png", "a.png"]
    kept = Strings(names)
    assert list(kept) == names
    assert (len(kept), kept[3]) == (5, names[3])
    with pytest.raises(IndexError):
        kept[5]
    assert list(Strings([])) == []
    (tmp_path / "x.png").touch()
    (tmp_path / "x.txt").touch()
    assert len(pickle.dumps(FolderSource(tmp_path), protocol=5, buffer_callback=[].append)) < 1000
