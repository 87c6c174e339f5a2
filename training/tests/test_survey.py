"""What is data in a folder: used where it can be read, else named with its number and the reason."""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamba3_jepa.data.content import content_of
from mamba3_jepa.data.files import FolderSource
from mamba3_jepa.data.images import IMAGE_SUFFIXES, BadSampleError
from mamba3_jepa.data.shards import ShardSource
from mamba3_jepa.data.sources import Source, open_source, open_splits
from mamba3_jepa.data.splits import split_by_hash, stable_hash
from mamba3_jepa.data.survey import suffix_of, walk_visible
from mamba3_jepa.errors import UserError
from mamba3_jepa.inference.embeddings import find_images

KINDS = {".jfif": "JPEG", ".jpe": "JPEG", ".jpg": "JPEG", ".jpeg": "JPEG", ".apng": "PNG", ".png": "PNG",
         ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP"}  # fmt: skip


def _image(kind: str = "PNG", number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (220, number * 5, 20)).save(buffer, kind)
    return buffer.getvalue()


def _pair(folder: Path, name: str, kind: str = "PNG", number: int = 0, text: str = ".txt") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_image(kind, number))
    path.with_suffix(text).write_text(f"caption of {name}")


def _tar(path: Path, names: list[str], mode: str = "w") -> None:
    """Members of these names; a text says its own name, an image has its position as its green."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for number, name in enumerate(names):
            is_text = name.lower().endswith("txt")
            content = f"text {name}".encode() if is_text else _image(number=number)
            if name.endswith(".json"):
                content = f'{{"caption": "json {name}"}}'.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _targets(source: Source | None) -> dict[str, str | None]:
    assert source is not None
    return {source.group(i): source.sample(i).target for i in range(len(source))}


def test_every_image_that_is_looked_for_can_be_decoded(tmp_path: Path) -> None:
    assert sorted(KINDS) == sorted(IMAGE_SUFFIXES)
    for number, (suffix, kind) in enumerate(KINDS.items()):
        _pair(tmp_path, f"{number}{suffix}", kind)
        _pair(tmp_path, f"upper/{number}{suffix.upper()}", kind)
    source = open_source(tmp_path)
    assert isinstance(source, FolderSource)
    assert len(source) == 2 * len(KINDS)
    for i in range(len(source)):
        image = source.sample(i).image
        assert image is not None
        red, _, blue = image().getpixel((9, 9))
        assert abs(red - 220) < 8
        assert abs(blue - 20) < 12


def test_both_halves_look_for_the_same_images() -> None:
    code = (Path(__file__).parents[2] / "rust" / "src" / "image" / "mod.rs").read_text()
    (found,) = re.findall(r"IMAGE_SUFFIXES: \[&str; \d+\] =\s*\[([^\]]*)\]", code)
    assert tuple(re.findall(r'"([^"]+)"', found)) == IMAGE_SUFFIXES


def test_pairs_that_cannot_be_decoded_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(3):
        _pair(tmp_path, f"{i}.png")
        _pair(tmp_path, f"scan{i}.TIF", "TIFF")
    (tmp_path / "photo.heic").write_bytes(b"x")
    (tmp_path / "stats.json").write_text("{}")
    assert len(_targets(open_source(tmp_path))) == 3
    assert "not read: 3 .tif, 1 .heic (no decoder for them: convert them to JPEG or PNG)" in caplog.text
    assert "json" not in caplog.text


def test_a_caption_in_upper_case_belongs_to_its_image(tmp_path: Path) -> None:
    _pair(tmp_path, "A.JPG", "JPEG", text=".TXT")
    assert _targets(open_source(tmp_path)) == {"A.JPG": "caption of A.JPG"}


def test_hidden_files_and_folders_are_not_data(tmp_path: Path) -> None:
    _pair(tmp_path, "a.png")
    for name in ("._a.png", ".cache/b.png", "sub/.trash/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no image, and no text beside it")
    (tmp_path / ".old.tar").write_bytes(b"no tar")
    (tmp_path / ".old.tar.gz").write_bytes(b"no tar")
    assert list(_targets(open_source(tmp_path))) == ["a.png"]
    assert [path.name for path in find_images([], tmp_path)] == ["a.png"]

    only_hidden = tmp_path / "sub"
    assert open_source(only_hidden) is None
    _tar(only_hidden / "a.tar", ["./._k.jpg", "k.jpg", "k.txt", ".git/x.jpg", "./m.jpg", "./m.txt"])
    assert _targets(open_source(only_hidden)) == {"k": "text k.txt", "m": "text ./m.txt"}


def test_members_with_dots_in_their_names(tmp_path: Path) -> None:
    names = ["plain.jpg", "plain.txt"]
    names += [f"day/holiday.2021.{i:02d}.{suffix}" for i in range(3) for suffix in ("txt", "JPG")]
    names += ["sample1.input.jpg", "sample1.outputs.txt", "v1.5.png", "v1.5.json"]
    _tar(tmp_path / "a.tar", names)
    source = open_source(tmp_path)
    assert _targets(source) == {
        "plain": "text plain.txt",
        "day/holiday.2021.00": "text day/holiday.2021.00.txt",
        "day/holiday.2021.01": "text day/holiday.2021.01.txt",
        "day/holiday.2021.02": "text day/holiday.2021.02.txt",
        "sample1": "text sample1.outputs.txt",
        "v1.5": "json v1.5.json",
    }
    assert source is not None
    for i in range(6):
        image = source.sample(i).image
        assert image is not None
        assert image().getpixel((3, 3))[1] // 5 == [0, 3, 5, 7, 8, 10][i]


def test_a_dotted_image_never_gets_the_caption_of_another(tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", ["day.01.jpg", "day.02.txt", "b.jpg", "b.txt"])
    with pytest.raises(UserError, match=r"a\.tar: day\.01\.jpg has neither day\.01\.txt nor day\.01\.json"):
        ShardSource(tmp_path)
    source = ShardSource(tmp_path, on_bad_sample="skip")
    assert (list(_targets(source)), source.n_left_out) == (["b"], 1)


def test_members_that_are_not_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _tar(tmp_path / "a.tar", ["a.jpg", "a.txt", "a.depth.png", "a.png", "b.tif", "b.txt", "c.mp4", "d.npy", "a.json"])
    assert _targets(open_source(tmp_path)) == {"a": "text a.txt"}
    assert "2 more images of samples that have one already" in caplog.text
    assert "not read in the shards: 1 .mp4 (samples are single images); 1 .tif (no decoder" in caplog.text
    assert "npy" not in caplog.text
    _tar(tmp_path / "a.tar", ["b.tif", "b.txt"])
    with pytest.raises(UserError, match=r"no image with a caption in 1 \*\.tar shards, but 1 \.tif \(no decoder"):
        open_source(tmp_path)


def test_archives_behind_one_another_are_read_to_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _tar(tmp_path / "a.tar", ["a.jpg", "a.txt"])
    _tar(tmp_path / "b.tar", ["b.jpg", "b.txt", "a.jpg"])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    (tmp_path / "b.tar").unlink()
    assert list(_targets(open_source(tmp_path))) == ["a", "b"]
    assert "1 more images of samples that have one already" in caplog.text
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() + b"no archive" * 100)
    assert len(_targets(open_source(tmp_path))) == 2


def test_shards_in_folders_are_found(tmp_path: Path) -> None:
    for folder in ("train/b", "train/a", ""):
        _tar(tmp_path / folder / "0.tar", ["k.jpg", "k.txt"])
    _tar(tmp_path / "1.TAR", ["l.jpg", "l.txt"])
    source = open_source(tmp_path)
    assert isinstance(source, ShardSource)
    assert [source.sample(i).target for i in range(4)] == ["text k.txt", "text l.txt", "text k.txt", "text k.txt"]
    assert len(set(source.group_hashes().tolist())) == 2, "equal keys of equal images stay together"
    assert source.n_folders == 3


def test_compressed_shards_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _tar(tmp_path / "sub" / "0.tar.gz", ["k.jpg", "k.txt"], "w:gz")
    _tar(tmp_path / "1.tgz", ["k.jpg", "k.txt"], "w:gz")
    with pytest.raises(UserError, match=r"1 \.tar\.gz, 1 \.tgz \(samples are read by position.*unpack them to \.tar"):
        open_splits(tmp_path, image_size=32)
    _tar(tmp_path / "2.tar", ["k.jpg", "k.txt"])
    _pair(tmp_path, "loose.png")
    assert list(_targets(open_source(tmp_path))) == ["k"]
    assert "not read: 1 .tar.gz, 1 .tgz" in caplog.text
    assert "1 image files beside the shards are not read" in caplog.text


@pytest.mark.parametrize("name", ["a.tif", "sub/a.HEIC", "a.zip", "annotations.json", "train.parquet", "a.mp4",
                                  "captions.tsv", "all.tar.zst", "sub/manifest.jsonl"])  # fmt: skip
def test_what_looks_like_data_is_never_replaced_by_scenes(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"no manifest\.jsonl.*, but 1 {re.escape(suffix_of(name))} \("):
        open_splits(tmp_path, image_size=32)


def test_several_texts_alone_look_like_captions(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "sub/c.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a caption")
    with pytest.raises(UserError, match=r"but 3 \.txt \(texts without an image beside them\)"):
        open_splits(tmp_path, image_size=32)


def test_scenes_where_nothing_looks_like_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("to come")
    (tmp_path / "notes.txt").write_text("to come")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "images").mkdir()
    assert open_splits(tmp_path, image_size=32, n_scenes=3, n_val_scenes=2).synthetic


def test_linked_folders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _pair(tmp_path / "elsewhere", "a.png")
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="1 links to folders, such as images"):
        open_source(data)
    _pair(data, "b.png")
    assert list(_targets(open_source(data))) == ["b.png"]
    assert "1 links to folders, such as images" in caplog.text
    (data / "manifest.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"manifest\.jsonl: cannot read the manifest"):
        open_source(data)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pair(tmp_path, "a.png")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="locked: cannot read the folder: Permission denied"):
        list(walk_visible(tmp_path))


def test_images_of_a_folder_to_ask_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tiff").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no image in it \(.*\), but 1 \.tiff \(no decoder"):
        find_images([], tmp_path)
    (tmp_path / "b.GIF").write_bytes(_image("GIF"))
    assert find_images([], tmp_path) == [tmp_path / "b.GIF"]
    assert "not read: 1 .tiff" in caplog.text


def test_two_groups_or_more_give_both_sides_one(tmp_path: Path) -> None:
    for n in (2, 3, 101):
        hashes = np.array([stable_hash(f"{n}/{i // 2}") for i in range(2 * n)], dtype=np.uint64)
        for fraction in (1e-9, 0.02, 0.5, 0.99, 1 - 1e-9):
            train, val = split_by_hash(hashes, fraction)
            assert sorted([*train, *val]) == list(range(2 * n))
            assert set(hashes[train]).isdisjoint(hashes[val])
            assert len(train) >= 2
            assert len(val) >= 2
        small, large = (set(split_by_hash(hashes, fraction)[1]) for fraction in (1e-9, 0.3))
        assert small <= large, "what is held out first stays held out"
    assert len(split_by_hash(hashes, 0.0)[1]) == 0
    assert len(split_by_hash(hashes[:2], 0.5)[1]) in (0, 2), "one group is not divided"
    names = [f"{i}.png" for i in range(2000) if stable_hash(f"{i}.png") >= int(0.02 * 2**64)][:101]
    for name in names:
        _pair(tmp_path, name)
    splits = open_splits(tmp_path, image_size=32)
    assert (len(splits.train_indices), len(splits.val_indices)) == (100, 1)


# --- what is no file, or has no name ---


@pytest.mark.parametrize("name", ["q.png", "q.txt"])
def test_a_pipe_among_the_files_is_a_bad_sample(tmp_path: Path, name: str) -> None:
    """Opening it would wait for ever."""
    for i in range(3):
        _pair(tmp_path, f"{i}.png", number=i)
    _pair(tmp_path, "q.png")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    source = open_source(tmp_path)
    assert source is not None
    assert content_of(source, range(4)).texts.all()
    with pytest.raises(BadSampleError, match=rf"{name} is no (image|text) file, but a pipe, socket or device"):
        source.sample(3).image()  # type: ignore[misc]


def test_a_pipe_in_the_place_of_all_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "manifest.jsonl")
    with pytest.raises(UserError, match=r"manifest\.jsonl: a pipe, socket or device"):
        open_source(tmp_path)
    (tmp_path / "manifest.jsonl").rename(tmp_path / "b.tar")
    with pytest.raises(UserError, match=r"b\.tar: cannot read the shard: a pipe"):
        open_source(tmp_path)
    _tar(tmp_path / "a.tar", ["k.jpg", "k.txt"])
    assert len(_targets(open_source(tmp_path, on_bad_sample="skip"))) == 1
    assert "1 damaged shards" in caplog.text
    images = tmp_path / "images"
    _pair(images, "x.png")
    os.mkfifo(images / "y.png")
    assert find_images((), images) == [images / "x.png"]
    assert "not read: 1 pipes, sockets or devices" in caplog.text


@pytest.mark.parametrize(("name", "kind"), [("0001", "JPEG"), ("1.jpg_large", "JPEG"), ("a.img", "PNG"), ("b", "WebP"),
                                            ("c.txt~", "GIF"), ("d.data", "TIFF")])  # fmt: skip
def test_images_without_their_suffix_are_no_empty_directory(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).write_bytes(_image(kind.upper()))
    said = rf"but 1 {kind} files by what is in them, such as .*{re.escape(name)} \(give them their suffix\)"
    with pytest.raises(UserError, match=said):
        open_splits(tmp_path, image_size=32)
    with pytest.raises(UserError, match=said):
        find_images((), tmp_path)


def test_shards_without_their_suffix_and_inside_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _tar(tmp_path / "one" / "shard-0", ["k.jpg", "k.txt"])
    with pytest.raises(UserError, match="but 1 tar files by what is in them"):
        open_splits(tmp_path / "one", image_size=32)
    _tar(tmp_path / "two" / "a.tar", ["k.jpg", "k.txt", "inner.tar"])
    assert len(_targets(open_source(tmp_path / "two"))) == 1
    assert "not read in the shards: 1 .tar (unpack them)" in caplog.text
    with pytest.raises(UserError, match=r"no image in it .*, but 1 \.tar \(unpack them\)"):
        find_images((), tmp_path / "two")


def test_texts_without_an_image_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _pair(tmp_path, "a.png")
    _pair(tmp_path, "b.tif")  # named itself, so its text is not
    for name in ("c.txt", "sub/d.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("alone")
    assert list(_targets(open_source(tmp_path))) == ["a.png"]
    assert "2 texts without an image are not used; the first: c.txt" in caplog.text
    assert "not read: 1 .tif" in caplog.text


def test_the_suffix_of_a_text_may_be_in_any_case(tmp_path: Path) -> None:
    for suffix in (".txt", ".TXT", ".Txt"):
        _pair(tmp_path, f"[{suffix[1:]}].png", text=suffix)
    names = ["[TXT].png", "[Txt].png", "[txt].png"]
    assert _targets(open_source(tmp_path)) == {name: f"caption of {name}" for name in names}


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", ["k.jpg", "k.txt"])
    with pytest.raises(UserError, match="there is no such directory: it is a file; give the folder it is in"):
        open_source(tmp_path / "a.tar")
    with pytest.raises(UserError, match="there is no such folder: it is a file; give it as `images`"):
        find_images((), tmp_path / "a.tar")


def test_links_to_folders_are_named_where_images_are_looked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _pair(tmp_path / "elsewhere", "a.png")
    _pair(tmp_path / "here", "b.png")
    (tmp_path / "here" / "more").symlink_to("../elsewhere")
    assert find_images((), tmp_path / "here") == [tmp_path / "here" / "b.png"]
    assert "1 links to folders, such as more" in caplog.text


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv", "captions.json"])
def test_a_table_beside_images_without_texts_is_named(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        _pair(tmp_path, f"{i}.png", number=i)
    (tmp_path / "2.txt").unlink()
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        UserError, match=rf"no text file 2\.txt.*1 {suffix_of(name)} \(list the samples in a manifest"
    ) as refused:
        open_source(tmp_path)
    assert "texts without an image" not in str(refused.value)
    open_source(tmp_path, on_bad_sample="skip")
    assert f"not read: 1 {suffix_of(name)}" in caplog.text
