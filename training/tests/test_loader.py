"""Batches: content, order, division over ranks, resumption, workers, and samples that cannot be read."""

from __future__ import annotations

import json
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
from tiny import tiny_model

from mamba3_jepa.config import ModelConfig, preset
from mamba3_jepa.data import batch as data_batch
from mamba3_jepa.data.batch import Batch, target_hash
from mamba3_jepa.data.files import ManifestSource
from mamba3_jepa.data.loader import BatchLoader, build_loader
from mamba3_jepa.data.sample import source_texts
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.validate import collect, evaluate

CONFIG = preset("tiny")


@pytest.fixture(scope="module")
def scenes() -> SceneSource:
    return SceneSource("train", n_scenes=13, image_size=CONFIG.vision.image_size)


@pytest.fixture(scope="module")
def tokenizer(scenes: SceneSource) -> TextTokenizer:
    return TextTokenizer.train(source_texts(scenes, range(len(scenes))), 300)


def _loader(source: SceneSource, tokenizer: TextTokenizer, batch_size: int = 4, **changes: object) -> BatchLoader:
    options: dict = {"shuffle": True, "seed": 3, "drop_last": False} | changes
    config: ModelConfig = options.pop("config", CONFIG)
    indices = options.pop("indices", np.arange(len(source)))
    return build_loader(source, indices, tokenizer, config, batch_size, **options)


def asked(batch: Batch) -> list[str]:
    """What is encoded: the query prompt where a sample has no question."""
    return [CONFIG.query_prompt if question is None else question for question in batch.questions]


def _assert_equal(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_a_batch_holds_its_samples(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    (batch,) = _loader(scenes, tokenizer, shuffle=False, indices=[0, 1, 8])
    assert len(batch) == 3
    assert batch.index.tolist() == [0, 1, 8]
    samples = [scenes.sample(i) for i in (0, 1, 8)]
    assert batch.questions == [None, samples[1].question, samples[2].question]
    assert batch.targets == [s.target for s in samples]
    assert batch.pixels.dtype == torch.uint8
    assert batch.picture.tolist() == [0, 0, 1], "samples 0 and 1 ask of one scene"
    for pixels, sample in zip(batch.pixels[batch.picture], samples, strict=True):
        assert sample.image is not None
        assert np.array_equal(pixels.numpy(), np.asarray(sample.image()).transpose(2, 0, 1))
    assert batch.has_image.tolist() == [True] * 3
    queries = tokenizer.encode(asked(batch), CONFIG.max_query_tokens)
    targets = tokenizer.encode(batch.targets, CONFIG.max_answer_tokens)
    assert torch.equal(batch.query_ids, queries.ids)
    assert torch.equal(batch.query_mask, queries.mask)
    assert torch.equal(batch.target_ids, targets.ids)
    assert torch.equal(batch.target_mask, targets.mask)
    assert batch.target_hash.tolist() == [target_hash(s.target or "") for s in samples]
    assert batch.bad == []
    moved = batch.to("cpu")
    _assert_equal(moved, batch)


def manifest(folder: Path, *lines: dict[str, object]) -> ManifestSource:
    """A data directory with the two pictures a.png and b.png."""
    noise = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ManifestSource(folder)


@pytest.fixture
def asked_often(tmp_path: Path) -> ManifestSource:
    """Two pictures, asked three times and once, and a question of none in between."""
    return manifest(
        tmp_path,
        {"image": "a.png", "question": "What is it?", "answer": "red"},
        {"image": None, "query": "Is it?", "answer": "yes"},
        {"image": "b.png", "text": "a picture"},
        {"image": "a.png", "text": "another picture"},
        {"image": "a.png", "question": "Is it red?", "answer": "no"},
    )


def test_a_picture_asked_several_questions_is_decoded_once(
    asked_often: ManifestSource, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Image.Image] = []
    decode = data_batch.to_pixels
    monkeypatch.setattr(data_batch, "to_pixels", lambda image, size: (decoded.append(image), decode(image, size))[1])
    (batch,) = _loader(asked_often, tokenizer, 5, shuffle=False)
    assert len(decoded) == len(batch.pixels) == 2
    assert batch.has_image.tolist() == [True, False, True, True, True]
    assert batch.picture.tolist() == [0, 1, 0, 0]
    alone = [_loader(asked_often, tokenizer, 1, indices=[i]) for i in (0, 2, 3, 4)]
    for pixels, loader in zip(batch.pixels[batch.picture], alone, strict=True):
        assert torch.equal(pixels, next(iter(loader)).pixels[0])


def test_a_picture_asked_several_questions_is_encoded_once(
    asked_often: ManifestSource, tokenizer: TextTokenizer
) -> None:
    model = tiny_model(1, tokenizer)
    (batch,) = _loader(asked_often, tokenizer, 5, shuffle=False)
    seen: list[int] = []
    with torch.no_grad(), model.x_encoder.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0]))):
        together = model(*batch.inputs()).embedding
        assert seen == [2]
        for i, row in enumerate(together):
            (alone,) = _loader(asked_often, tokenizer, 1, indices=[i])
            torch.testing.assert_close(model(*alone.inputs()).embedding[0], row, atol=1e-5, rtol=0)


