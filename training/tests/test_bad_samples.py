"""`--on-bad-sample skip` in every pass over the data, phase and command: left out, counted once, and said."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fork_server import Program
from PIL import Image
from processes import ranks

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import QUERY_PROMPT
from mamba3_jepa.data.asked import question_hashes
from mamba3_jepa.data.confusion import ConfusionSource
from mamba3_jepa.data.files import ManifestSource
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.left_out import LeftOut
from mamba3_jepa.data.sample import image_to_show, source_texts
from mamba3_jepa.data.shards import ShardSource
from mamba3_jepa.data.splits import split_by_hash
from mamba3_jepa.evaluation.phase3_data import check_knowledge
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.files.metrics_log import read_metrics
from tests.tiny import tiny_model

SKIP = ["--cpu", "--workers", "0", "--on-bad-sample", "skip"]


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), (number * 9 % 256, 80, 120)).save(buffer, "png")
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _shard(path: Path, n: int, texts: dict[int, tuple[str, bytes]], images: tuple[int, ...] = ()) -> None:
    """`n` samples; `texts` replaces captions, as suffix and content, and `images` are no images."""
    with tarfile.open(path, "w") as archive:
        for i in range(n):
            _add(archive, f"{i:05d}.png", b"no image" if i in images else _png(i))
            suffix, content = texts.get(i, ("txt", f"picture {i}".encode()))
            _add(archive, f"{i:05d}.{suffix}", content)


UNUSABLE = {
    3: ("txt", b""),
    10: ("json", b'{"caption": null}'),
    17: ("json", b'{"caption": "half an emoji \\ud83d"}'),
    24: ("txt", b" \n"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All phases on a shard of 30 with four unusable captions and two images that are none; the logs beside them."""
    folder = tmp_path_factory.mktemp("skip")
    (folder / "data").mkdir()
    _shard(folder / "data" / "a.tar", 30, UNUSABLE, images=(5, 20))
    common = ["--data-dir", str(folder / "data"), "--val-fraction", "0.4", "--batch-size", "2", "--epochs", "2", *SKIP]
    steps = {
        "phase1": ["train-jepa", "--tiny"],
        "phase2": ["train-decoder", "--phase1-checkpoint", str(folder / "phase1" / "phase1_best.pt")],
        "phase3": ["train-agent", "--phase2-checkpoint", str(folder / "phase2" / "phase2_best.pt")],
    }
    for name, arguments in steps.items():
        done = Program([*arguments, *common, "--output-dir", name], cwd=folder)
        _, stderr = done.outputs()
        assert done.returncode == 0, stderr
        (folder / f"{name}.log").write_bytes(stderr)
    return folder


def _said(log: str) -> list[int]:
    return [int(count) for count in re.findall(r"(\d+) bad samples skipped", log)]


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_each_phase_counts_every_bad_sample_once(runs: Path, phase: int) -> None:
    log = (runs / f"phase{phase}.log").read_text()
    assert sum(_said(log)) == 6, log


def test_the_counts_are_those_of_all_ranks(tmp_path: Path) -> None:
    n, broken = 24, (1, 8, 13)  # fewer than a batch of one rank
    for i in range(n):
        (tmp_path / f"{i}.png").write_bytes(b"no image" if i in broken else _png(i))
    lines = [
        json.dumps({"image": f"{i}.png", "text": f"picture {i} " + "long " * 80 * (i < 2)}) + "\n" for i in range(n)
    ]
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    (tmp_path / "val.jsonl").write_text("".join(lines[2:6]))
    arguments = ["--tiny", "--data-dir", str(tmp_path), "--batch-size", "4", "--epochs", "1", "--log-every", "3", *SKIP]
    status, said = ranks(2, "train-jepa", *arguments, "--output-dir", str(tmp_path / "run"))
    assert status == 0, said
    assert sum(_said(said)) == 3, said
    assert re.findall(r"(\d+) texts longer", said) == ["1"], "the other long one has a broken image"
    steps = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert len(steps) == 1, "the counts of a line are those of all steps since the one before"
    assert [steps[0][f"train/{name}"] for name in ("skipped_samples", "truncated_texts")] == [3, 1]


def test_phase_3_counts_what_it_trains_on(runs: Path) -> None:
    """A bad sample is none of the kinds, clear or made."""
    data = load_checkpoint(runs / "phase3" / "phase3_last.pt").data
    (trained,) = re.findall(r"(\d+) training \(", (runs / "phase3.log").read_text())
    assert sum(data.confusion.values()) == int(trained) < 30


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_what_was_left_out_is_no_training_sample(runs: Path, phase: int) -> None:
    """30 samples, six of them bad; the others are divided as the hash of their names says. Phase 3 learns from half of
    those that the phases before did not learn from, by the next bit of the hash."""
    data = load_checkpoint(runs / f"phase{phase}" / f"phase{phase}_last.pt").data
    source = ShardSource(runs / "data", on_bad_sample="skip")
    hashes = source.group_hashes()
    train, held_out = split_by_hash(hashes, 0.4)
    if phase == 3:
        train = np.union1d(train, [i for i in held_out if not int(hashes[i]) & 2])
    good = [i for i in train if i not in UNUSABLE and i not in (5, 20)]
    assert len(good) < len(train) < len(source)
    assert data.train_samples == len(good)


