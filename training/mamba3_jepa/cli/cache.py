"""The commands `mamba3-jepa cache ...`: frozen outputs kept by the phases after the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import tyro

from mamba3_jepa.cli.commands import Commands
from mamba3_jepa.cli.output import say, show, table, write_out
from mamba3_jepa.settings.cache import CacheCleanSettings, CacheListSettings

if TYPE_CHECKING:
    from mamba3_jepa.training.frozen_cache import Entry

cache = Commands()


@cache.command(name="list")
def cache_list(settings: Annotated[CacheListSettings, tyro.conf.arg(name="")]) -> None:
    """What the frozen model's outputs take on the disk, of which data they are, and which are of use."""
    from mamba3_jepa.training.frozen_cache import entries

    found = entries(settings.cache_dir)
    if settings.json:
        write_out([entry.to_dict() for entry in found])
        return
    if found:
        rows = [
            (entry.key[:8], str(entry.about.get("source", "?")), _parts(entry), _bytes(entry.size),
             f"{entry.unused_days:.1f} days ago", _state(entry))
            for entry in found
        ]  # fmt: skip
        show(table(("key", "data", "parts", "size", "last used", "state"), rows))
    say(f"{settings.cache_dir}: {len(found)} keys, {_bytes(sum(entry.size for entry in found))}")


@cache.command(name="clean")
def cache_clean(settings: Annotated[CacheCleanSettings, tyro.conf.arg(name="")]) -> None:
    """Remove outputs that this installation cannot use, and temporary files; never what a run is using."""
    from mamba3_jepa.training.frozen_cache import clean

    removed = clean(
        settings.cache_dir, unused_days=settings.unused_days, everything=settings.all, only_say=settings.dry_run
    )
    size = sum(each.size for each in removed)
    if settings.json:
        told = [
            {"key": each.entry.key, "source": each.entry.about.get("source"), "what": each.what, "why": each.why,
             "bytes": each.size}
            for each in removed
        ]  # fmt: skip
        write_out({"dry_run": settings.dry_run, "bytes": size, "removed": told})
        return
    verb = "would be removed" if settings.dry_run else "removed"
    for each in removed:
        source = each.entry.about.get("source", "unknown data")
        say(f"{each.entry.key[:8]}, {source}: {each.what} {verb}, {_bytes(each.size)}: {each.why}")
    say(f"{settings.cache_dir}: {_bytes(size)} {verb}")


def _parts(entry: Entry) -> str:
    return f"{entry.parts} of {entry.about.get('parts', '?')}"


def _state(entry: Entry) -> str:
    states = ["in use"] if entry.in_use else []
    states += [f"{len(entry.temporary)} temporary files"] if entry.temporary else []
    states += [entry.outdated] if entry.outdated else []
    return ", ".join(states) or "of use"


def _bytes(size: int) -> str:
    """In the largest unit that gives at least 1."""
    number, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:,.0f} {units[0]}" if units[0] == "bytes" else f"{number:,.1f} {units[0]}"
