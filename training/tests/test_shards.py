"""WebDataset shards: samples by position, against the archives as `tarfile` and webdataset write them."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.shards import ShardSource
from mamba3_jepa.data.sources import open_source, open_splits
from mamba3_jepa.data.tar_index import read_tar_index
from mamba3_jepa.errors import UserError

CAPTIONS = ["a red one", "ein größeres Bild", "日本語 🙂", "x" * 700]


def _encoded(number: int, kind: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (number * 20, 10, 10)).save(buffer, kind)
    return buffer.getvalue()


def _write_shard(path: Path, samples: list[dict[str, Any]]) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards as img2dataset writes them, and one of captions in JSON only."""
    for shard in range(2):
        samples = []
        for i in range(4):
            caption = CAPTIONS[i]
            meta = {"caption": "not this one", "status": "success", "width": 16}
            samples.append(
                {
                    "__key__": f"{shard:05d}{i:04d}",
                    "jpg": _encoded(4 * shard + i),
                    "txt": caption,
                    "json": json.dumps(meta).encode(),
                }
            )
        _write_shard(tmp_path / f"{shard:05d}.tar", samples)
    json_only = {"__key__": "only", "png": _encoded(9, "png"), "json": b'{"caption": " from json "}'}
    webp = {"__key__": "dir/webp", "webp": _encoded(10, "webp"), "txt": "webp", "cls": b"3"}
    _write_shard(tmp_path / "00002.tar", [json_only, webp, {"__key__": "stats", "json": b"{}"}])
    return tmp_path


def test_samples_in_order_with_their_captions_and_images(shards: Path) -> None:
    source = open_source(shards)
    assert isinstance(source, ShardSource)
    samples = [source.sample(i) for i in range(len(source))]
    assert [s.target for s in samples] == [*CAPTIONS, *CAPTIONS, "from json", "webp"]
    for number, sample in enumerate(samples):
        assert sample.image is not None
        expected = number * 20 if number < 8 else (number + 1) * 20
        assert abs(sample.image().getpixel((5, 5))[0] - expected) <= 6
        assert sample.question is None
    assert source.group(5) == "000010001"
    assert source.group(9) == "dir/webp"
    assert len(set(source.group_hashes().tolist())) == 10
    assert source.indices("caption").tolist() == list(range(10))
    assert source.indices("question").tolist() == []


