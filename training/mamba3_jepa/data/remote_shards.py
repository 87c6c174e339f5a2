"""WebDataset shards that are fetched, each whole, when they are needed."""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.addresses import shown
from mamba3_jepa.count_report import CountReport
from mamba3_jepa.data.ahead import Ahead
from mamba3_jepa.data.remote import Listed, listed
from mamba3_jepa.data.sample import OnBadSample
from mamba3_jepa.data.shard_cache import GIGABYTE, ShardCache
from mamba3_jepa.data.shard_index import IndexHead, KeptIndex, index_path, make_index, read_head
from mamba3_jepa.data.shard_indexing import pool_of, processes_here
from mamba3_jepa.data.shard_sample import Shard
from mamba3_jepa.data.shards import ShardSource
from mamba3_jepa.data.windows import Window
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.folder_lock import is_first_process

logger = logging.getLogger(__name__)

_TOGETHER = 4  # shards fetched at once to make their indexes


@dataclass(frozen=True)
class RemoteShard:
    """A shard that is fetched when it is opened. name: its address, without what may be secret in it."""

    listed: Listed
    cache: ShardCache

    @property
    def name(self) -> str:
        return shown(self.listed.address)

    def open(self) -> BinaryIO:
        """Open the file in the cache, once it is there."""
        return self.cache.open(self.listed)


class RemoteShards(ShardSource):
    """The shards of an address, in the order of their names; see `ShardSource` for what they hold.

    Their indexes are always kept: to make one, its shard is fetched once.
    """

    def __init__(self, address: str, cache: ShardCache, index_dir: Path, on_bad_sample: OnBadSample = "error") -> None:
        """
        Raises:
            UserError: the address, a shard or a folder cannot be used; see `ShardSource` for the rest.
        """
        self.name = shown(address)
        self._begin(on_bad_sample)
        self._cache = cache
        shards = listed(address)
        heads = _heads(shards, cache, index_dir)
        self._fetched = [_known(shard, head) for shard, head in zip(shards, heads, strict=True)]
        self._shards = [shown(shard.address) for shard in shards]
        self.n_folders = len({os.path.dirname(name) for name in self._shards})
        for name, head in zip(self._shards, heads, strict=True):
            self._note(name, head.found)
        self._index = KeptIndex(heads, index_dir)
        self._demand_samples()
        self.fingerprint = self._index.fingerprint

    def _shard(self, number: int) -> Shard:
        return RemoteShard(self._fetched[number], self._cache)

    def file_state(self, indices: NDArray[np.int64]) -> str:
        """Changes when a shard of these samples does (see `sample.FileBacked`)."""
        digest = blake2b(digest_size=16)
        for shard in np.unique(self._shard_of(indices)).tolist():
            digest.update(f"{self._shards[shard]} {self._fetched[shard].state}\n".encode())
        return digest.hexdigest()

    def demand_room(self, window: int | None) -> None:
        """See `sample.Fetched`. At once are there two windows, and of what is validated on two shards."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        together = 2 if window is None else 2 * window + 2
        largest = sorted((shard.size or 0 for shard in self._fetched), reverse=True)[: together * processes]
        of = f" of each of {processes} processes" if processes > 1 else ""
        self._cache.demand_room(sum(largest), f"{min(together, len(self._fetched))} shards{of}")

    def ahead(self, windows: Iterator[Window]) -> Ahead:
        """See `sample.Fetched`."""
        return Ahead(self._cache, self._fetched, windows)

    def near(self, indices: NDArray[np.int64], at_most: int) -> NDArray[np.int64]:
        """See `sample.some_of`: from as few shards as it takes, the same on every machine."""
        shards = self._shard_of(indices)
        order = np.random.default_rng(0).permutation(np.unique(shards))
        counts = np.bincount(shards, minlength=len(self._shards))[order]
        enough = order[: int(np.searchsorted(np.cumsum(counts), at_most)) + 1]
        return indices[np.isin(shards, enough)][:at_most]


def _known(shard: Listed, head: IndexHead) -> Listed:
    """The shard as its index knows it."""
    size, _, tag = head.state.partition(" ")
    return Listed(shard.address, int(size), tag)


def _heads(shards: Sequence[Listed], cache: ShardCache, index_dir: Path) -> list[IndexHead]:
    names = [shown(shard.address) for shard in shards]
    heads = [
        read_head(index_path(index_dir, name), name, shard.state) for shard, name in zip(shards, names, strict=True)
    ]
    missing = [shard for shard, head in zip(shards, heads, strict=True) if head is None]
    if missing:
        _say(shards, missing, index_dir)
        _make(missing, cache, index_dir)
    return [head or _read_again(name, index_dir) for name, head in zip(names, heads, strict=True)]


def _read_again(name: str, index_dir: Path) -> IndexHead:
    head = read_head(index_path(index_dir, name), name, None)
    if head is None:
        raise UserError(f"{name}: its index in {index_dir} is gone again; do not change `index_dir` during a run")
    return head


def _say(shards: Sequence[Listed], missing: Sequence[Listed], index_dir: Path) -> None:
    if not is_first_process():
        return
    sizes = [shard.size for shard in missing]
    known = [size for size in sizes if size is not None]
    much = f", {sum(known) / GIGABYTE:,.2f} GB" if len(known) == len(sizes) else ", whose size is not known yet"
    logger.info(
        "%d of %d shards have no index in %s: each is fetched once%s", len(missing), len(shards), index_dir, much
    )
    stale = [shown(each.address) for each in missing if index_path(index_dir, shown(each.address)).exists()]
    if stale:
        logger.warning("%d shards have changed since their index was made; the first: %s", len(stale), stale[0])


def _make(missing: Sequence[Listed], cache: ShardCache, index_dir: Path) -> None:
    """Fetch each shard and make its index, several at once; whatever ends it, what is complete stays."""
    stop = threading.Event()
    order = random.Random(os.getpid()).sample(list(missing), len(missing))
    processes = processes_here() if len(missing) > 2 * _TOGETHER else 1
    with ExitStack() as stack:
        report = stack.enter_context(CountReport("index", len(missing), "shards", is_first_process()))
        pool = stack.enter_context(pool_of(processes)) if processes > 1 else None
        threads = stack.enter_context(ThreadPoolExecutor(_TOGETHER))
        tasks = [threads.submit(_make_one, shard, cache, index_dir, pool, stop) for shard in order]
        try:
            for done in as_completed(tasks):
                done.result()
                report.advance(1)
        finally:
            stop.set()
            threads.shutdown(wait=True, cancel_futures=True)


def _make_one(
    shard: Listed, cache: ShardCache, index_dir: Path, pool: ProcessPoolExecutor | None, stop: threading.Event
) -> None:
    name = shown(shard.address)
    index = index_path(index_dir, name)
    with cache.pinned(shard, wanted=lambda: not stop.is_set()) as (path, came):
        state = came.state or ""
        if read_head(index, name, state) is not None:
            return
        done = make_index(index, path, name, state) if pool is None else (
            pool.submit(make_index, index, path, name, state).result()
        )  # fmt: skip
    if not done:
        raise UserError(f"{name}: cannot read what was fetched of it in {cache.folder}")
