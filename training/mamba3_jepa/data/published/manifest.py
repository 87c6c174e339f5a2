"""The manifest that a published data set becomes, its images left where they lie."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mamba3_jepa.data.records import leaves_directory, parse_record, resolve_inside
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.data.survey import Tally
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.json_file import json_line
from mamba3_jepa.files.whole_file import whole_file


class Line(NamedTuple):
    """What is to be a line of a manifest.

    where: file and place it comes from, for messages; images: the names under which its image may lie in the data
    directory, the usual one first; none for a line without image; fields: the line's others.
    """

    where: str
    images: tuple[str, ...]
    fields: dict[str, Any]


@dataclass
class LeftOut:
    """What of the published files is not in the manifest, by the reason, filled while they are read."""

    tallies: dict[str, Tally] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """One more; `reason` says what they are, in the plural."""
        self.tallies.setdefault(reason, Tally()).add(example)

    def sentences(self) -> list[str]:
        """One for each reason."""
        return [f"{tally.count:,} {reason}, the first: {tally.first}" for reason, tally in self.tallies.items()]


@dataclass(frozen=True, kw_only=True)
class Written:
    """lines: of the manifest at `path`; images: different ones in them; left_out: what else there was."""

    path: Path
    lines: int
    images: int
    left_out: LeftOut


def write_manifest(
    output: str | Path, data_dir: str | Path, lines: Iterable[Line], left_out: LeftOut, dataset: str | None = None
) -> Written:
    """Write the lines whose images are there; of the others the number is kept in `left_out`.

    Each is checked as when it is read. The file appears when it is complete.

    Args:
        dataset: its name, for the `meta` of each line, by which evaluation knows the measure.

    Raises:
        UserError: `output` is there already or cannot be written, `data_dir` is no directory, a line is malformed, an
            image is a link out of `data_dir`, or no line is left.
    """
    path, root = Path(output), Path(data_dir)
    if os.path.lexists(path) and (path.is_file() or path.is_dir()):
        raise UserError(f"{path} exists: choose another `output`, or remove it")
    if not root.is_dir():
        raise UserError(f"`data_dir` {root}: there is no such directory; give the one the images are in")
    real_root = Path(os.path.realpath(root))
    n_lines, seen, missing = 0, set[int](), set[int]()
    first_missing = ""
    with whole_file(path) as file:
        for line in lines:
            image = _find(root, line)
            if image is not None:
                resolve_inside(real_root, image, line.where)  # reading refuses it too
            elif line.images:
                left_out.add("lines without their image", line.where)
                missing.add(stable_hash(line.images[0]))
                first_missing = first_missing or " nor ".join(str(root / name) for name in line.images)
                continue
            fields = {"image": image} | line.fields
            if dataset is not None:
                fields["meta"] = {"dataset": dataset} | fields.get("meta", {})
            content = json_line(fields)
            parse_record(content, line.where)
            file.write(content)
            n_lines += 1
            if image is not None:
                seen.add(stable_hash(image))
        if missing:
            why = f"there is no {first_missing}"
            if not n_lines:
                raise UserError(f"`data_dir` {root}: none of {len(missing):,} images is there; {why}")
            left_out.tallies["lines without their image"].first += f" ({len(missing):,} images; {why})"
        if not n_lines:
            raise UserError(f"nothing to write: {'; '.join(left_out.sentences()) or 'the files hold no entries'}")
    return Written(path=path, lines=n_lines, images=len(seen), left_out=left_out)


def _find(root: Path, line: Line) -> str | None:
    for name in line.images:
        if leaves_directory(name):
            raise UserError(f"{line.where}: the image {name!r} is no path inside `data_dir`")
        if os.path.isfile(root / name):
            return name
    return None
