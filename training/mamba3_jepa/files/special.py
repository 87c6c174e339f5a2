"""Files that are no files: to open one may wait for ever."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def is_special(path: str | Path) -> bool:
    """Whether a pipe, socket or device is there; not for a folder, or where there is nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
