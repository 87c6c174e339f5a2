"""The kept index of shards: the same samples, split and digests as without it, little memory, and never a wrong one."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from mamba3_jepa.data.content import content_of
from mamba3_jepa.data.shard_index import SUFFIX, index_path
from mamba3_jepa.data.shards import ShardSource
from mamba3_jepa.data.sources import open_splits
from mamba3_jepa.errors import UserError

PIXELS = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PIXELS, "png")
PNG = PIXELS.getvalue()


def write_shard(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def samples(first: int, n: int, prefix: str = "") -> list[tuple[str, bytes]]:
    """Images that differ in their last bytes, every third with its caption in JSON, one of them not a good one."""
    members = []
    for i in range(first, first + n):
        members.append((f"{prefix}{i:05}.png", PNG + b"%d" % i))
        if i % 3:
            members.append((f"{prefix}{i:05}.txt", f"text {i} ü".encode()))
        else:
            members.append((f"{prefix}{i:05}.json", b"{" if i == 6 else b'{"captions": ["one %d", "other"]}' % i))
    return members


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three shards; the last has the keys of the first again."""
    for shard, first in enumerate((0, 20, 0)):
        write_shard(tmp_path / "data" / f"{shard}.tar", [*samples(first, 20), ("note.txt", b"alone")])
    return tmp_path / "data"


def assert_same(kept: ShardSource, plain: ShardSource) -> None:
    assert len(kept) == len(plain)
    assert kept.group_hashes().tolist() == plain.group_hashes().tolist()
    for i in range(len(plain)):
        assert kept.group(i) == plain.group(i)
        if plain.group(i).startswith("00006"):
            with pytest.raises(UserError, match="not valid JSON"):
                kept.sample(i)
            continue
        ours, theirs = kept.sample(i), plain.sample(i)
        assert (ours.target, ours.captions, ours.meta, ours.place) == (
            theirs.target, theirs.captions, theirs.meta, theirs.place,
        )  # fmt: skip
        assert ours.image is not None
        assert ours.image().size == (8, 8)
    assert kept.indices("captions").tolist() == plain.indices("captions").tolist()
    for name in ("n_left_out", "n_further", "texts_alone", "unread", "links", "damaged"):
        assert getattr(kept, name) == getattr(plain, name), name
    ours, theirs = (content_of(source, range(len(plain))) for source in (kept, plain))
    for name, values in vars(theirs).items():
        assert vars(ours)[name].tolist() == values.tolist(), name


def test_all_is_as_without_an_index(data: Path, tmp_path: Path) -> None:
    plain = ShardSource(data)
    made = ShardSource(data, index_dir=tmp_path / "index")
    files = sorted((tmp_path / "index").glob(f"*{SUFFIX}"))
    assert len(files) == 3
    times = [path.stat().st_mtime_ns for path in files]
    opened = ShardSource(data, index_dir=tmp_path / "index")
    assert [path.stat().st_mtime_ns for path in files] == times, "they are not made again"
    for kept in (made, opened, pickle.loads(pickle.dumps(opened))):
        assert_same(kept, plain)
    assert made.fingerprint == opened.fingerprint
    splits = [open_splits(data, image_size=32, val_fraction=0.3, index_dir=d) for d in (None, tmp_path / "index")]
    assert splits[0].train_indices.tolist() == splits[1].train_indices.tolist()
    assert splits[0].val_indices.tolist() == splits[1].val_indices.tolist()


def test_from_the_index_no_shard_is_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content_of(ShardSource(data), range(60)).texts.tolist()
    ShardSource(data, index_dir=tmp_path / "index")
    monkeypatch.setattr("mamba3_jepa.data.shard_scan.read_tar_index", lambda *_: pytest.fail("a shard is read"))
    monkeypatch.setattr("mamba3_jepa.data.shard_sample._read", lambda *_: pytest.fail("a sample is read"))
    source = ShardSource(data, index_dir=tmp_path / "index")
    assert content_of(source, range(60)).texts.tolist() == expected
    assert source.group(45) == f"00005, {len(PNG) + 1} bytes"


def test_a_stale_index_is_made_again(data: Path, tmp_path: Path) -> None:
    ShardSource(data, index_dir=tmp_path / "index")
    write_shard(data / "1.tar", samples(100, 5))
    assert_same_keys = [f"{i:05}" for i in range(100, 105)]
    source = ShardSource(data, index_dir=tmp_path / "index")
    assert [source.group(i) for i in range(20, 25)] == assert_same_keys
    os.utime(data / "1.tar", ns=(1, 1))
    index = index_path(tmp_path / "index", os.path.realpath(data / "1.tar"))
    before = index.stat().st_mtime_ns
    ShardSource(data, index_dir=tmp_path / "index")
    assert index.stat().st_mtime_ns != before