def test_reading_is_random_access_and_pickles(shards: Path) -> None:
    source = ShardSource(shards)
    copy = pickle.loads(pickle.dumps(source))
    for i in np.random.default_rng(0).permutation(10).tolist():
        assert copy.sample(i).target == source.sample(i).target
    assert copy.fingerprint == source.fingerprint
    splits = open_splits(shards, image_size=32, val_fraction=0.4)
    assert sorted([*splits.train_indices, *splits.val_indices]) == list(range(10))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_agrees_with_tarfile(tmp_path: Path, tar_format: int) -> None:
    path = tmp_path / "a.tar"
    deep = "/".join(["folder" * 4] * 5)
    names = ["a.txt", f"{deep}/ok.jpg", "leer zeichen.txt", "empty.txt"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["größe.txt", "n" * 300 + ".txt", "日" * 80 + ".txt"]
    with tarfile.open(path, "w", format=tar_format) as archive:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = [5, 512, 513, 0][i % 4]
            info.mtime = 1.5 if tar_format == tarfile.PAX_FORMAT else 1
            archive.addfile(info, io.BytesIO(bytes([65 + i]) * info.size))
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    assert [tuple(member) for member in read_tar_index(path)] == expected
    assert [name for name, _, _ in expected] == names


def test_a_truncated_shard_names_itself(shards: Path) -> None:
    path = shards / "00001.tar"
    content = path.read_bytes()
    members = list(read_tar_index(path))
    boundary = members[5].offset - 512
    for cut in (len(content) // 2 + 7, boundary, members[-1].offset + 3, 100):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"00001\.tar: the shard is truncated"):
            ShardSource(shards)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"00001\.tar: the shard is truncated"):
        ShardSource(shards)


@pytest.mark.parametrize("damage", ["cut", "no tar", "empty"])
def test_of_a_damaged_shard_skip_uses_what_is_whole(
    shards: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = shards / "00001.tar"
    content, members = path.read_bytes(), list(read_tar_index(path))
    cut = content[: members[7].offset + 3]  # in the second of three members of the third sample
    path.write_bytes({"cut": cut, "no tar": b"<html>404", "empty": b""}[damage])
    with pytest.raises(UserError, match=r"00001\.tar: .*use what is whole in it with `on_bad_sample` skip"):
        open_source(shards)
    source = open_source(shards, on_bad_sample="skip")
    assert isinstance(source, ShardSource)
    kept = [source.group(i) for i in range(len(source))]
    whole = 2 if damage == "cut" else 0
    assert source.n_left_out == (damage == "cut")
    assert kept == [f"00000000{i}" for i in range(4)] + [f"00001000{i}" for i in range(whole)] + ["only", "dir/webp"]
    assert [source.sample(i).target for i in range(4, 4 + whole)] == CAPTIONS[:whole]
    assert "1 damaged shards, of which only what is whole is used; the first: " in caplog.text
    assert "00001.tar" in caplog.text
    for path in shards.glob("*.tar"):
        path.write_bytes(b"<html>404")
    with pytest.raises(UserError, match=r"no image with a caption in 3 \*\.tar shards, but .*00000\.tar: "):
        open_source(shards, on_bad_sample="skip")


def _member(name: str, content: bytes = b"", **header: Any) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in header.items():
        setattr(info, field, value)
    return info, io.BytesIO(content)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_in_a_shard_are_read_or_named(tmp_path: Path, tar_format: int, caplog: pytest.LogCaptureFixture) -> None:
    deep = "folder/" * 13  # with the name, longer than the header has room for
    long = deep if tar_format != tarfile.USTAR_FORMAT else ""
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as archive:
        for member in (
            _member(f"./{long}first.jpg", _encoded(3)), _member(f"./{long}first.txt", b"first"),
            _member("second.jpg", type=tarfile.LNKTYPE, linkname=f"{long}first.jpg"), _member("second.txt", b"second"),
            _member("third.jpg", type=tarfile.SYMTYPE, linkname="second.jpg"), _member("third.txt", b"third"),
            _member("fourth.jpg", type=tarfile.LNKTYPE, linkname="gone.jpg"), _member("fourth.txt", b"fourth"),
            _member("note", type=tarfile.SYMTYPE, linkname="second.jpg"), _member("pipe.jpg", type=tarfile.FIFOTYPE),
        ):  # fmt: skip
            archive.addfile(*member)
    source = open_source(tmp_path)
    assert isinstance(source, ShardSource)
    assert [source.sample(i).target for i in range(len(source))] == ["first", "second"]
    pixels = [np.asarray(sample.image()) for sample in map(source.sample, range(2)) if sample.image is not None]
    assert len(pixels) == 2
    assert (pixels[0] == pixels[1]).all()
    assert "3 images and texts in the shards are not read, as they are links or have holes" in caplog.text
    assert "2 texts without an image are not used; the first: " in caplog.text


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_file_with_holes_is_named_and_what_follows_it_found(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    if shutil.which("tar") is None:
        pytest.skip("needs GNU tar")
    with (tmp_path / "a.jpg").open("wb") as file:
        for k in range(60):  # more than the map in the header has room for
            file.seek(k * 65536)
            file.write(b"x" * 4096)
    (tmp_path / "b.jpg").write_bytes(_encoded(2))
    (tmp_path / "b.txt").write_text("behind it")
    (tmp_path / "data").mkdir()
    command = ["tar", "--sparse", f"--format={form}", "-cf", "data/a.tar", "a.jpg", "b.jpg", "b.txt"]
    if subprocess.run(command, cwd=tmp_path).returncode:
        pytest.skip("needs GNU tar")
    source = open_source(tmp_path / "data")
    assert source is not None
    with tarfile.open(tmp_path / "data" / "a.tar") as archive:
        has_holes = archive.getmembers()[0].issparse()
    assert [source.sample(i).target for i in range(len(source))] == ["behind it"]
    assert ("1 images and texts in the shards are not read" in caplog.text) == has_holes


def test_an_archive_of_the_first_format_is_read(tmp_path: Path) -> None:
    """It has no magic number; its checksum tells it."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for member in (_member("k.jpg", _encoded(1)), _member("k.txt", b"a text")):
            archive.addfile(*member)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    for member in list(read_tar_index(tmp_path / "a.tar")):
        header = slice(member.offset - 512, member.offset)
        block = content[header]
        block[148:156], block[257:512] = b" " * 8, bytes(255)
        block[148:156] = b"%06o\0 " % sum(block)
        content[header] = block
    (tmp_path / "a.tar").write_bytes(content)
    source = open_source(tmp_path)
    assert source is not None
    assert source.sample(0).target == "a text"
    content[5] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="not an uncompressed tar archive, or damaged, at byte 0"):
        open_source(tmp_path)


def test_what_is_no_tar_names_itself(shards: Path) -> None:
    path = shards / "00001.tar"
    content = path.read_bytes()
    path.write_bytes(b"\x1f\x8b" + content[2:600].replace(b"ustar", b"xxxxx") + content[600:])
    with pytest.raises(UserError, match=r"00001\.tar: not an uncompressed tar"):
        ShardSource(shards)
    path.write_bytes(content[:124] + b"zzzzzzzzzzz\0" + content[136:])
    with pytest.raises(UserError, match=r"00001\.tar: not an uncompressed tar"):
        ShardSource(shards)


@pytest.mark.parametrize("record", [b"0 path=x\n", b"1 path=x\n", b"path\n", b"11 size=-5\n", b"\xff\xfe 3"])
def test_a_damaged_extended_header_is_harmless(tmp_path: Path, record: bytes) -> None:
    """Neither an endless loop nor a wrong place: the size in the ordinary header is used."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        extended = tarfile.TarInfo("extended")
        extended.type, extended.size = b"x", len(record)
        archive.addfile(extended, io.BytesIO(record))
        member = tarfile.TarInfo("real.txt")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    assert [m.size for m in read_tar_index(tmp_path / "a.tar")] == [3]


def test_a_negative_size_is_damage(shards: Path) -> None:
    path = shards / "00001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:124] + b"-0000002000\0" + content[136:])
    with pytest.raises(UserError, match=r"00001\.tar: not an uncompressed tar"):
        ShardSource(shards)


def test_images_without_caption(shards: Path) -> None:
    _write_shard(shards / "00003.tar", [{"__key__": "lonely", "jpg": _encoded(1)}])
    with pytest.raises(UserError, match=r"00003\.tar: lonely\.jpg has neither lonely\.txt nor lonely\.json"):
        ShardSource(shards)
    source = ShardSource(shards, on_bad_sample="skip")
    assert (len(source), source.n_left_out) == (10, 1)


def test_no_sample_at_all(tmp_path: Path) -> None:
    _write_shard(tmp_path / "a.tar", [{"__key__": "a", "txt": "no image"}])
    with pytest.raises(UserError, match="no image with a caption in 1"):
        ShardSource(tmp_path)


def test_bad_members_name_shard_and_key(tmp_path: Path) -> None:
    _write_shard(
        tmp_path / "a.tar",
        [
            {"__key__": "k0", "jpg": b"junk", "txt": "x"},
            {"__key__": "k1", "jpg": _encoded(1), "txt": "  "},
            {"__key__": "k2", "jpg": _encoded(1), "json": b"{"},
            {"__key__": "k3", "jpg": _encoded(1), "json": b'{"caption": null}'},
        ],
    )
    source = ShardSource(tmp_path)
    image = source.sample(0).image
    assert image is not None
    with pytest.raises(BadSampleError, match=r"a\.tar: k0: not a readable image"):
        image()
    for i, message in (
        (1, "k1: the text is empty"),
        (2, r"k2\.json: not valid JSON"),
        (3, r"k3\.json: expected"),
    ):
        with pytest.raises(BadSampleError, match=message):
            source.sample(i)


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.write_text, (Path("/nonexistent/owned"), "x"))  # type: ignore[return-value]


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    sample = {"__key__": "a", "jpg": _encoded(1), "txt": "fine", "pyd": pickle.dumps(_Bomb())}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for extension in ("jpg", "txt", "pyd", "pkl"):
            content = sample["pyd"] if extension == "pkl" else sample[extension]
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(f"a.{extension}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    source = ShardSource(tmp_path)
    assert source.sample(0).target == "fine"
