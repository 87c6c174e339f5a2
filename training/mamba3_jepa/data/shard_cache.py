"""Shards that were fetched, in a folder of this machine: whole, within a limit, least recently used first out.

Any number of processes and runs may share the folder. What each must know of the others is in the file system: a lock
for each shard that is being fetched, so that one process alone does that; a lock on each file that is in use, so that
nobody removes it; and a file without content as large as what is on its way, so that all together keep to the limit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from mamba3_jepa.addresses import shown
from mamba3_jepa.data.pulse import beat
from mamba3_jepa.data.remote import FetchStoppedError, Listed, about, fetch
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.folder_lock import FolderInUseError, FolderLock, is_at

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

GIGABYTE = 10**9
ROOM_SECONDS = 600.0  # in which room is waited for, where others use all there is
FETCH_SECONDS = 7200.0  # in which another process's fetch is waited for
_LOOK_SECONDS = 0.1
_GROWS_BY = 64 << 20  # bytes, where the size of what comes is not known
_USED_EVERY = 60.0  # seconds between two notes that a file is in use


@dataclass(frozen=True)
class ShardCache:
    """The folder, and how many bytes all in it may have."""

    folder: Path
    limit: int

    def find(self, shard: Listed) -> Path | None:
        """The file of a shard whose size and tag are known, if it is there."""
        if shard.state is None:
            return None
        path = self._path(shard.address, shard.state)
        return path if path.exists() else None

    def get(self, shard: Listed, *, wanted: Callable[[], bool] = lambda: True) -> tuple[Path, Listed]:
        """The file of a shard, fetched if need be, and its size and tag; where they are known, it is of these.

        Args:
            wanted: asked again and again; once it says no, `FetchStoppedError` is raised.

        Raises:
            UserError: it cannot be fetched, has changed, or there is no room for it.
        """
        deadline = time.monotonic() + FETCH_SECONDS
        if shard.state is None:
            shard = about(shard.address)
        while True:
            if (path := self.find(shard)) is not None:
                self._used(path)
                return path, shard
            name = blake2b(shown(shard.address).encode(), digest_size=8).hexdigest()
            lock = FolderLock(self.folder, name=f".{name}.lock")
            try:
                lock.take()
            except FolderInUseError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{shown(shard.address)}: another process has been fetching it for {FETCH_SECONDS / 3600:g} "
                        "hours; stop that one"
                    ) from None
                self._wait(wanted)
                continue
            with lock:
                if self.find(shard) is None:
                    return self._fetched(shard, name, wanted)

    @contextmanager
    def pinned(self, shard: Listed, *, wanted: Callable[[], bool] = lambda: True) -> Iterator[tuple[Path, Listed]]:
        """As `get`; inside, the file is not removed."""
        while True:
            path, known = self.get(shard, wanted=wanted)
            with contextlib.ExitStack() as stack:
                try:
                    file = stack.enter_context(path.open("rb"))
                except FileNotFoundError:  # it was removed in between
                    continue
                if fcntl is not None:
                    with contextlib.suppress(OSError):  # a file system without locks
                        fcntl.flock(file, fcntl.LOCK_SH)
                if is_at(path, file.fileno()):
                    yield path, known
                    return

    def open(self, shard: Listed) -> BinaryIO:
        """The file of a shard, open; fetched if need be.

        Raises:
            UserError: see `get`.
        """
        while True:
            path, _ = self.get(shard)
            with contextlib.suppress(FileNotFoundError):  # it was removed in between
                return path.open("rb")

    def demand_room(self, needed: int, what: str) -> None:
        """Refuse a limit that is smaller than what must be there at once.

        Raises:
            UserError: names both numbers.
        """
        if needed > self.limit:
            raise UserError(
                f"`shard_cache_gb` {self.limit / GIGABYTE:g}: {what} take {needed / GIGABYTE:.3f} GB, which must be "
                "there at once: raise it, or lower `shard_window`"
            )

    def _fetched(self, shard: Listed, name: str, wanted: Callable[[], bool]) -> tuple[Path, Listed]:
        part, room = self.folder / f".{name}.part", self.folder / f".{name}.room"
        try:
            if shard.size is not None:
                self._reserve(room, shard.size, shard, wanted)

            def go_on(so_far: int) -> None:
                beat()
                if not wanted():
                    raise FetchStoppedError
                if so_far > (room.stat().st_size if room.exists() else 0):
                    self._reserve(room, max(so_far, min(so_far + _GROWS_BY, self.limit)), shard, wanted)

            came = fetch(shard.address, part, go_on)
            if shard.state is not None and came.state != shard.state:
                raise UserError(changed(shard, came))
            path = self._path(shard.address, came.state or "")
            with self._alone():
                os.replace(part, path)
                room.unlink(missing_ok=True)
            return path, came
        except OSError as error:
            raise UserError(f"cannot write into `shard_cache` {self.folder}: {error.strerror or error}") from error
        finally:
            for leftover in (part, room):
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)

    def _reserve(self, room: Path, size: int, shard: Listed, wanted: Callable[[], bool]) -> None:
        """Make room for `size` bytes, and hold it with the file `room`."""
        if size > self.limit:
            raise UserError(
                f"{shown(shard.address)} has {size / GIGABYTE:.3f} GB at least, more than the "
                f"{self.limit / GIGABYTE:g} of `shard_cache_gb`: raise it"
            )
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            with self._alone():
                others = self._make_room(room, size)
                if others + size <= self.limit:
                    with room.open("ab") as file:
                        file.truncate(size)
                    return
            if time.monotonic() > deadline:
                raise UserError(
                    f"{shown(shard.address)}: no room in `shard_cache` {self.folder}: of the {self.limit / GIGABYTE:g} "
                    f"GB of `shard_cache_gb`, {others / GIGABYTE:.3f} are in use, and it takes "
                    f"{size / GIGABYTE:.3f}: raise it, or lower `shard_window`"
                )
            self._wait(wanted)

    def _make_room(self, room: Path, size: int) -> int:
        """Remove what has not been used for longest until `size` bytes fit in beside what is left: how many that is."""
        entries: list[tuple[float, int, Path]] = []
        used = 0
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            if entry.name.endswith(".tar"):
                entries.append((status.st_mtime, status.st_size, path))
                used += status.st_size
            elif path != room and entry.name.endswith((".room", ".part")) and not self._left_behind(path):
                used += status.st_size if entry.name.endswith(".room") else 0
        for _, freed, path in sorted(entries):
            if used + size <= self.limit:
                break
            if _removed(path):
                used -= freed
        return used

    def _left_behind(self, path: Path) -> bool:
        """Remove what a process that is gone was fetching; whether it was that."""
        lock = FolderLock(self.folder, name=f"{path.name.rpartition('.')[0]}.lock")
        try:
            lock.take()
        except FolderInUseError:
            return False
        with lock:
            if not lock.is_certain:
                return False
            path.unlink(missing_ok=True)
        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """For the moment that it takes to count and to remove."""
        lock = FolderLock(self.folder, name=".counting.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into `shard_cache` {self.folder}: {error.strerror}") from error
        lock.take(ROOM_SECONDS)
        with lock:
            yield

    def _path(self, address: str, state: str) -> Path:
        name = shown(address)
        stem = os.path.basename(name).removesuffix(".tar")[:100]
        return self.folder / f"{stem}.{blake2b(f'{name} {state}'.encode(), digest_size=8).hexdigest()}.tar"

    def _used(self, path: Path) -> None:
        now = time.monotonic()
        if now - _noted.get(path, -_USED_EVERY) >= _USED_EVERY:
            _noted[path] = now
            with contextlib.suppress(OSError):
                os.utime(path)

    @staticmethod
    def _wait(wanted: Callable[[], bool]) -> None:
        beat()
        if not wanted():
            raise FetchStoppedError
        time.sleep(_LOOK_SECONDS)


def shard_cache(folder: Path | None, gigabytes: float) -> ShardCache | None:
    """The cache that the settings name; None where they name none."""
    return None if folder is None else ShardCache(folder, int(gigabytes * GIGABYTE))


_noted: dict[Path, float] = {}


def changed(known: Listed, now: Listed) -> str:
    """What to say of a shard that is no longer what its index says."""
    return (
        f"{shown(known.address)} has changed since its index was made: size and tag were {known.state}, and are "
        f"{now.state}. Put it back, or start a new run with another `index_dir`"
    )


def _removed(path: Path) -> bool:
    """Remove a file unless somebody uses it; whether it is gone."""
    try:
        with path.open("rb") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                except OSError:
                    pass  # a file system without locks
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", path, error.strerror)
        return False
    return True
