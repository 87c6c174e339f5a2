"""One line of `manifest.jsonl`: three forms, checked strictly, and the paths in it.

    {"image": "images/001.jpg", "text": "captions/001.txt"}                  an image and its caption
    {"image": "images/002.jpg", "question": "What color?", "answer": "Blue"}  a question about an image
    {"image": null, "query": "Hello", "confused": false, "tool_used": null}  a request, with or without image;
                                                                  `answer` and `knowledge` are optional

`text` is a path to a text file if it is a single line that ends in ".txt" without blanks around it; anything
else is the text itself. `captions`, a list, stands in place of `text` where several describe one image, and
`answers`, a list, in place of `answer` or beside it where several people have answered; their entries are always
the texts themselves. Entries of `answers` may be empty, for people who gave none, but not all of them. A question
without answer needs `confused`. A line with `tool_used` is a demonstration: somebody needed that tool, so that
without `confused` it counts as confused, and `knowledge` is what the tool said. Paths are relative to the data
directory and may not leave it, neither by ".." nor through a symbolic link; those of Windows are read too
(`with_slashes`).
A line with a text or an answer may have `negatives`, texts that are wrong in its place: a list, or a list for each kind
of wrong. Every form may carry `id` and `meta`, any JSON, which is kept; evaluation alone looks at
them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from mamba3_jepa.config import LONGEST_TOOL_NAME
from mamba3_jepa.data.hard_negatives import EXPECTED, Negative, negatives_problem, read_negatives
from mamba3_jepa.data.images import BadSampleError, NotReadNowError
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.encodings import decoded
from mamba3_jepa.files.special import is_special

MAX_TEXT_BYTES = 1 << 20

_EXPECTED = {
    "image": "a path relative to the data directory, or null",
    "text": "a caption, or the path of a .txt file",
    "captions": "a list of captions",
    "question": "a text",
    "answer": "a text",
    "answers": "a list of texts",
    "query": "a text",
    "confused": "true, false or null",
    "tool_used": "the name of a tool, or null",
    "knowledge": "a text, a list of finite numbers, or null",
    "negatives": EXPECTED,
    "id": "any JSON",
    "meta": "any JSON",
}

# What other data sets call these fields, beside names that are spelled nearly alike.
_ELSEWHERE = {
    "image": ("img", "file", "file_name", "filename", "path", "url", "picture"),
    "text": ("caption", "txt", "alt", "description", "title", "sentence"),
    "answer": ("label", "response", "output", "target"),
    "query": ("prompt", "instruction", "input"),
}
_LISTS = ("captions", "answers")
_NEAR = {near: field for field, names in _ELSEWHERE.items() for near in names}
_WINDOWS_ROOT = re.compile(r"\\|[A-Za-z]:\\")  # a share or the root of a drive, a drive


class Record(BaseModel):
    """The fields of one manifest line. `parse_record` also checks which of them go together."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    image: str | None
    text: str | None = None
    captions: list[str] | None = None
    question: str | None = None
    answer: str | None = None
    answers: list[str] | None = None
    query: str | None = None
    confused: bool | None = None
    tool_used: str | None = None
    knowledge: str | list[float] | None = None
    negatives: list[str] | dict[str, list[str]] | None = None
    id: Any = None
    meta: Any = None

    @property
    def prompt(self) -> str | None:
        """The question or query; None for an image-text pair."""
        return self.question if self.question is not None else self.query

    @property
    def is_confused(self) -> bool | None:
        """`confused`; without it True where a tool was needed."""
        return True if self.confused is None and self.tool_used is not None else self.confused

    @property
    def wrong(self) -> list[Negative]:
        """What `negatives` holds, each text with its kind."""
        return read_negatives(self.negatives)

    @property
    def text_path(self) -> str | None:
        """The path in `text`, if that is what it holds."""
        text = self.text
        if text is None or not text.endswith(".txt") or text != text.strip() or len(text.splitlines()) != 1:
            return None
        return text

    @property
    def given_answer(self) -> str | None:
        """`answer`; without it the most frequent of `answers` that is not empty, of equally frequent ones the first."""
        if self.answer is not None or self.answers is None:
            return self.answer
        return Counter(text for answer in self.answers if (text := answer.strip())).most_common(1)[0][0]

    @property
    def group(self) -> str:
        """All questions about one image, however its path is written, belong together; so do equal requests without
        image."""
        return os.path.normpath(self.image) if self.image is not None else self.prompt or ""


