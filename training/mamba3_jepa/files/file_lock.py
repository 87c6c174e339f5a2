"""Files that one command at a time reads, changes and writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.folder_lock import FolderInUseError, FolderLock
from mamba3_jepa.files.whole_file import followed

PATIENCE = 10.0  # seconds; a change takes far less


@contextmanager
def alone_with(path: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Inside, no other command, of either half of the project, changes the file; who comes second waits.

    The lock lies beside it, as `.NAME.lock`, and is gone afterwards.

    Raises:
        UserError: another still changes it after `patience` seconds.
    """
    target = followed(path)
    lock = FolderLock(target.parent, name=f".{target.name}.lock")
    try:
        lock.take(patience)
    except FolderInUseError:
        raise UserError(f"{path}: another command has been changing it for {patience:g} s; try again") from None
    with lock:
        yield
