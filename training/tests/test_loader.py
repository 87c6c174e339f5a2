"""Batches: order, division over ranks, resumption, workers, and samples that cannot be read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mamba3_jepa.config import ModelConfig, preset
from mamba3_jepa.data.batch import Batch
from mamba3_jepa.data.files import ManifestSource
from mamba3_jepa.data.loader import BatchLoader, BatchPlan, build_loader
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.stop_signals import STOP_SIGNALS

CONFIG = preset("tiny")


def _loader(source: SceneSource, tokenizer: TextTokenizer, batch_size: int = 4, **changes: object) -> BatchLoader:
    options: dict = {"shuffle": True, "seed": 3, "drop_last": False} | changes
    config: ModelConfig = options.pop("config", CONFIG)
    indices = options.pop("indices", np.arange(len(source)))
    return build_loader(source, indices, tokenizer, config, batch_size, **options)


def _assert_equal(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_an_epoch_visits_every_sample_once(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    loader = _loader(scenes, tokenizer, 4)
    batches = list(loader)
    assert len(loader) == len(batches) == 10
    assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(39))
    assert [len(b) for b in batches] == [4] * 9 + [3]
    assert [len(b) for b in _loader(scenes, tokenizer, 4, drop_last=True)] == [4] * 9


def test_order_depends_on_seed_and_epoch_only(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    def order(**changes: object) -> list[int]:
        torch.manual_seed(int(time.time()))
        return [i for b in _loader(scenes, tokenizer, 5, **changes) for i in b.index.tolist()]

    first = order(seed=1, epoch=0)
    assert order(seed=1, epoch=0) == first
    assert order(seed=2, epoch=0) != first
    assert order(seed=1, epoch=1) != first
    assert order(shuffle=False) == list(range(39))


def test_the_global_random_state_is_not_touched(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    loader = _loader(scenes, tokenizer)
    before = torch.get_rng_state()
    next(iter(loader))
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_together_see_the_global_batch(
    scenes: SceneSource, tokenizer: TextTokenizer, world_size: int, drop_last: bool
) -> None:
    whole = list(_loader(scenes, tokenizer, 6, drop_last=drop_last))
    ranks = [
        list(_loader(scenes, tokenizer, 6 // world_size, rank=r, world_size=world_size, drop_last=drop_last))
        for r in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for k, batch in enumerate(whole):
        assert torch.cat([batches[k].index for batches in ranks]).tolist() == batch.index.tolist()


def test_a_remainder_smaller_than_the_ranks_leaves_an_empty_batch(
    scenes: SceneSource, tokenizer: TextTokenizer
) -> None:
    options = {"indices": range(5), "world_size": 2, "shuffle": False}
    last = [list(_loader(scenes, tokenizer, 2, rank=r, **options))[-1] for r in (0, 1)]
    assert [len(b) for b in last] == [1, 0]
    assert last[1].pixels.shape == (0, 3, 32, 32)
    assert last[1].query_ids.shape == (0, 0)


@pytest.mark.parametrize("skip", [0, 1, 7, 10])
def test_skipping_batches_continues_exactly_and_decodes_nothing(
    scenes: SceneSource, tokenizer: TextTokenizer, skip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(_loader(scenes, tokenizer, epoch=4))
    asked: list[int] = []
    real = SceneSource.sample
    monkeypatch.setattr(SceneSource, "sample", lambda self, i: asked.append(i) or real(self, i))
    loader = _loader(scenes, tokenizer, epoch=4, skip_batches=skip)
    rest = list(loader)
    assert len(loader) == len(rest) == 10 - skip
    for a, b in zip(whole[skip:], rest, strict=True):
        _assert_equal(a, b)
    assert len(asked) == sum(len(b) for b in rest)


@pytest.mark.parametrize("skip", [0, 4])
def test_batches_of_a_contrast_come_twice(skip: int) -> None:
    def plan(twice: int = 0) -> BatchPlan:
        return BatchPlan(np.arange(40), 2, True, 7, rank=1, world_size=2, drop_last=True, twice=twice)

    once, twice = plan(), plan(4)
    twice.set_epoch(0, skip)
    batches = list(once)
    expected = [*batches[:4] * 2, *batches[4:8] * 2, *batches[8:] * 2]
    assert list(twice) == expected[2 * skip :]
    assert len(twice) == len(once) - skip == 10 - skip


def test_workers_do_not_change_the_content(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    expected = list(_loader(scenes, tokenizer, epoch=1))
    loader = _loader(scenes, tokenizer, epoch=1, workers=2)
    try:
        for a, b in zip(expected, loader, strict=True):
            _assert_equal(a, b)
        loader.set_epoch(2, skip_batches=3)
        for a, b in zip(_loader(scenes, tokenizer, epoch=2, skip_batches=3), loader, strict=True):
            _assert_equal(a, b)
        half = iter(loader)  # left half-way, as a run that stops by --max-steps does
        next(half)
        for a, b in zip(_loader(scenes, tokenizer, epoch=2, skip_batches=3), loader, strict=True):
            _assert_equal(a, b)
    finally:
        loader.close()


def test_batch_larger_than_the_data(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match=r"`batch_size`.*40.*39.*at most 39"):
        _loader(scenes, tokenizer, 40, drop_last=True)
    with pytest.raises(UserError, match=r"20 on each of 2 processes.*at most 19"):
        _loader(scenes, tokenizer, 20, drop_last=True, world_size=2)
    assert len(_loader(scenes, tokenizer, 40)) == 1
    with pytest.raises(UserError, match="no samples"):
        _loader(scenes, tokenizer, 4, indices=[])


@pytest.fixture
def damaged(tmp_path: Path) -> ManifestSource:
    """Ten records, numbers 0 and 1 without image, 4 to 7 with a damaged one."""
    lines = []
    for i in range(10):
        if i < 2:
            lines.append(f'{{"image": null, "query": "q{i}", "answer": "a{i}"}}')
            continue
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (40, 30), (i, 0, 0)).save(path)
        if 4 <= i <= 7:
            path.write_bytes(path.read_bytes()[:50])
        lines.append(f'{{"image": "{i}.png", "question": "q{i}", "answer": "a{i}"}}')
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    return ManifestSource(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_stops_the_run(damaged: ManifestSource, tokenizer: TextTokenizer, workers: int) -> None:
    loader = _loader(damaged, tokenizer, 2, shuffle=False, workers=workers)
    with pytest.raises(UserError, match=r"manifest\.jsonl line 5: .*4\.png: not a readable image") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_can_be_skipped(damaged: ManifestSource, tokenizer: TextTokenizer, workers: int) -> None:
    options = {"shuffle": False, "on_bad_sample": "skip", "workers": workers}
    loader = _loader(damaged, tokenizer, 4, **options)
    batches = list(loader)
    assert [b.index.tolist() for b in batches] == [[0, 1, 2, 3], [], [8, 9]]
    assert [len(b.bad) for b in batches] == [0, 4, 0]
    assert "4.png" in batches[1].bad[0]
    assert batches[0].has_image.tolist() == [False, False, True, True]
    assert batches[0].pixels.shape == (2, 3, 32, 32)
    assert batches[0].pixels[:, 0].float().mean(dim=(1, 2)).tolist() == [2, 3]
    loader.close()


_SCRIPT = """
import os, sys, time
import numpy as np
from mamba3_jepa.config import preset
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.tokenizer import TextTokenizer

