"""Parquet as the Hugging Face hub stores images: a column of structs {bytes, path}, and columns of texts beside it."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba3_jepa.data.published.manifest import LeftOut, Line, Written, write_manifest
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.json_file import finite_or_null
from mamba3_jepa.files.whole_file import whole_folder

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ROWS = 16  # in memory at once, with their images
_BUFFER = 1 << 20  # bytes of a column that are read at once; without it a whole row group is, which may be the file
_AUTO, _NONE = "auto", "none"
# What columns are called, the likeliest name first.
_NAMES = {
    "image": ("image", "img", "jpg", "png"),
    "question": ("question", "query"),
    "answer": ("answer", "multiple_choice_answer"),
    "answers": ("answers",),
    "captions": ("captions", "caption", "sentences", "text", "label"),
}
_IDS = ("question_id", "questionId", "id", "img_id", "image_id")
_TEXTS = ("answer", "raw", "caption", "text")  # what holds the text where an entry is a struct
_LISTS = ("List", "LargeList", "Sequence")  # features that hold another
_SPLIT = re.compile(r"([A-Za-z]\w*)-\d+-of-\d+")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns; "auto": the first that has a usual name, if there is one; "none": there is none."""

    image: str = _AUTO
    question: str = _AUTO
    answer: str = _AUTO
    answers: str = _AUTO
    captions: str = _AUTO


def prepare_parquet(files: Sequence[Path], output_dir: str | Path, columns: Columns) -> Written:
    """Write the images of some files, each once, and a manifest of their rows, as a data directory.

    A row with a question and an answer, or several, is a question, and one with a list of questions and as many answers
    a line for each; of any other the caption, or the list of captions, is taken. A class label is the name that the
    file's metadata gives it. Columns beside these go into `meta`. What is in memory is a few rows and, of each
    column, the page of the file that they are in: of images as pyarrow writes them mostly 1,024. All that is written
    appears at once.

    Raises:
        UserError: pyarrow is not installed, a file is not of this kind, a column is missing, or `output_dir` holds
            something already or cannot be written.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("the package pyarrow, which reads parquet, is not installed: pip install pyarrow")
    left_out, output = LeftOut(), Path(output_dir)
    with whole_folder(output) as build:
        lines = (line for path in files for line in _Table(path, columns, left_out).lines(build))
        written = write_manifest(build / "manifest.jsonl", build, lines, left_out)
    return Written(path=output / "manifest.jsonl", lines=written.lines, images=written.images, left_out=left_out)


class _Table:
    """One parquet file."""

    def __init__(self, path: Path, columns: Columns, left_out: LeftOut) -> None:
        self._path, self._left_out = path, left_out
        self._file = _opened(path)
        schema = self._file.schema_arrow
        self._labels = _label_names(schema)
        self._columns: dict[str, str | None] = {}
        for each in fields(columns):
            self._columns[each.name] = self._choose(each.name, getattr(columns, each.name), schema)
        there = f"there are {', '.join(schema.names)}"
        if self._columns["image"] is None:
            raise UserError(f"{path}: no column of images; {there}: name it, `image_column`")
        if not any(self._columns[kind] for kind in ("answer", "answers", "captions")):
            raise UserError(
                f"{path}: no column of answers or captions; {there}: name it, `answer_column`, `answers_column` or "
                "`captions_column`"
            )
        others = [each for each in schema if each.name not in self._columns.values()]
        self._others = [each.name for each in others if not _holds_bytes(each.type)]
        for name in sorted({each.name for each in others} - set(self._others)):
            left_out.add("columns of bytes beside the images", f"{path}: {name}")
        split = _SPLIT.match(path.name)
        self._split = {} if split is None else {"split": split[1]}

    def _choose(self, kind: str, named: str, schema: pa.Schema) -> str | None:
        if named == _NONE:
            return None
        if named == _AUTO:
            return next((name for name in _NAMES[kind] if name in schema.names), None)
        if named not in schema.names:
            raise UserError(f"{self._path}: `{kind}_column` {named}: the columns are {', '.join(schema.names)}")
        return named

    def lines(self, folder: Path) -> Iterator[Line]:
        """A line for each row that has an image and a text; the image is written below `folder`."""
        wanted = list(dict.fromkeys(name for name in (*self._columns.values(), *self._others) if name is not None))
        for number, row in enumerate(self._rows(wanted), start=1):
            where = f"{self._path}: row {number}"
            said = list(self._all_said(row, where))
            if said and (image := self._write_image(row, folder, where)):
                rest = self._rest(row)
                for each in said:
                    meta = rest["meta"] | each.get("meta", {})
                    own = {"id": _own_id(rest["id"], meta.get("question_number", 1))} if "id" in rest else {}
                    yield Line(where, (image,), each | rest | own | {"meta": meta})

    def _rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        import pyarrow as pa

        try:
            for batch in self._file.iter_batches(batch_size=_ROWS, columns=columns):
                yield from batch.to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{self._path}: damaged: {error}") from error

    def _all_said(self, row: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
        """What a row says of its image: of a list of questions each with its own answers, and its number in `meta`."""
        question = self._columns["question"]
        asked = None if question is None else row[question]
        if not isinstance(asked, list) or len(asked) < 2:
            if (said := self._said(row)) is not None:
                yield said
            else:
                self._left_out.add("rows without an answer or a caption", where)
            return
        names = [name for kind in ("answer", "answers") if (name := self._columns[kind]) and row[name] is not None]
        if not names or not all(isinstance(row[name], list) and len(row[name]) == len(asked) for name in names):
            columns = ", ".join(filter(None, (self._columns[kind] for kind in ("question", "answer", "answers"))))
            self._left_out.add(f"rows with several questions and not as many answers ({columns})", where)
            return
        for i in range(len(asked)):
            said = self._said(row | {name: row[name][i] for name in (question, *names) if name is not None})
            if said is not None and "question" in said:
                yield said | {"meta": {"question_number": i + 1}}
            else:
                self._left_out.add("questions of several in a row without a text or an answer", where)

    def _said(self, row: dict[str, Any]) -> dict[str, Any] | None:
        question, answer, answers, captions = (
            self._texts(row, kind) for kind in ("question", "answer", "answers", "captions")
        )
        if len(question) == 1 and (answer or answers):
            given: dict[str, Any] = {"question": question[0]}
            if len(answer) == 1:
                given["answer"] = answer[0]
            several = answers or answer  # empty ones too, which count where people's answers are compared
            return given | ({"answers": several} if len(several) > 1 or not answer else {})
        return {"captions": captions} if captions and not question else None

    def _texts(self, row: dict[str, Any], kind: str) -> list[str]:
        """The texts of one column, of however many levels; none where there is no such column, or nothing in it.

        Of answers empty ones are among them.
        """
        name = self._columns[kind]
        found = [] if name is None else list(_flat(row[name], self._labels.get(name)))
        if kind in ("answer", "answers") and any(found):
            return found
        return [text for text in found if text]

    def _rest(self, row: dict[str, Any]) -> dict[str, Any]:
        """`id` and `meta`."""
        known = {name: row[name] for name in self._others if row[name] is not None}
        meta = self._split | finite_or_null(json.loads(json.dumps(known, default=str)))
        number = next((meta[name] for name in _IDS if name in meta), None)
        return {"meta": meta} | ({} if number is None else {"id": number})

    def _write_image(self, row: dict[str, Any], folder: Path, where: str) -> str | None:
        """The path of the row's image from `folder` on; None where there is none."""
        cell = row[self._columns["image"] or ""]
        if isinstance(cell, list):
            if len(cell) > 1:
                self._left_out.add("rows with several images", where)
                return None
            cell = cell[0] if cell else None
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if content is not None and not isinstance(content, bytes):
            raise UserError(
                f"{where}: column {self._columns['image']}: expected the bytes of an image, or a struct with them, "
                f"found {type(content).__name__}"
            )
        if not content:
            self._left_out.add("rows without the bytes of their image", where)
            return None
        suffix = _suffix(content)
        if suffix is None:
            self._left_out.add("rows whose image is none of JPEG, PNG, WebP, GIF and BMP", where)
            return None
        name = blake2b(content, digest_size=16).hexdigest()
        relative = f"images/{name[:2]}/{name}{suffix}"
        path = folder / relative
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return relative


