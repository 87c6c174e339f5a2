"""Where data lies, as all commands that read it have it."""

from __future__ import annotations

from pathlib import Path

from mamba3_jepa.addresses import is_address, shown_place
from mamba3_jepa.errors import UserError


def demand_data_dir(manifest: Path | None, data_dir: str | Path | None, shard_cache: Path | None) -> None:
    """Refuse a manifest without the directory that its images lie in, and shards elsewhere without a folder for them.

    Raises:
        UserError: names both settings.
    """
    if manifest is not None and data_dir is None:
        raise UserError(f"`manifest` {manifest}: its images lie in `data_dir`; give that too")
    place = shown_place(data_dir)
    if manifest is not None and is_address(data_dir):
        raise UserError(f"`manifest` {manifest}: `data_dir` {place} has shards; a manifest's images must lie here")
    if is_address(data_dir) and shard_cache is None:
        raise UserError(f"`data_dir` {place}: give `shard_cache` too, a folder to fetch the shards into")