def test_evaluate_says_what_it_left_out(runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = {0: "one", 1: "two", 2: "gone.txt", 3: "three", 4: "four"}
    for i in (0, 1, 2, 4):
        (tmp_path / f"{i}.png").write_bytes(_png(i))
    lines = [json.dumps({"image": f"{i}.png", "text": text}) + "\n" for i, text in texts.items()]
    (tmp_path / "test.jsonl").write_text("".join(lines))
    arguments = ["evaluate", "--checkpoint", str(runs / "phase2" / "phase2_best.pt"), "--device", "cpu"]
    arguments += ["--data-dir", str(tmp_path), "--manifest", "test.jsonl", "--output", str(tmp_path / "test.json")]
    assert main([*arguments, "--on-bad-sample", "skip"]) == 0
    assert _said(caplog.text) == [2]
    values = json.loads((tmp_path / "test.json").read_text())
    assert (values["skipped_samples"], values["test/samples"]) == (2, 3)
    assert main(arguments) == 2


def test_nothing_that_can_be_read_is_one_sentence(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "test.jsonl").write_text('{"image": "gone.png", "text": "x"}\n{"image": "lost.png", "text": "y"}\n')
    checkpoint = ["--checkpoint", str(runs / "phase1" / "phase1_best.pt"), "--device", "cpu"]
    arguments = ["evaluate", *checkpoint, "--data-dir", str(tmp_path), "--manifest", "test.jsonl"]
    assert main([*arguments, "--on-bad-sample", "skip"]) == 2
    assert "not one of 2 samples could be read" in capfd.readouterr().err


def test_bad_samples_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    left_out = LeftOut()
    left_out.say("epoch 1", ["a", "b", "a"])
    left_out.say("epoch 2", ["b", "a"])
    left_out.note(["b", "c"])
    left_out.say("validation", ["a"])
    assert [record.message for record in caplog.records] == [
        "epoch 1: 2 bad samples skipped, the first: a",
        "validation: 1 bad samples skipped (3 so far), the first: c",
    ]
    assert len(left_out) == 3


def test_an_image_that_is_lost_meanwhile_costs_no_picture(tmp_path: Path) -> None:
    source = _knowing_manifest(tmp_path)
    image = image_to_show(source, 0)
    assert image is not None
    assert image.size == (24, 20)
    (tmp_path / "0.png").unlink()
    assert image_to_show(source, 0) is None
    assert image_to_show(source, 9) is None, "its text cannot be read"


def _knowing_manifest(folder: Path) -> ManifestSource:
    """Questions about good images, and captions, one image of which has no readable text: a donor of images."""
    lines = []
    for i in range(8):
        (folder / f"{i}.png").write_bytes(_png(i))
        lines.append({"image": f"{i}.png", "query": f"what is {i}?", "answer": f"a{i}", "knowledge": f"it is {i}"})
    (folder / "good.txt").write_text("fine")
    for i in range(8, 12):
        (folder / f"{i}.png").write_bytes(_png(i))
        lines.append({"image": f"{i}.png", "text": "gone.txt"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ManifestSource(folder, on_bad_sample="skip")


def test_passes_over_texts_pass_over_what_cannot_be_read(tmp_path: Path) -> None:
    source = _knowing_manifest(tmp_path)
    bad: list[str] = []
    texts = list(source_texts(source, range(12), bad))
    assert len(texts) == 16
    assert len(bad) == 4
    assert all("gone.txt" in message for message in bad)
    with pytest.raises(BadSampleError, match=r"line 9: .*gone\.txt"):
        list(source_texts(source, range(12)))
    assert len(set(question_hashes(source, np.arange(12), QUERY_PROMPT).tolist())) == 9


def test_knowledge_of_a_sample_whose_image_comes_from_a_bad_one(tmp_path: Path) -> None:
    source = ConfusionSource(_knowing_manifest(tmp_path), range(12), 0, ("mismatched",))
    model = tiny_model(3)
    rows = np.arange(len(source))
    with pytest.raises(BadSampleError, match="gone"):
        check_knowledge(model, source, rows)
    check_knowledge(model, source, rows, on_bad_sample="skip")
    n_told = 0
    for i in rows.tolist():
        try:
            source.sample(i)
        except BadSampleError:
            continue
        n_told += len(source.lessons(i))  # what is told elsewhere, or shown, may be bad: it is looked for further
    assert n_told > len(rows)