def parse_record(line: bytes | str, where: str) -> Record:
    """Parses and checks one line.

    Args:
        line: the JSON object.
        where: file and line number, for messages: "data/manifest.jsonl line 3".

    Raises:
        UserError: names `where`, the field, what was expected and what was found.
    """
    try:
        record = Record.model_validate_json(line)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(_telling(error), line)}") from error
    problem = _field_problem(record) or _combination_problem(record) or _negatives_problem(record)
    if problem:
        raise UserError(f"{where}: {problem}")
    return record


def read_record(line: bytes, where: str) -> Record:
    """A line that `parse_record` has accepted before: parsed, but not checked again.

    Raises:
        UserError: it is not a record; the file has been changed since.
    """
    try:
        return Record.model_validate_json(line)
    except ValidationError as error:
        raise UserError(
            f"{where}: {_explain(_telling(error), line)}; the file has been changed since it was opened"
        ) from error


def with_slashes(record: Record, root: Path) -> Record:
    """The record with paths written on Windows (`images\\001.jpg`) as they are written here.

    A backslash may be part of a name here: a file that is there under the very name that was given is meant.
    """
    changed = {}
    for field, path in (("image", record.image), ("text", record.text_path)):
        if path is not None and "\\" in path and not (root / path).exists():
            changed[field] = path.replace("\\", "/")
    return record.model_copy(update=changed) if changed else record


def not_text(error: UnicodeDecodeError) -> str:
    """What is wrong with a text file that is not in the encoding it seems to be in."""
    name = error.encoding.upper().removesuffix("-LE").removesuffix("-BE")
    return f"not {name} text ({error.reason} at byte {error.start}); save it as UTF-8"


def _telling(error: ValidationError) -> ErrorDetails:
    """The error that leads to the cure: a field with a wrong name explains why another is missing."""
    errors = error.errors()
    return next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])


def _nearest(field: str) -> str | None:
    """The field that is meant by an unknown one, if that can be told."""
    name = field.strip().lower()
    near = difflib.get_close_matches(name, _EXPECTED, n=1)
    return _NEAR.get(name) or (near[0] if near else None)


def _explain(error: ErrorDetails, line: bytes | str) -> str:
    if error["type"] == "json_invalid":
        try:
            if isinstance(line, bytes):
                line.decode()
        except UnicodeDecodeError as undecodable:
            return not_text(undecodable)
        return f"not valid JSON ({error['msg']}); expected one JSON object on the line"
    if not error["loc"]:
        return f'expected a JSON object such as {{"image": ..., "text": ...}}, found {_found(error["input"])}'
    field = str(error["loc"][0])
    if error["type"] == "missing":
        return f'field "{field}" is missing: expected {_EXPECTED[field]}'
    if error["type"] == "extra_forbidden":
        near = _nearest(field)
        meant = f' (is "{near}" meant?)' if near else ""
        return f'unknown field "{field}"{meant}; the fields are {", ".join(_EXPECTED)}: correct or remove it'
    number = error["loc"][1] if field in _LISTS and len(error["loc"]) > 1 else None
    entry = f" entry {number + 1}" if isinstance(number, int) else ""
    expected = "a text" if entry else _EXPECTED[field]
    return f'field "{field}"{entry}: expected {expected}, found {_found(error["input"])}'


