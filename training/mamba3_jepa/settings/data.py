"""Where data lies, as all commands that read it have it."""

from __future__ import annotations

from pathlib import Path

from mamba3_jepa.errors import UserError


def demand_data_dir(manifest: Path | None, data_dir: Path | None) -> None:
    """Refuse a manifest without the directory that its images lie in.

    Raises:
        UserError: names both settings.
    """
    if manifest is not None and data_dir is None:
        raise UserError(f"`manifest` {manifest}: its images lie in `data_dir`; give that too")
