"""Folders that one command at a time writes into.

The lock is the operating system's, on a small file in the folder, so that it is gone with the process that holds it,
however that ends; the file may stay, which means nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Concatenate, ParamSpec, TypeVar

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.whole_file import followed

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_PAUSE = 0.02  # seconds between two looks at a folder that is held

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


class FolderInUseError(UserError):
    """Another process holds the folder."""


class FolderLock:
    """Context manager: inside, no other process holds the folder. It is made if need be, and removed if it stays empty.

    Where the file system has no locks, or the folder cannot be written into, it goes on without one; in the first case
    with a warning.
    """

    def __init__(self, folder: Path, *, shared: bool = False, name: str = LOCK_NAME) -> None:
        """
        Args:
            shared: others may hold it too, if they share it: nobody removes what several read.
            name: of the lock's file; those with other names know nothing of each other.

        Attributes:
            is_certain: it is held, and others know it, which they cannot where there are no locks.
        """
        self.folder, self._shared, self._name = followed(folder), shared, name
        self._descriptor: int | None = None
        self.is_certain = False
        self._made: list[Path] = []  # folders, the deepest last

    def __enter__(self) -> FolderLock:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()

    def take(self, patience: float = 0.0) -> None:
        """Hold the folder from now on.

        Args:
            patience: seconds in which another process may let go of it.

        Raises:
            FolderInUseError: names the folder, and who holds it.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                return self._take()
            except FolderInUseError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_PAUSE)

    def _take(self) -> None:
        while fcntl is not None and self._descriptor is None:
            try:
                descriptor = self._opened()
            except OSError:  # who writes there will say why it cannot be done
                return
            is_locked = self._is_locked(descriptor)
            if is_locked and not is_at(self.folder / self._name, descriptor):
                os.close(descriptor)  # its holder removed it in between
                continue
            self._descriptor, self.is_certain = descriptor, is_locked

    def release(self) -> None:
        """Let others have the folder."""
        descriptor, self._descriptor, self.is_certain = self._descriptor, None, False
        if descriptor is not None and fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unless others share it
                if is_at(self.folder / self._name, descriptor):
                    (self.folder / self._name).unlink()
            os.close(descriptor)
        while self._made:
            with contextlib.suppress(OSError):  # there is something in it
                self._made.pop().rmdir()

    def _opened(self) -> int:
        while True:
            missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            for path in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    self._made.append(path)
            try:
                return os.open(self.folder / self._name, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                if self.folder.exists():  # as in /proc, where nothing can be made
                    raise

    def _is_locked(self, descriptor: int) -> bool:
        assert fcntl is not None
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise FolderInUseError(
                f"{self.folder} is in use by {holder}: two at a time would mix their files. Wait for it, stop it, or "
                "choose another folder"
            ) from None
        except OSError as error:
            logger.warning(
                "%s: this file system has no locks (%s): nothing will keep another command from writing there too",
                self.folder, error.strerror,
            )  # fmt: skip
            return False
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with contextlib.suppress(OSError):  # a full disk
            os.truncate(descriptor, 0)  # of a holder that was killed
            os.pwrite(descriptor, b"" if self._shared else f"{holder}\n".encode(), 0)
        return True


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the file that is open is the one that is there."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def alone_in(setting: str) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """Decorator of commands: only one process at a time writes into the folder that their settings call `setting`.

    Of the processes of one run, the first one holds it.
    """

    def decorated(command: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        @functools.wraps(command)
        def alone(settings: S, /, *arguments: P.args, **options: P.kwargs) -> T:
            if not is_first_process():
                return command(settings, *arguments, **options)
            lock = FolderLock(getattr(settings, setting))
            try:
                lock.take()
            except FolderInUseError as error:
                raise FolderInUseError(f"`{setting}` {error}") from None
            with lock:
                return command(settings, *arguments, **options)

        return alone

    return decorated


def keep_lock(moved: Path, folder: Path) -> None:
    """Give the lock back to `folder`, a new one, after it went along with the old one to `moved`.

    Raises:
        FolderInUseError: another process was faster.
    """
    old, new = moved / LOCK_NAME, folder / LOCK_NAME
    if not old.exists():
        return
    try:
        os.link(old, new)  # a rename would replace another's
        old.unlink()
    except FileExistsError:
        raise FolderInUseError(f"{folder} is in use by another process, which has just begun") from None
    except OSError:  # a file system without links
        old.rename(new)


def is_first_process() -> bool:
    """As torchrun, accelerate and the usual kinds of MPI say it, before the processes know each other."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"