@pytest.mark.parametrize("damage", ["cut", "empty", "no header", "another shard's", "header", "pipe"])
def test_a_damaged_index_is_made_again(data: Path, tmp_path: Path, damage: str) -> None:
    ShardSource(data, index_dir=tmp_path / "index")
    index, other = (index_path(tmp_path / "index", os.path.realpath(data / f"{n}.tar")) for n in (1, 0))
    content = index.read_bytes()
    index.unlink()
    if damage == "pipe":
        os.mkfifo(index)
    else:
        index.write_bytes({
            "cut": content[:-1], "empty": b"", "no header": b"\xff" * 100, "another shard's": other.read_bytes(),
            "header": content.replace(b'"rows"', b'"rowz"'),
        }[damage])  # fmt: skip
    if damage == "pipe":
        with pytest.raises(UserError, match="a pipe, socket or device is no file"):
            ShardSource(data, index_dir=tmp_path / "index")
        return
    assert_same(ShardSource(data, index_dir=tmp_path / "index"), ShardSource(data))
    assert index.read_bytes() == content


@pytest.mark.parametrize("column", ["key", "rows", "keys"])
def test_damage_inside_an_index_is_noticed_where_it_is_read(data: Path, tmp_path: Path, column: str) -> None:
    from mamba3_jepa.files.safetensors_file import read_layout

    ShardSource(data, index_dir=tmp_path / "index")
    index = index_path(tmp_path / "index", os.path.realpath(data / "1.tar"))
    content = bytearray(index.read_bytes())
    content[read_layout(index).starts[column] + 3] ^= 1
    index.write_bytes(content)
    source = ShardSource(data, index_dir=tmp_path / "index")
    with pytest.raises(UserError, match=r"1\..*index\.safetensors: the index is damaged"):
        _ = [source.group(i) for i in range(20, 40)]


def test_an_index_that_is_replaced_or_gone_in_use_is_named(data: Path, tmp_path: Path) -> None:
    source = ShardSource(data, index_dir=tmp_path / "index")
    write_shard(data / "1.tar", samples(100, 20, prefix="other"))
    ShardSource(data, index_dir=tmp_path / "index")
    with pytest.raises(UserError, match="replaced while in use"):
        source.sample(25)
    index_path(tmp_path / "index", os.path.realpath(data / "1.tar")).unlink()
    with pytest.raises(UserError, match="cannot read the index: No such file or directory"):
        source.sample(25)


def test_bad_shards_are_refused_or_skipped_from_the_index_too(data: Path, tmp_path: Path) -> None:
    content = (data / "1.tar").read_bytes()
    (data / "1.tar").write_bytes(content[: len(content) // 2])
    write_shard(data / "2.tar", [*samples(50, 2), ("lonely.png", PNG)])
    for _ in range(2):
        with pytest.raises(UserError, match=r"1\.tar: the shard is truncated"):
            ShardSource(data, index_dir=tmp_path / "index")
        kept, plain = (ShardSource(data, "skip", index) for index in (tmp_path / "index", None))
        assert (kept.n_left_out, kept.damaged) == (plain.n_left_out, plain.damaged)
        assert (kept.damaged.count, len(kept)) == (1, len(plain))
    (data / "1.tar").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=r"2\.tar: lonely\.png has neither"):
            ShardSource(data, index_dir=tmp_path / "index")


def test_a_folder_that_cannot_be_written_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*file/.*choose another folder for the index with `index_dir`"):
        ShardSource(data, index_dir=tmp_path / "file")


def test_several_processes_make_it_and_two_runs_at_once(tmp_path: Path) -> None:
    for shard in range(24):
        write_shard(tmp_path / "data" / f"{shard:02}.tar", samples(10 * shard, 10))
    code = (
        "import sys; from mamba3_jepa.data import shard_indexing as s; s.processes_here = lambda: 2; "
        "from mamba3_jepa.data.shards import ShardSource; "
        f"print(ShardSource({str(tmp_path / 'data')!r}, 'skip', {str(tmp_path / 'index')!r}).fingerprint)"
    )
    script = tmp_path / "run.py"
    script.write_text(f"if __name__ == '__main__':\n    {code}\n")
    runs = [subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {run.communicate(timeout=300)[0] for run in runs}
    assert said == {ShardSource(tmp_path / "data", index_dir=tmp_path / "index").fingerprint + "\n"}
    assert len(list((tmp_path / "index").iterdir())) == 24, "nothing else is left"


def test_in_memory_a_sample_takes_little(tmp_path: Path) -> None:
    """At most 24 bytes with its place in the split; the keys, of 40 bytes, are not among them."""
    n, shards = 2000, 8
    for shard in range(shards):
        members = []
        for i in range(n):
            key = f"{shard:02}{i:05}{'k' * 33}"
            members += [(f"{key}.jpg", b""), (f"{key}.txt", b"t")]
        write_shard(tmp_path / "data" / f"{shard}.tar", members)
    ShardSource(tmp_path / "data", index_dir=tmp_path / "index")
    open_splits(tmp_path / "data", image_size=32, index_dir=tmp_path / "index")
    tracemalloc.start()
    try:
        splits = open_splits(tmp_path / "data", image_size=32, index_dir=tmp_path / "index")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(splits.train_indices) + len(splits.val_indices) == n * shards
    assert held <= 24 * n * shards
    assert peak <= 48 * n * shards
