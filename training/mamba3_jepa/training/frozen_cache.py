"""The folder of all frozen outputs, looked at from outside: what is in it, and what of that is of no use any more."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.folder_lock import LOCK_NAME, FolderInUseError, FolderLock
from mamba3_jepa.training.frozen_key import made_by
from mamba3_jepa.training.frozen_store import ABOUT, PART_PATTERN

_KEY = re.compile(r"[0-9a-f]{32}")
_TEMPORARY = ".*.tmp"
_DAY = 86_400.0
_SURELY_UNUSED = 1.0  # days; where a file system has no locks, what was used later than that counts as in use


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The frozen outputs of one key.

    Attributes:
        about: what about.json says; empty where there is none.
        parts, size: how many parts there are, and the bytes of all files; temporary: of writers that were killed, or
            are at work.
        unused_days: since they were computed or used.
        in_use: a run reads or writes them at this moment.
        outdated: why this installation would not use them; None if it would.
    """

    folder: Path
    about: dict[str, Any]
    parts: int
    size: int
    temporary: tuple[Path, ...]
    unused_days: float
    in_use: bool
    outdated: str | None

    @property
    def key(self) -> str:
        """The name of the folder."""
        return self.folder.name

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "key": self.key,
            "source": self.about.get("source"),
            "samples": self.about.get("samples"),
            "parts": self.parts,
            "all_parts": self.about.get("parts"),
            "bytes": self.size,
            "temporary_files": len(self.temporary),
            "unused_days": self.unused_days,
            "in_use": self.in_use,
            "outdated": self.outdated,
        }


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What was removed, or would be: `what` of the entry, for which reason, and its bytes."""

    entry: Entry
    what: str
    why: str
    size: int


def entries(cache_dir: Path) -> list[Entry]:
    """All frozen outputs in a folder, what was used last first; other things in it are passed over.

    Raises:
        UserError: there is no such folder, or it cannot be read.
    """
    if not cache_dir.is_dir():
        raise UserError(f"`cache_dir` {cache_dir}: there is no such directory")
    try:
        folders = [path for path in cache_dir.iterdir() if _KEY.fullmatch(path.name) and _is_folder(path)]
        found = [_entry(folder) for folder in folders]
    except OSError as error:
        raise UserError(f"`cache_dir` {cache_dir}: cannot be read: {error.strerror}") from error
    return sorted(found, key=lambda entry: entry.unused_days)


def clean(
    cache_dir: Path, *, unused_days: float | None = None, everything: bool = False, only_say: bool = False
) -> list[Removed]:
    """Remove what no run of this installation can use, and files that killed writers left; nothing that is in use.

    Args:
        unused_days: remove what has not been used for so long as well.
        everything: remove all that is not in use.
        only_say: remove nothing.

    Raises:
        UserError: there is no such folder, or something in it cannot be removed.
    """
    done = []
    for entry in entries(cache_dir):
        why = entry.outdated
        if unused_days is not None and entry.unused_days >= unused_days:
            why = f"not used for {entry.unused_days:.0f} days"
        if everything:
            why = "everything was asked for"
        if entry.in_use or (why is None and not entry.temporary):
            continue
        files = list(entry.temporary) if why is None else _own_files(entry.folder)
        size = sum(map(_size, files))
        if only_say or _remove(entry.folder, files):
            what = "temporary files" if why is None else "frozen outputs"
            done.append(Removed(entry=entry, what=what, why=why or "their writers are gone", size=size))
    return done


def _entry(folder: Path) -> Entry:
    files, about = _own_files(folder), _about(folder)
    last_used = max((path.stat().st_mtime for path in files if path.name != LOCK_NAME), default=folder.stat().st_mtime)
    unused_days = max(0.0, (time.time() - last_used) / _DAY)
    return Entry(
        folder=folder,
        about=about,
        parts=len(list(folder.glob(PART_PATTERN))),
        size=sum(map(_size, files)),
        temporary=tuple(folder.glob(_TEMPORARY)),
        unused_days=unused_days,
        in_use=_is_in_use(folder, unused_days),
        outdated=_why_outdated(about.get("made_by")),
    )


def _about(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return about if isinstance(about, dict) else {}
    return {}


def _why_outdated(theirs: Any) -> str | None:
    """What differs between that which made them and what this installation has."""
    if not isinstance(theirs, dict):
        return "made by an earlier version"
    changed = [f"{name} {theirs.get(name)}" for name, value in made_by().items() if theirs.get(name) != value]
    return f"made by {', '.join(changed)}" if changed else None


def _is_in_use(folder: Path, unused_days: float) -> bool:
    lock = FolderLock(folder)
    try:
        with lock:
            return not lock.is_certain and unused_days < _SURELY_UNUSED
    except FolderInUseError:
        return True


def _own_files(folder: Path) -> list[Path]:
    """Files in the folder of a key that this program has written."""
    patterns = (PART_PATTERN, ABOUT, _TEMPORARY)
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def _remove(folder: Path, files: list[Path]) -> bool:
    """Remove `files`, and the folder if nothing else is in it; False if a run has taken it up in between."""
    with contextlib.suppress(FolderInUseError), FolderLock(folder):
        try:
            for path in files:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot remove {path}: {error.strerror}") from error
        if all(path.name == LOCK_NAME for path in folder.iterdir()):
            (folder / LOCK_NAME).unlink(missing_ok=True)
            folder.rmdir()
        return True
    return False


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
