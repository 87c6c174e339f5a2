"""Shards elsewhere: fetched whole, whatever the server does; each sample once an epoch; within the cache's limit."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_server import ShardServer, serving
from test_continue import last, stop_after
from test_shard_index import samples, write_shard

from mamba3_jepa.addresses import expanded, is_address, shown
from mamba3_jepa.cli.main import main
from mamba3_jepa.config import preset
from mamba3_jepa.data import remote, shard_cache
from mamba3_jepa.data.content import content_of
from mamba3_jepa.data.loader import BatchLoader, build_loader
from mamba3_jepa.data.remote import Listed
from mamba3_jepa.data.remote_shards import RemoteShards
from mamba3_jepa.data.shard_cache import ShardCache
from mamba3_jepa.data.shards import ShardSource
from mamba3_jepa.data.sources import open_source, open_splits
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.data.windows import WindowPlan
from mamba3_jepa.errors import UserError

needs_http = pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="needs aiohttp")
N_SHARDS = 6


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(remote, "ATTEMPTS", 4)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Six shards of different sizes, all samples good."""
    for shard in range(N_SHARDS):
        n = 7 + 3 * (shard % 3)
        members = [each for each in samples(1000 * shard + 10, n) if each[1] != b"{"]
        write_shard(tmp_path / "here" / f"{shard:05}.tar", members)
    return tmp_path / "here"


@pytest.fixture
def server(here: Path) -> Iterator[ShardServer]:
    with serving() as server:
        server.files = {f"/{path.name}": path.read_bytes() for path in here.glob("*.tar")}
        yield server


def address(server: ShardServer) -> str:
    return f"{server.address}/{{00000..0000{N_SHARDS - 1}}}.tar"


def opened(server: ShardServer, tmp_path: Path, limit: int = 10**9, **options: str) -> RemoteShards:
    return RemoteShards(address(server), ShardCache(tmp_path / "cache", limit), tmp_path / "index", **options)


def test_addresses() -> None:
    assert expanded("https://h/{08..11}.tar?a=b") == [f"https://h/{n}.tar?a=b" for n in ("08", "09", "10", "11")]
    assert expanded("s3://b/{0..1}/{3..4}.tar") == [f"s3://b/{n}.tar" for n in ("0/3", "0/4", "1/3", "1/4")]
    assert shown("https://me:secret@host:8/a/{0..1}.tar?X-Sig=secret#x") == "https://host:8/a/{0..1}.tar"
    assert [is_address(each) for each in ("s3://b", "HTTPS://h/x.tar", "data", "./s3:/x", None)] == [
        True, True, False, False, False,
    ]  # fmt: skip
    for wrong in ("https://h/{5..1}.tar", "https://h/{a..b}.tar", "https://h/{1..2.tar", "https://h/{0..99999999}.tar"):
        with pytest.raises(UserError, match=r"^`data_dir` https://h/"):
            expanded(wrong)


@needs_http
def test_all_is_as_if_it_were_here(server: ShardServer, here: Path, tmp_path: Path) -> None:
    local, source = ShardSource(here, index_dir=tmp_path / "other"), opened(server, tmp_path)
    assert len(source) == len(local)
    for i in range(len(local)):
        ours, theirs = source.sample(i), local.sample(i)
        assert (ours.target, ours.captions, source.group(i)) == (theirs.target, theirs.captions, local.group(i))
        assert ours.image is not None
        assert ours.image().size == (8, 8)
    assert (
        content_of(source, range(len(local))).pictures.tolist()
        == content_of(local, range(len(local))).pictures.tolist()
    )
    assert source.fingerprint == local.fingerprint
    assert all(server.asked[path] == 1 for path in server.files), "each is fetched once"
    before = server.asked.copy()
    again = opened(server, tmp_path)
    assert server.asked == before, "opened from the index"
    assert again.fingerprint == source.fingerprint
    splits = [
        open_splits(place, image_size=32, val_fraction=0.3, index_dir=tmp_path / "index",
                    shard_cache=ShardCache(tmp_path / "cache", 10**9))
        for place in (str(here), address(server))
    ]  # fmt: skip
    assert splits[0].val_indices.tolist() == splits[1].val_indices.tolist()