def test_shifted_images_are_each_samples_own(asked_often: ManifestSource, tokenizer: TextTokenizer) -> None:
    """Also where one picture is asked several questions, and as the sample would be shifted alone."""
    (batch,) = _loader(asked_often, tokenizer, 5, shuffle=False, image_shift=8)
    assert batch.picture.tolist() == [0, 1, 2, 3]
    assert len(batch.pixels) == 4
    first, _, again, last = batch.pixels
    assert not torch.equal(first, again)
    assert not torch.equal(first, last)
    for pixels, i in zip(batch.pixels, (0, 2, 3, 4), strict=True):
        (alone,) = _loader(asked_often, tokenizer, 1, indices=[i], image_shift=8)
        assert torch.equal(pixels, alone.pixels[0])


def test_a_question_like_the_query_prompt_is_a_question(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    source = manifest(
        tmp_path,
        {"image": "a.png", "question": CONFIG.query_prompt, "answer": "red"},
        {"image": "a.png", "text": "a red circle"},
        {"image": "b.png", "text": "a blue square"},
    )
    (batch,) = _loader(source, tokenizer, 3, shuffle=False)
    assert batch.questions == [CONFIG.query_prompt, None, None]
    assert torch.equal(batch.query_ids[0], batch.query_ids[1]), "the model is asked the same"
    metrics = evaluate(collect(tiny_model(1, tokenizer), [batch], "cpu")).metrics()
    assert metrics["val/samples"] == 3
    assert metrics["val/questions"] == 1
    assert metrics["val/gallery_texts"] == metrics["val/gallery_images"] == 2, "the captions alone"


def test_the_query_never_contains_the_target(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    for batch in _loader(scenes, tokenizer):
        for question, target in zip(asked(batch), batch.targets, strict=True):
            assert target not in ("", question)
            assert len(target.split()) < 3 or target not in question


def test_target_hash_is_stable_and_non_negative() -> None:
    assert target_hash("blue") == target_hash("blue") != target_hash("Blue")
    assert all(0 <= target_hash(str(i)) < 2**63 for i in range(1000))
    assert target_hash("blue") == 5277910663773635565, "`printf blue | b2sum -l 64`, halved"


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


def test_long_texts_are_truncated_and_counted(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    config = CONFIG.replace(max_query_tokens=4, max_answer_tokens=5)
    (batch,) = _loader(scenes, tokenizer, 39, config=config, shuffle=False)
    expected = sum(
        int(tokenizer.encode([text], 1000).ids.shape[1] > limit)
        for texts, limit in ((asked(batch), 4), (batch.targets, 5))
        for text in texts
    )
    assert batch.n_truncated == expected > 0
    assert batch.query_ids.shape[1] == 4
    assert batch.target_ids.shape[1] == 5


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
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
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
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
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