def main():
    source = SceneSource(n_scenes=2000, image_size=32)
    loader = build_loader(source, np.arange(6000), TextTokenizer.train(["a b"], 300), preset("tiny"), 4,
                          shuffle=True, seed=0, drop_last=True, workers=2)
    batches = iter(loader)
    next(batches)
    import signal
    from mamba3_jepa.stop_signals import STOP_SIGNALS
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    iterator = loader._loader._iterator
    print(*[w.pid for w in iterator._workers], flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.02)
    for _ in range(20):
        next(batches)
    print("done", flush=True)

if __name__ == "__main__":
    main()
"""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _wait_until_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(_alive, pids)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def _start(command: list[str]) -> tuple[subprocess.Popen, list[int]]:
    """The script in a process group of its own, once its workers run, and their process numbers."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="needs POSIX signals")
def test_workers_and_signals(tmp_path: Path) -> None:
    """Signals to the whole group leave the workers at work; none outlives its parent, even one killed."""
    (tmp_path / "script.py").write_text(_SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "go")]
    process, pids = _start(command)
    assert process.stdout is not None
    assert len(pids) == 2
    for number in STOP_SIGNALS:
        os.killpg(process.pid, number)
    time.sleep(0.3)
    (tmp_path / "go").touch()
    assert process.stdout.readline() == "done\n", "the workers went on after the signals"
    assert process.wait(timeout=120) == 0
    _wait_until_gone(pids, 60)

    (tmp_path / "go").unlink()
    process, pids = _start(command)
    assert process.stdout is not None
    process.kill()
    process.wait()
    _wait_until_gone(pids, 60)