def _own_id(number: Any, place: int) -> Any:
    """The row's number, or, of a list of numbers, that of its question `place`, from 1."""
    return number[place - 1] if isinstance(number, list) and len(number) >= place else number


def _opened(path: Path) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror or error}") from error
    except (ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a parquet file: {error}") from error


def _label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of the classes of each column of class labels."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {name: _class_names(each) for name, each in features.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    return {name: names for name, names in named.items() if names is not None}


def _class_names(feature: Any) -> list[str] | None:
    """Of a feature of class labels, or of lists of them, as any version of `datasets` notes it; None of another."""
    while (isinstance(feature, dict) and feature.get("_type") in _LISTS) or isinstance(feature, list):
        feature = feature.get("feature") if isinstance(feature, dict) else next(iter(feature), None)
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return [str(name) for name in names] if isinstance(names, list) else None


def _flat(value: Any, labels: list[str] | None) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, bool):
        yield "yes" if value else "no"
    elif isinstance(value, int):
        if labels is None:
            yield str(value)
        elif 0 <= value < len(labels):  # -1 is a label that is kept secret
            yield labels[value]
    elif isinstance(value, float | Decimal):
        if math.isfinite(value):
            yield str(int(value) if value == int(value) else _as_it_was(value))
    elif isinstance(value, dict):
        yield from _flat(next((value[name] for name in _TEXTS if name in value), None), labels)
    elif isinstance(value, list):
        for each in value:
            yield from _flat(each, labels)


def _as_it_was(value: float | Decimal) -> object:
    """A number of 16 or 32 bits with the digits it was written with: 0.1, and not 0.10000000149011612."""
    shorter = (kind(value) for kind in (np.float16, np.float32)) if isinstance(value, float) else ()
    with np.errstate(over="ignore"):
        return next((number for number in shorter if float(number) == value), value)


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _suffix(content: bytes) -> str | None:
    """By how the image begins."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    starts = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp"}
    return next((suffix for start, suffix in starts.items() if content.startswith(start)), None)