@needs_http
@pytest.mark.parametrize("fault", ["drop", "cut", 429, 500, 503])
def test_what_passes_is_tried_again(
    server: ShardServer, tmp_path: Path, fault: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in server.files:
        server.faults[path] = [fault, fault]
    source = opened(server, tmp_path)
    cached = {path.name.partition(".")[0]: path.read_bytes() for path in (tmp_path / "cache").glob("*.tar")}
    assert cached == {path[1:6]: content for path, content in server.files.items()}, "whole"
    assert len(source) > 40
    assert "trying again in" in caplog.text
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")], "nothing is left"


@needs_http
def test_retry_after_is_kept_to(server: ShardServer, tmp_path: Path) -> None:
    server.retry_after = "1"
    server.faults["/00000.tar"] = [429]
    start = time.monotonic()
    remote.fetch(f"{server.address}/00000.tar", tmp_path / "x", lambda _: None)
    assert time.monotonic() - start >= 1


@needs_http
def test_what_stays_is_named_with_status_and_cure(server: ShardServer, tmp_path: Path) -> None:
    for status, cure in (
        (503, "goes on when it answers again"),
        (403, "give credentials"),
        (404, "correct `data_dir`"),
    ):
        server.faults["/00003.tar"] = [status] * 50
        server.asked.clear()
        with pytest.raises(UserError) as raised:
            remote.fetch(
                f"{server.address.replace('://', '://me:secret@')}/00003.tar?token=secret", tmp_path / "x", print
            )
        said = str(raised.value)
        assert said.startswith(f"{server.address}/00003.tar: cannot be fetched")
        assert ("it is not there" if status == 404 else f"the server answers {status}") in said
        assert cure in said
        assert "secret" not in said
        assert server.asked["/00003.tar"] == (4 if status == 503 else 1)
    server.faults.clear()
    del server.files["/00002.tar"]
    with pytest.raises(UserError, match=r"/00002\.tar: cannot be fetched: it is not there"):
        opened(server, tmp_path)


@needs_http
def test_a_server_that_is_not_there_or_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:9/a\.tar: cannot be fetched after 4 attempts: Client"):
        remote.fetch("http://127.0.0.1:9/a.tar", tmp_path / "x", lambda _: None)
    monkeypatch.setattr(remote, "READ_SECONDS", 0.3)
    remote._system.cache_clear()
    with serving() as server:
        server.files["/a.tar"], server.faults["/a.tar"] = b"x" * 100, ["hang"] * 9
        with pytest.raises(UserError, match=r"after 4 attempts: \w*Timeout"):
            remote.fetch(f"{server.address}/a.tar", tmp_path / "x", lambda _: None)
    remote._system.cache_clear()


@needs_http
def test_a_shard_that_changes_or_is_cut_off_is_named(server: ShardServer, here: Path, tmp_path: Path) -> None:
    source = opened(server, tmp_path)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    server.etags["/00001.tar"] = "another"
    first = int(source.shard_ends[0])
    source.sample(first - 1)
    with pytest.raises(UserError, match=r"/00001\.tar has changed since its index was made: .* another\. Put it back"):
        source.sample(first)
    server.files["/00004.tar"] = server.files["/00004.tar"][:3000]
    with pytest.raises(UserError, match=r"/00004\.tar: the shard is truncated"):
        RemoteShards(address(server), ShardCache(tmp_path / "c", 10**9), tmp_path / "i")
    skipping = RemoteShards(address(server), ShardCache(tmp_path / "c", 10**9), tmp_path / "i", "skip")
    assert skipping.damaged.count == 1
    assert len(skipping) < len(source)


@needs_http
def test_the_cache_keeps_to_its_limit_and_what_is_in_use(server: ShardServer, tmp_path: Path) -> None:
    sizes = {path: len(content) for path, content in server.files.items()}
    limit = 2 * max(sizes.values())
    cache = ShardCache(tmp_path / "cache", limit)
    shards = [Listed(f"{server.address}{path}") for path in sorted(sizes)]
    most = 0
    with cache.pinned(shards[0]) as (pinned, _):
        for shard in shards[1:] * 2:
            cache.get(shard)
            most = max(most, sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")))
            assert pinned.exists()
    assert most <= limit
    path, _ = cache.get(shards[1])
    os.utime(path, (1, 1))  # not used for longest
    other, _ = cache.get(shards[2])
    cache.get(shards[3])
    assert not path.exists()
    assert other.exists()
    too_small = ShardCache(tmp_path / "small", 1000)
    with pytest.raises(
        UserError, match=r"/00000\.tar has 0\.\d+ GB at least, more than the 1e-06 of `shard_cache_gb`: raise it"
    ):
        too_small.get(shards[0])


@needs_http
def test_no_room_beside_what_is_in_use_is_said(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "ROOM_SECONDS", 0.3)
    cache = ShardCache(tmp_path / "cache", int(1.5 * max(map(len, server.files.values()))))
    first, second = (Listed(f"{server.address}/0000{n}.tar") for n in (0, 1))
    with cache.pinned(first), pytest.raises(UserError, match=r"no room in `shard_cache` .*are in use, and it takes"):
        cache.get(second)
    cache.get(second)


@needs_http
def test_several_processes_fetch_a_shard_once(server: ShardServer, tmp_path: Path) -> None:
    cache, shard = ShardCache(tmp_path / "cache", 10**9), Listed(f"{server.address}/00000.tar")
    threads = [threading.Thread(target=cache.get, args=(shard,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked["/00000.tar"] == 1


@needs_http
def test_what_a_killed_fetch_left_is_taken_away(server: ShardServer, tmp_path: Path) -> None:
    limit = max(map(len, server.files.values())) + 100
    (tmp_path / "cache").mkdir()
    for name in (".0123.part", ".0123.room"):
        with (tmp_path / "cache" / name).open("wb") as file:
            file.truncate(limit)
    ShardCache(tmp_path / "cache", limit).get(Listed(f"{server.address}/00000.tar"))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".tar"]


CONFIG = preset("tiny")


def loader(source: ShardSource, tokenizer: TextTokenizer, **options: object) -> BatchLoader:
    given = {"shuffle": True, "seed": 3, "drop_last": False, "window": 2} | options
    return build_loader(source, np.arange(len(source)), tokenizer, CONFIG, 4, **given)


@needs_http
def test_an_epoch_has_each_sample_once_and_goes_on_in_the_middle(
    server: ShardServer, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    source = opened(server, tmp_path)
    seen: Counter[int] = Counter()
    for rank in (0, 1):
        options = {"rank": rank, "world_size": 2, "epoch": 1}
        whole = list(loader(source, tokenizer, **options))
        seen.update(i for batch in whole for i in batch.index.tolist())
        rest = list(loader(source, tokenizer, skip_batches=3, workers=rank, **options))
        assert len(rest) == len(whole) - 3
        for ours, theirs in zip(rest, whole[3:], strict=True):
            assert ours.index.tolist() == theirs.index.tolist()
            assert torch.equal(ours.pixels, theirs.pixels)
    assert seen == Counter(range(len(source)))


@needs_http
def test_shards_come_ahead_of_need_within_the_limit(
    server: ShardServer, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    sizes = sorted(map(len, server.files.values()))
    limit = sum(sizes[-4:])
    source = opened(server, tmp_path, limit=limit)
    with pytest.raises(UserError, match=r"`shard_cache_gb` .*: 6 shards take .* raise it, or lower `shard_window`"):
        loader(source, tokenizer, window=2)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    server.asked.clear()
    batches = iter(loader(source, tokenizer, window=1))
    first = next(batches)
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "cache").glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sum(server.asked.values()) == 2, "the shard in use and the next"
    n = len(first)
    for batch in batches:
        n += len(batch)
        there = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar"))
        assert there <= limit
    assert n == len(source)
    assert max(server.asked.values()) == 1


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_windows_of_any_division_hold_each_sample_once(world_size: int, drop_last: bool) -> None:
    counts = [5, 0, 1, 17, 4, 4, 9, 2]
    ends, total = np.cumsum(counts), sum(counts)
    indices = np.delete(np.arange(total), [0, 7, 20])
    seen: Counter[int] = Counter()
    lengths = set()
    for rank in range(world_size):
        plan = WindowPlan(indices, ends, 3, 2, 5, rank, world_size, drop_last=drop_last)
        plan.set_epoch(2)
        batches = list(plan)
        lengths.add(len(batches))
        assert len(plan) == len(batches)
        seen.update(i for batch in batches for i in batch)
        for skip in range(len(batches) + 1):
            plan.set_epoch(2, skip)
            assert list(plan) == batches[skip:]
            windows = list(plan.windows(ends))
            for number, batch in enumerate(batches[skip:], start=skip):
                needed = set(np.searchsorted(ends, batch, side="right").tolist())
                there = {s for w in windows if w.batches[0] <= number <= w.batches[1] for s in w.shards}
                assert needed <= there
        plan.set_epoch(3)
        assert list(plan) != batches or not batches[0]
    assert len(lengths) == 1
    assert max(seen.values()) == 1
    if drop_last:
        assert len(seen) == len(indices) // (3 * world_size) * 3 * world_size
    else:
        assert sorted(seen) == indices.tolist()


def test_windows_can_be_asked_of_shards_that_are_here(here: Path, tokenizer: TextTokenizer) -> None:
    source = ShardSource(here)
    order = [i for batch in loader(source, tokenizer) for i in batch.index.tolist()]
    assert sorted(order) == list(range(len(source)))
    shards = np.searchsorted(source.shard_ends, order, side="right")
    first = len(np.flatnonzero(np.isin(shards, np.unique(shards[:1]))))
    assert len(set(shards[: first + 1].tolist())) == 2, "two are mixed"


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mamba3_jepa.settings.training import Phase1Settings

    with pytest.raises(UserError, match=r"`data_dir` https://h/a\.tar: give `shard_cache` too"):
        Phase1Settings(data_dir="https://u:p@h/a.tar?x=secret")
    with pytest.raises(UserError, match=r"`data_dir` https://h/a\.tar: give `shard_cache` too"):
        open_source("https://h/a.tar")
    with pytest.raises(UserError, match="name the shards themselves"):
        remote.listed("https://h/folder/")
    with pytest.raises(UserError, match=r"`manifest` m\.jsonl: `data_dir` s3://b has shards"):
        Phase1Settings(data_dir="s3://b", manifest=Path("m.jsonl"), shard_cache=tmp_path)
    settings = Phase1Settings(data_dir="https://u:p@h/a.tar?x=secret", shard_cache=tmp_path, preset="tiny")
    assert settings.to_dict()["data_dir"] == "https://h/a.tar"
    assert settings.resolved().shard_window == 4
    assert Phase1Settings(data_dir=tmp_path, preset="tiny").resolved().shard_window is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    remote._system.cache_clear()
    for place, package in (
        ("s3://b/", "s3fs"),
        ("hf://datasets/a/b", "huggingface_hub"),
        ("https://h/a.tar", "aiohttp"),
    ):
        with pytest.raises(UserError, match=rf"needs the package {package}: pip install {package}"):
            remote._system(place.partition(":")[0])


def test_a_hub_is_listed_and_fetched_through_its_file_system(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system of the Hub is replaced by one in memory."""
    import fsspec

    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    for path in here.glob("*.tar"):
        memory.pipe(f"/datasets/a/b/{path.name}", path.read_bytes())
    memory.pipe("/datasets/a/b/.hidden/x.tar", b"x")
    memory.pipe("/datasets/a/b/README.md", b"x")
    monkeypatch.setattr(
        type(memory), "_strip_protocol", classmethod(lambda cls, p: "/" + re.sub(r"^\w+:/*", "", p).strip("/"))
    )
    monkeypatch.setattr(
        type(memory), "info", lambda self, p, **_: {"size": len(self.cat(p)), "blob_id": "b", "name": p, "type": "file"}
    )
    files = {f"/datasets/a/b/{path.name}" for path in here.glob("*.tar")} | {
        "/datasets/a/b/.hidden/x.tar",
        "/datasets/a/b/x",
    }
    memory.pipe("/datasets/a/b/x", b"x")
    monkeypatch.setattr(type(memory), "find", lambda self, p, detail: {each: self.info(each) for each in files})
    monkeypatch.setattr(remote, "_system", lambda scheme: memory)
    source = RemoteShards("hf://datasets/a/b", ShardCache(tmp_path / "cache", 10**9), tmp_path / "index")
    assert source._shards == [f"hf:///datasets/a/b/0000{n}.tar" for n in range(N_SHARDS)]
    assert len(source) == len(ShardSource(here))


@pytest.mark.skipif(
    importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None,
    reason="needs s3fs and moto[server]",
)
def test_a_bucket_is_listed_and_fetched(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from moto.server import ThreadedMotoServer

    web = ThreadedMotoServer(port=0, verbose=False)
    web.start()
    try:
        host, port = web.get_host_and_port()
        for name, value in (("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "key"),
                            ("AWS_SECRET_ACCESS_KEY", "very-secret"), ("AWS_DEFAULT_REGION", "us-east-1")):  # fmt: skip
            monkeypatch.setenv(name, value)
        remote._system.cache_clear()
        system = remote._system("s3")
        system.mkdir("bucket")
        for path in here.glob("*.tar"):
            system.put_file(str(path), f"bucket/set/{path.name}")
        caplog.set_level(logging.INFO)
        cache = ShardCache(tmp_path / "cache", 10**9)
        source = RemoteShards("s3://bucket/set/", cache, tmp_path / "index")
        total = sum(path.stat().st_size for path in here.glob("*.tar"))
        assert (
            f"6 of 6 shards have no index in {tmp_path / 'index'}: each is fetched once, {total / 1e9:.2f} GB"
            in caplog.text
        )
        local = ShardSource(here, index_dir=tmp_path / "other")
        assert source.fingerprint == local.fingerprint
        assert [source.sample(i).target for i in range(len(local))] == [
            local.sample(i).target for i in range(len(local))
        ]
        other = RemoteShards(f"s3://bucket/set/{{00000..0000{N_SHARDS - 1}}}.tar", cache, tmp_path / "index")
        assert other.fingerprint == source.fingerprint
        write_shard(tmp_path / "new.tar", samples(500, 4))
        system.put_file(str(tmp_path / "new.tar"), "bucket/set/00002.tar")
        caplog.clear()
        changed = RemoteShards("s3://bucket/set/", cache, tmp_path / "index")
        assert "1 shards have changed since their index was made; the first: s3://bucket/set/00002.tar" in caplog.text
        assert changed.fingerprint != source.fingerprint
        with pytest.raises(UserError, match=r"s3://bucket/none/: there are no \*\.tar shards"):
            RemoteShards("s3://bucket/none/", cache, tmp_path / "index")
        with pytest.raises(UserError, match=r"s3://bucket/x\.tar: cannot be fetched: "):
            RemoteShards("s3://bucket/x.tar", cache, tmp_path / "index")
        assert "very-secret" not in caplog.text
    finally:
        remote._system.cache_clear()
        web.stop()


TINY = ["--tiny", "--cpu", "--workers", "0", "--log-every", "1", "--epochs", "2", "--batch-size", "4"]
TINY += ["--val-samples", "8", "--val-fraction", "0.1"]


@needs_http
def test_a_run_goes_on_bit_for_bit_in_the_middle_of_a_shard(
    server: ShardServer, here: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    place = f"{address(server).replace('://', '://me:secret@')}?token=secret"
    data = ["--data-dir", place, "--shard-cache", str(tmp_path / "cache"), "--shard-window", "2"]
    assert main(["train-jepa", *TINY, *data, "--output-dir", str(tmp_path / "whole")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(8, patch)  # of 15 steps an epoch
        assert main(["train-jepa", *TINY, *data, "--output-dir", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    assert main(["train-jepa", *TINY, *data, "--output-dir", str(tmp_path / "run"), "--resume"]) == 0
    ours = last(tmp_path / "run")
    for name, value in last(tmp_path / "whole").items():
        assert torch.equal(ours[name], value), name
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("run/*.js*"))
    assert b"secret" not in kept
    assert "secret" not in "".join(capfd.readouterr())
    again = ["train-jepa", *TINY, "--data-dir", str(here), "--output-dir", str(tmp_path / "run"), "--resume"]
    assert main(again) == 2
    assert "the settings differ (--shard-window 2 -> None)" in capfd.readouterr().err
    assert main([*again, "--shard-window", "2"]) == 0, "of a copy that is here now"


def test_a_run_goes_on_with_a_kept_index(here: Path, tmp_path: Path) -> None:
    data = ["train-jepa", *TINY, "--data-dir", str(here)]
    assert main([*data, "--output-dir", str(tmp_path / "whole")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(8, patch)
        assert main([*data, "--output-dir", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    index = ["--index-dir", str(tmp_path / "index")]
    assert main([*data, *index, "--output-dir", str(tmp_path / "run"), "--resume"]) == 0
    ours = last(tmp_path / "run")
    for name, value in last(tmp_path / "whole").items():
        assert torch.equal(ours[name], value), name
