"""A run goes on wherever its data lies and however the paths are written, and not with data that has changed."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from meta_checkpoint import save_meta_checkpoint
from PIL import Image
from tiny import tiny_model

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import preset
from mamba3_jepa.data import content
from mamba3_jepa.data.content import content_of, recognised, sketch
from mamba3_jepa.data.sources import open_source, open_splits
from mamba3_jepa.files.checkpoint import load_checkpoint, save_checkpoint
from mamba3_jepa.models.vit import VisionEncoder

N = 24
SHORT = ["--tiny", "--cpu", "--workers", "0", "--batch-size", "4", "--val-fraction", "0.3", "--log-every", "1",
         "--epochs", "4"]  # fmt: skip
KINDS = ["folder", "manifest", "shards"]


def picture(i: int) -> bytes:
    """Always as many bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (i * 10, 255 - i * 3, i)).save(buffer, "BMP")
    return buffer.getvalue()


def caption(i: int) -> str:
    return f"picture number {i:02}"


def write_folder(root: Path, first: int = 0) -> Path:
    root.mkdir(parents=True)
    for i in range(first, first + N):
        (root / f"p{i:02}.bmp").write_bytes(picture(i))
        (root / f"p{i:02}.txt").write_text(caption(i))
    return root


def write_lines(root: Path, lines: list[dict], end: str = "\n") -> None:
    (root / "manifest.jsonl").write_bytes("".join(json.dumps(line) + end for line in lines).encode())


def manifest_lines(image: str = "images/{}") -> list[dict]:
    return [{"image": image.format(f"p{i:02}.bmp"), "text": caption(i)} for i in range(N)]


def write_manifest(root: Path) -> Path:
    write_folder(root / "images")
    for path in (root / "images").glob("*.txt"):
        path.unlink()
    write_lines(root, manifest_lines())
    return root


