"""`metrics.jsonl`: one strict JSON object per line, written as the run goes, readable after any crash.

Every line has `step` (optimizer steps done, int), `epoch` (float or int) and `time` (Unix seconds, float);
the other keys are numbers such as `train/loss`. A number that is not finite is written as null, because JSON has no
NaN, and read as None from files that say NaN or Infinity all the same.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.json_file import json_line
from mamba3_jepa.files.whole_file import whole_file

_RESERVED = ("step", "epoch", "time")


class MetricsLog:
    """Appends to one `metrics.jsonl`; a line has left the process when `append` returns.

    Raises:
        UserError: from any method, when the file cannot be written (disk full, no permission) or, in
            `truncate_after`, when a line in it is malformed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, step: int, epoch: float, metrics: Mapping[str, float | int | None]) -> None:
        """Write one line. A key of `metrics` may not be `step`, `epoch` or `time` (ValueError)."""
        clash = [key for key in _RESERVED if key in metrics]
        if clash:
            raise ValueError(f"metrics may not be called {', '.join(clash)}")
        record = {"step": int(step), "epoch": epoch, "time": round(time.time(), 3), **metrics}
        line = json_line({key: _plain(value) for key, value in record.items()})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                _repair_tail(file)
                file.write(line)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the metrics: {error.strerror or error}") from error

    def truncate_after(self, step: int) -> None:
        """Drop every line after `step`, and a half-written last line; a missing file is fine.

        A run resumed at `step` writes those lines again. The file is replaced in one rename, so that it is
        always either the old one or the new one.
        """
        if not self.path.exists():
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        with whole_file(self.path) as file:
            file.writelines(map(json_line, kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a `metrics.jsonl`, in file order; null, and what is not finite, is None.

    A last line without its newline that is not whole JSON is what a killed run leaves behind: it is left out.

    Raises:
        UserError: the file is missing or unreadable, or any other line is not a JSON object with an integer
            `step`; names the file and the line number.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the metrics: {error.strerror or error}") from error
    *lines, tail = content.split(b"\n")
    records = [_parse(line, path, number) for number, line in enumerate(lines, start=1)]
    if tail and _is_whole(tail):
        records.append(_parse(tail, path, len(lines) + 1))
    return records


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:  # json's and unicode's decode errors are both ValueErrors
        raise UserError(f"{path}, line {number}: not a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
    if type(record.get("step")) is not int:
        raise UserError(f"{path}, line {number}: field 'step' must be an integer, found {record.get('step')!r}")
    return record


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _plain(value: Any) -> Any:
    """A plain Python number from any scalar (numpy's and torch's too)."""
    return value if value is None or isinstance(value, (str, bool, int)) else float(value)


def _repair_tail(file: Any) -> None:
    """Finish or drop a last line that has no newline, so that the next one starts a line of its own."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    if _is_whole(content[start:]):
        file.write(b"\n")
    else:
        file.truncate(start)