def _found(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _field_problem(record: Record) -> str | None:
    for field in ("image", "text", *_LISTS, "question", "answer", "query", "tool_used", "knowledge"):
        value = getattr(record, field)
        if value is not None and (not value or (isinstance(value, str) and not value.strip())):
            return f'field "{field}" is empty: expected {_EXPECTED[field]}'
    blank = [number for number, text in enumerate(record.captions or (), start=1) if not text.strip()]
    if blank:
        return f'field "captions" entry {blank[0]} is empty: expected a text'
    if record.answers is not None and not any(text.strip() for text in record.answers):
        return 'field "answers" has nothing but empty texts: expected one at least that is not'
    if record.tool_used is not None and len(record.tool_used) > LONGEST_TOOL_NAME:
        return f'field "tool_used": the name has {len(record.tool_used)} characters, at most {LONGEST_TOOL_NAME} may be'
    for field, path in (("image", record.image), ("text", record.text_path)):
        if path is not None and _WINDOWS_ROOT.match(path):
            return f'field "{field}": {path!r} is an absolute path of Windows; expected one from the data directory on'
        if path is not None and (leaves_directory(path) or leaves_directory(path.replace("\\", "/"))):
            return (
                f'field "{field}": the path {path!r} leaves the data directory; '
                "expected a path relative to it, without leading slash or '..' out of it"
            )
    return None


def _combination_problem(record: Record) -> str | None:
    heads = [name for name in ("text", "captions", "question", "query") if getattr(record, name) is not None]
    if not heads:
        return 'one of the fields "text", "captions", "question" or "query" is needed'
    if len(heads) > 1:
        return f'fields "{heads[0]}" and "{heads[1]}" exclude each other: write one line for each'
    if record.prompt is None:
        if record.image is None:
            return f'field "image": "{heads[0]}" describes an image, but this is null'
        for field in ("answer", "answers", "confused", "tool_used", "knowledge"):
            if getattr(record, field) is not None:
                return f'field "{field}" does not go with "{heads[0]}"; it belongs to "question" or "query"'
    if record.question is not None and record.given_answer is None and record.is_confused is None:
        return (
            'field "answer" is missing beside "question" (only a line with "confused" or "tool_used" may leave it out)'
        )
    return None


def _negatives_problem(record: Record) -> str | None:
    if record.negatives is None:
        return None
    one = [text for text in (record.text, record.answer) if text is not None]
    right = [*one, *(record.captions or ()), *(record.answers or ())]
    if not right:
        return 'field "negatives" does not go with a line that has neither a text nor an answer'
    return negatives_problem(record.wrong, right)


def leaves_directory(path: str) -> bool:
    """Whether a relative path, by its letters alone, points outside the directory it is relative to."""
    normal = os.path.normpath(path)
    return os.path.isabs(path) or normal == ".." or normal.startswith(f"..{os.sep}") or "\0" in path


def resolve_inside(root: Path, relative: str, where: str) -> Path:
    """The real path of `root`/`relative`; `root` must be resolved already.

    Raises:
        BadSampleError: symbolic links lead out of `root`.
    """
    path = Path(os.path.realpath(root / relative))
    if not path.is_relative_to(root):
        raise BadSampleError(
            f"{where}: {relative!r} leads out of the data directory to {path}; "
            "copy the files in, or give the real directory as `data_dir`"
        )
    return path


def read_text(path: Path, where: str) -> str:
    """The stripped text of a file in UTF-8, or in UTF-16 with its mark.

    Raises:
        BadSampleError: missing, unreadable, empty or longer than `MAX_TEXT_BYTES`; a `NotReadNowError` where the system
            gives no bytes.
    """
    if is_special(path):
        raise BadSampleError(f"{where}: {path} is no text file, but a pipe, socket or device")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise NotReadNowError(f"{where}: cannot read the text file {path}: {error.strerror}") from error
    return decode_text(content, f"{where}: {path}")


def decode_text(content: bytes, where: str) -> str:
    """The stripped text in these bytes, UTF-8 or marked UTF-16; `BadSampleError` if empty, too long, or neither."""
    if len(content) > MAX_TEXT_BYTES:
        raise BadSampleError(f"{where}: the text is longer than {MAX_TEXT_BYTES:,} bytes; is it really a caption?")
    try:
        text = decoded(content).strip()
    except UnicodeDecodeError as error:
        raise BadSampleError(f"{where}: {not_text(error)}") from error
    if not text:
        raise BadSampleError(f"{where}: the text is empty")
    return text