def write_shard(path: Path, samples: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in samples:
            for name, data in ((f"{i:04}.bmp", picture(i)), (f"{i:04}.txt", caption(i).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def write_shards(root: Path) -> Path:
    for shard in range(3):
        write_shard(root / f"{shard:05}.tar", range(8 * shard, 8 * shard + 8))
    return root


WRITE: dict[str, Callable[[Path], Path]] = {"folder": write_folder, "manifest": write_manifest, "shards": write_shards}


def train(out: Path, data: Path | str, *arguments: str, command: str = "train-jepa") -> int:
    return main([command, *SHORT, "--data-dir", str(data), "--output-dir", str(out), *arguments])


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind of data, the data and a run of two steps on it; and where two more steps lead."""
    root = tmp_path_factory.mktemp("begun")
    for kind in KINDS:
        data = WRITE[kind](root / kind / "data")
        assert train(root / kind / "run", data, "--max-steps", "2") == 0
        shutil.copytree(root / kind / "run", root / kind / "four")
        assert train(root / kind / "four", data, "--max-steps", "4", "--resume") == 0
    return root


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def mine(begun: Path, kind: str, tmp_path: Path) -> Path:
    """A copy of one of them to work on; nothing in it has the times or the path it had."""
    shutil.copytree(begun / kind, tmp_path / "mine", copy_function=shutil.copyfile)
    return tmp_path / "mine"


def assert_goes_on(mine: Path, data: Path | str) -> None:
    assert train(mine / "run", data, "--max-steps", "4", "--resume") == 0
    ours, theirs = (load_checkpoint(mine / name / "phase1_last.pt").model for name in ("run", "four"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_refused(mine: Path, data: Path | str, capfd: pytest.CaptureFixture, *words: str) -> None:
    capfd.readouterr()
    assert train(mine / "run", data, "--max-steps", "4", "--resume") == 2
    error = capfd.readouterr().err
    assert "cannot resume" in error
    for word in ("the data has changed", "--output-dir", *words):
        assert word in error


# --- where the data lies ---


def test_a_copy_elsewhere_is_the_same_data(mine: Path) -> None:
    shutil.move(mine / "data", mine / "scratch")
    assert_goes_on(mine, mine / "scratch")


@pytest.mark.parametrize("spelled", ["data", "./data", "data/", "link", "data/../data"])
def test_so_is_another_spelling(mine: Path, spelled: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind != "folder" and spelled not in ("data", "link"):
        pytest.skip("the same for all kinds")
    (mine / "link").symlink_to("data")
    monkeypatch.chdir(mine)
    assert_goes_on(mine, spelled)


@pytest.mark.parametrize("kind", ["manifest"])
@pytest.mark.parametrize("image", ["./images/{}", "images//{}", "images/../images/{}", "images\\{}", ".\\images\\{}"])
def test_so_is_a_manifest_with_other_spellings_of_its_paths(mine: Path, image: str) -> None:
    lines = [line | {"id": i, "meta": {"x": [i]}} for i, line in enumerate(manifest_lines(image))]
    write_lines(mine / "data", lines, end="\r\n")
    assert_goes_on(mine, mine / "data")


@pytest.mark.parametrize("kind", ["shards"])
def test_so_are_renamed_shards(mine: Path) -> None:
    before = open_splits(mine / "data", image_size=32, val_fraction=0.3)
    (mine / "data" / "train").mkdir()
    for path in (mine / "data").glob("*.tar"):
        path.rename(path.with_name("train") / f"cc-{path.name}")
    after = open_splits(mine / "data", image_size=32, val_fraction=0.3)
    assert after.val_indices.tolist() == before.val_indices.tolist()
    assert_goes_on(mine, mine / "data")


# --- what lies there ---


def edit_caption(data: Path) -> None:
    """To one of the same length."""
    for path in [data / "p07.txt", data / "manifest.jsonl", data / "00000.tar"]:
        if path.exists():
            path.write_bytes(path.read_bytes().replace(b"number 07", b"number 77"))


def replace_picture(data: Path) -> None:
    """By one of the same size."""
    for path in [data / "p07.bmp", data / "images" / "p07.bmp", data / "00000.tar"]:
        if path.exists():
            path.write_bytes(path.read_bytes().replace(picture(7), picture(99)[:60] + picture(7)[60:]))


@pytest.mark.parametrize(("change", "what"), [(edit_caption, "texts"), (replace_picture, "pictures")])
def test_a_changed_sample_is_named(
    mine: Path, kind: str, change: Callable[[Path], None], what: str, capfd: pytest.CaptureFixture
) -> None:
    change(mine / "data")
    origin = {"folder": "data/p07.bmp", "manifest": "manifest.jsonl line 8", "shards": "00000.tar: 0007"}[kind]
    assert_refused(mine, mine / "data", capfd, f"{what} of ", origin)


def test_more_samples_are_counted(mine: Path, kind: str, capfd: pytest.CaptureFixture) -> None:
    data = mine / "data"
    if kind == "folder":
        (data / "q.bmp").write_bytes(picture(30))
        (data / "q.txt").write_text("one more")
    elif kind == "manifest":
        write_lines(data, [*manifest_lines(), {"image": "images/p01.bmp", "text": "one more"}])
    else:
        write_shard(data / "9.tar", range(30, 31))
    record = load_checkpoint(mine / "run" / "phase1_last.pt").data
    assert_refused(mine, data, capfd, f"instead of {record.train_samples} and {record.val_samples}")


def test_another_order_is_refused(mine: Path, kind: str, capfd: pytest.CaptureFixture) -> None:
    data = mine / "data"
    if kind == "folder":
        for suffix in ("bmp", "txt"):
            (data / f"p00.{suffix}").rename(data / f"z.{suffix}")
    elif kind == "manifest":
        write_lines(data, manifest_lines()[::-1])
    else:
        (data / "00000.tar").rename(data / "9.tar")
    assert_refused(mine, data, capfd)


@pytest.mark.parametrize("kind", ["manifest"])
def test_only_what_a_phase_uses_counts(mine: Path, capfd: pytest.CaptureFixture) -> None:
    """A line for phase 3 behind the others is nothing to phase 1; before them it moves their numbers."""
    line = {"image": None, "query": "Hello", "confused": True}
    write_lines(mine / "data", [*manifest_lines(), line])
    assert_goes_on(mine, mine / "data")
    write_lines(mine / "data", [line, *manifest_lines()])
    assert_refused(mine, mine / "data", capfd, "places among the samples that this phase does not use")


@pytest.mark.parametrize("kind", ["folder"])
def test_made_up_data_is_no_substitute(mine: Path, capfd: pytest.CaptureFixture) -> None:
    (mine / "empty").mkdir()
    assert_refused(mine, mine / "empty", capfd)


@pytest.mark.parametrize("kind", ["folder"])
def test_of_an_older_run_only_names_can_be_compared(
    mine: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    path = mine / "run" / "phase1_last.pt"
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, replace(checkpoint, data=replace(checkpoint.data, content={}, seen=[])))
    shutil.copy(path, mine / "old.pt")
    edit_caption(mine / "data")
    assert train(mine / "run", mine / "data", "--max-steps", "4", "--resume") == 0
    assert "only names were compared, not whether texts or pictures have changed" in caplog.text
    shutil.copy(mine / "old.pt", path)
    (mine / "data" / "p00.bmp").rename(mine / "data" / "p000.bmp")
    (mine / "data" / "p00.txt").rename(mine / "data" / "p000.txt")
    assert_refused(mine, mine / "data", capfd, "its names or lines")


@pytest.mark.parametrize("kind", ["folder"])
def test_the_tokenizer_may_move_but_not_change(mine: Path, capfd: pytest.CaptureFixture) -> None:
    model = tiny_model()
    (mine / "a.json").write_text(model.tokenizer.to_json())
    (mine / "b.json").write_text(tiny_model(texts=["quite another text"]).tokenizer.to_json())
    run = mine / "own"
    assert train(run, mine / "data", "--max-steps", "2", "--tokenizer", str(mine / "a.json")) == 0
    (mine / "a.json").rename(mine / "c.json")
    assert train(run, mine / "data", "--max-steps", "3", "--resume", "--tokenizer", str(mine / "c.json")) == 0
    assert train(run, mine / "data", "--max-steps", "4", "--resume") == 0
    capfd.readouterr()
    assert train(run, mine / "data", "--max-steps", "5", "--resume", "--tokenizer", str(mine / "b.json")) == 2
    assert "b.json is not the one it was started with" in capfd.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("kind", ["folder"])
def test_so_may_the_weights_of_the_x_encoder(mine: Path, capfd: pytest.CaptureFixture) -> None:
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_meta_checkpoint(VisionEncoder(preset("tiny").vision), mine / f"{name}.pt")
    run = mine / "own"
    assert train(run, mine / "data", "--max-steps", "1", "--vit-checkpoint", str(mine / "a.pt")) == 0
    (mine / "a.pt").rename(mine / "c.pt")
    assert train(run, mine / "data", "--max-steps", "2", "--resume", "--vit-checkpoint", str(mine / "c.pt")) == 0
    capfd.readouterr()
    assert train(run, mine / "data", "--max-steps", "3", "--resume", "--vit-checkpoint", str(mine / "b.pt")) == 2
    assert "b.pt are not those it was started with" in capfd.readouterr().err.replace("\n", " ")


# --- what earlier phases have seen ---


def test_all_earlier_phases_are_asked_what_they_have_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, other = write_folder(tmp_path / "first"), write_folder(tmp_path / "other", first=40)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for path in first.iterdir():  # the same pictures, under names that divide them otherwise
        shutil.copyfile(path, renamed / f"new_{path.name}")
    assert train(tmp_path / "1", first, "--max-steps", "1") == 0
    start = ["--max-steps", "1", "--phase1-checkpoint", str(tmp_path / "1" / "phase1_best.pt")]
    assert train(tmp_path / "2", other, *start, command="train-decoder") == 0
    assert "held-out samples" not in caplog.text
    start = ["--max-steps", "1", "--phase2-checkpoint", str(tmp_path / "2" / "phase2_best.pt")]
    assert train(tmp_path / "3", renamed, *start, command="train-agent") == 0
    splits = open_splits(renamed, image_size=32, val_fraction=0.3)
    held_out = {str(splits.val.group(int(i))).removeprefix("new_") for i in splits.val_indices}
    of_first = open_splits(first, image_size=32, val_fraction=0.3)
    learnt = {of_first.train.group(int(i)) for i in of_first.train_indices}
    assert held_out & learnt
    said = f"of {len(held_out)} held-out samples {len(held_out & learnt)} what phase 1 was trained on show"
    assert said in caplog.text
    assert "phase 2 was trained" not in caplog.text
    caplog.clear()
    arguments = ["--checkpoint", str(tmp_path / "3" / "phase3_best.pt"), "--data-dir", str(first), "--device", "cpu"]
    assert main(["evaluate", *arguments]) == 0
    assert "what phase 3 was trained on" in caplog.text
    assert "what phase 1 was trained on" not in caplog.text


def test_one_picture_under_two_names_on_both_sides_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_folder(tmp_path / "data")
    splits = open_splits(data, image_size=32, val_fraction=0.3)
    names = [splits.train.group(int(indices[0])) for indices in (splits.train_indices, splits.val_indices)]
    shutil.copyfile(data / names[0], data / names[1])
    assert train(tmp_path / "run", data, "--max-steps", "1") == 0
    n_val = len(splits.val_indices)
    assert (
        f"1 of {n_val} validation samples show a picture that training samples show under another name" in caplog.text
    )


def test_one_image_however_its_path_is_written_stays_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_manifest(tmp_path / "data")
    (tmp_path / "data" / "a").mkdir()
    ways = ["images/{}", "./images/{}", "a/../images/{}", "images//{}", "images\\{}", ".\\images\\{}"]
    write_lines(tmp_path / "data", [line for way in ways for line in manifest_lines(way)])
    splits = open_splits(tmp_path / "data", image_size=32, val_fraction=0.3)
    sides = [{int(i) % N for i in indices} for indices in (splits.train_indices, splits.val_indices)]
    assert not sides[0] & sides[1]
    write_lines(tmp_path / "data", manifest_lines())
    plain = open_splits(tmp_path / "data", image_size=32, val_fraction=0.3)
    assert sides[1] == {int(i) for i in plain.val_indices}


# --- the digests ---


def test_of_a_large_picture_begin_middle_and_end_are_read(tmp_path: Path) -> None:
    size = content.WHOLE_BYTES + 999
    seen = []
    for changed in (None, 3, size // 2, size - 1):
        data = bytearray(size)
        if changed is not None:
            data[changed] = 1
        (tmp_path / "a.png").write_bytes(data)
        (tmp_path / "a.txt").write_text("a")
        source = open_source(tmp_path)
        assert source is not None
        seen.append(int(content_of(source, [0]).pictures[0]))
    assert len(set(seen)) == 4


def test_what_cannot_be_read_is_content_too(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data")
    source = open_source(data)
    assert source is not None
    before = content_of(source, range(N))
    (data / "p03.txt").write_text("")
    (data / "p05.bmp").unlink()
    after = content_of(source, range(N))
    assert np.flatnonzero(after.texts != before.texts).tolist() == [3]
    assert np.flatnonzero(after.pictures != before.pictures).tolist() == [3, 5]
    assert np.flatnonzero(after.unread).tolist() == [5]


@pytest.mark.parametrize("kind", ["manifest"])
def test_what_the_disk_did_not_give_at_first_is_not_held_against_it(mine: Path, capfd: pytest.CaptureFixture) -> None:
    data, lost = mine / "data" / "images" / "p07.bmp", mine / "lost.bmp"
    data.rename(lost)
    assert train(mine / "own", mine / "data", "--max-steps", "2", "--on-bad-sample", "skip") == 0
    lost.rename(data)
    assert train(mine / "own", mine / "data", "--max-steps", "3", "--on-bad-sample", "skip", "--resume") == 0
    data.rename(lost)
    capfd.readouterr()
    assert train(mine / "own", mine / "data", "--max-steps", "4", "--on-bad-sample", "skip", "--resume") == 2
    assert "the data has changed since: pictures of " in capfd.readouterr().err


def test_of_very_many_pictures_some_are_read_and_all_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_folder(tmp_path / "data"))
    assert source is not None
    everything = content_of(source, range(N))
    monkeypatch.setattr(content, "MAX_PICTURES", 10)
    some = content_of(source, range(N))
    assert (some.pictures > 0).sum() == (some.keys > 0).sum() == 10
    assert set(some.pictures.tolist()) - {0} <= set(everything.pictures.tolist())
    assert (some.texts == everything.texts).all()


def test_a_sketch_recognises_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).integers(1, 2**64, 40_000, dtype=np.uint64)
    known = sketch(keys[:30_000])
    assert len(known) == content.SKETCH_SIZE
    seen, told = recognised(keys[20_000:], known)  # half of these 20,000
    assert 1000 < told < 2000
    assert abs(seen / told - 0.5) < 0.05
    assert recognised(keys[:50], sketch(keys[25:100])) == (25, 50)
    assert recognised(np.zeros(3, dtype=np.uint64), sketch(keys[:9])) == (0, 0)
