"""JSON files that are either whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mamba3_jepa.files.whole_file import whole_file


def write_json(path: Path, values: Any) -> None:
    """Write `values` through `whole_file`.

    Raises:
        UserError: the file cannot be written; what was at `path` is unchanged.
    """
    text = json.dumps(values, indent=2) + "\n"
    with whole_file(path) as file:
        file.write(text.encode())
