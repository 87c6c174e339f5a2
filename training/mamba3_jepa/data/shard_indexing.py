"""Making the kept indexes of shards that have none, by several processes.

Any number of runs may do so in one folder at once: each takes the shards in an order of its own and passes over those
that have been made meanwhile, and a file is there whole or not at all.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import random
import signal
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from mamba3_jepa.count_report import CountReport
from mamba3_jepa.data.shard_index import IndexHead, index_path, make_index, read_head, state_of
from mamba3_jepa.data.shard_scan import ShardScan
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.folder_lock import is_first_process

logger = logging.getLogger(__name__)

_ALONE = 4  # so few shards for each process are done sooner than it starts


def kept_heads(root: str, shards: Sequence[str], index_dir: Path) -> list[IndexHead]:
    """The kept indexes of files below `root`, given by their paths there; what is missing, stale or damaged is made.

    Raises:
        UserError: an index cannot be written, or a shard not be read.
    """
    whole = os.path.realpath(root)
    names = [os.path.join(whole, path) for path in shards]
    heads = [read_head(index_path(index_dir, name), name, state_of(name)) for name in names]
    missing = [name for name, head in zip(names, heads, strict=True) if head is None]
    if not missing:
        return [head for head in heads if head is not None]
    _make(missing, index_dir)
    return [_read_again(name, index_dir) if head is None else head
            for name, head in zip(names, heads, strict=True)]  # fmt: skip


def _read_again(name: str, index_dir: Path) -> IndexHead:
    head = read_head(index_path(index_dir, name), name, state_of(name))
    if head is not None:
        return head
    scan = ShardScan.of(name)
    if not scan.is_given:
        raise UserError(f"{name}: {scan.found.damage}")
    raise UserError(f"{name}: the shard changes while its index is made; wait until it is complete")


def _make(names: list[str], index_dir: Path) -> None:
    processes = processes_here()
    if len(names) < _ALONE * processes:
        processes = 1
    if is_first_process():
        logger.info("making the index of %d shards in %s with %d processes", len(names), index_dir, processes)
    order = random.Random(os.getpid() ^ zlib.crc32(platform.node().encode())).sample(names, len(names))
    with CountReport("index", len(names), "shards", is_first_process()) as report:
        if processes == 1:
            for name in order:
                make_one(name, index_dir)
                report.advance(1)
            return
        with pool_of(processes) as pool:
            for done in as_completed([pool.submit(make_one, name, index_dir) for name in order]):
                done.result()
                report.advance(1)


def make_one(name: str, index_dir: Path) -> None:
    """Make the index of one file, unless another process has done so."""
    index, state = index_path(index_dir, name), state_of(name)
    if read_head(index, name, state) is None:
        make_index(index, Path(name), name, state)


def processes_here() -> int:
    """Cores for each of the training processes on this host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def pool_of(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that leave stop signals to this one and end with it; whatever ends the block, what has begun is
    finished, and nothing else begun.

    Raises:
        UserError: one of them is lost.
    """
    from mamba3_jepa.data.workers import signals_held_back

    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(os.getpid(),))
    try:
        with signals_held_back():
            for _ in range(processes):
                pool.submit(os.getpid)  # which starts them
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            "a process that makes indexes is lost: the machine may be out of memory; the same command goes on"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(parent: int) -> None:
    from mamba3_jepa.data.workers import obey_parent_only

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=obey_parent_only, args=(parent,), daemon=True).start()
