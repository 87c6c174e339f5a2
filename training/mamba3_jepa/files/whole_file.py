"""Files and folders that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from mamba3_jepa.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open for writing, in binary, what is to be at `path`.

    It is written to a temporary file beside `path`, flushed to the disk, and renamed when the block ends well. Makes
    the folder if need be, and takes away again what it made for nothing. A symbolic link stays one: what it leads to is
    replaced. A pipe, a character device and the program's own output are written to directly, since a rename would put
    a file in their place.

    Raises:
        UserError: it cannot be written; what was at `path` is unchanged, and nothing is left beside it.
    """
    try:
        with _opened(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def demand_writable(*paths: Path | None) -> None:
    """Refuse at once what could not be written once it is computed; None stands for nothing.

    Raises:
        UserError: one is a folder, is to lie in what is none, or where nothing may be written.
    """
    for path in paths:
        if path is None:
            continue
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        found = _stat(path) if folder.is_dir() else None
        reason = None if found is None else _refusal(found)
        if not folder.is_dir():
            reason = f"{folder} is not a folder"
        elif found is None and not os.access(folder, os.W_OK | os.X_OK):
            reason = f"nothing may be written in {folder}"
        if reason is not None:
            raise UserError(f"cannot write {path}: {reason}")


def _refusal(found: os.stat_result) -> str | None:
    """Why what is there is not written to, if it is not."""
    if stat.S_ISREG(found.st_mode) or stat.S_ISCHR(found.st_mode) or stat.S_ISFIFO(found.st_mode):
        return None
    return "it is a folder" if stat.S_ISDIR(found.st_mode) else "what is there is not a file"


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    found = _stat(path)
    if found is not None and not stat.S_ISREG(found.st_mode):
        reason = _refusal(found)
        if reason is not None:
            raise OSError(reason)
        with open(path, "wb") as file:
            yield file
        return
    own = None if found is None else _own_output(found)
    if own is not None:
        with os.fdopen(os.dup(own), "wb") as file:  # opened anew it would have a position of its own
            yield cast(BinaryIO, file)
        return
    target = followed(path)
    # processes in two containers may have one number, and write into one folder
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with _folder_made(target.parent):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    _sync_directory(target.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which is at `path` when the block ends well, in one step.

    Until then it lies beside it; whatever ends the block otherwise, nothing of it is left.

    Raises:
        UserError: something is there already, other than an empty folder, or it cannot be written.
    """
    target = followed(path)
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} exists and is not empty: choose another `output`, or remove it")
        with (
            _folder_made(target.parent),
            tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary,
        ):
            folder = Path(temporary) / "data"
            folder.mkdir()
            yield folder
            os.replace(folder, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def _folder_made(folder: Path) -> Iterator[None]:
    """A folder that is there in the block; if that ends badly, the empty ones of those made for it are gone again."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in new:
            with contextlib.suppress(OSError):  # not made yet, or others have put something there
                each.rmdir()
        raise


def followed(path: Path) -> Path:
    """Where a symbolic link leads, whether there is something yet or not; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _stat(path: Path) -> os.stat_result | None:
    """What is at `path`, or where it leads; None where there is nothing yet."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _own_output(found: os.stat_result) -> int | None:
    """The descriptor, 1 or 2, whose output goes into this file, as /dev/stdout of `command > file` does."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it may be closed
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def _sync_directory(directory: Path) -> None:
    """Make a rename durable; a no-op where directories cannot be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
