"""One sample of a WebDataset shard, read from where it lies. Nothing is unpickled: only image and caption are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeGuard

from PIL import Image

from mamba3_jepa.data.hard_negatives import EXPECTED, Negative, is_negatives, negatives_problem, read_negatives
from mamba3_jepa.data.images import BadSampleError, NotReadNowError, load_image
from mamba3_jepa.data.records import decode_text
from mamba3_jepa.data.sample import Place, Sample
from mamba3_jepa.errors import UserError


class Row(NamedTuple):
    """Where the bytes of a sample's image and caption lie in its shard, and whether the caption is in a JSON object."""

    image_offset: int
    image_size: int
    text_offset: int
    text_size: int
    is_json: bool


class Shard(Protocol):
    """A shard whose bytes can be read. name: for messages."""

    @property
    def name(self) -> str: ...

    def open(self) -> BinaryIO:
        """Raises OSError, or UserError where it says more."""
        ...


class LocalShard(NamedTuple):
    """A file. name: its path."""

    name: str

    def open(self) -> BinaryIO:
        """Open it."""
        return open(self.name, "rb")


def read_sample(shard: Shard, key: str, row: Row) -> Sample:
    """Read the caption of a sample; the image is read later.

    Raises:
        BadSampleError: the caption is not what it must be; a `NotReadNowError` where the system does not give it.
        UserError: the shard has become shorter.
    """
    where = f"{shard.name}: {key}"
    text = _read(shard, row.text_offset, row.text_size, where)
    fields = _json_object(text, where) if row.is_json else {}
    captions = _captions(fields, where) if row.is_json else (decode_text(text, where),)
    is_file = isinstance(shard, LocalShard)
    return Sample(
        image=partial(_load_member, shard, row.image_offset, row.image_size, where),
        place=Place(shard.name, row.image_offset, row.image_size) if is_file else None,
        target=captions[0],
        captions=captions if len(captions) > 1 else (),
        negatives=_negatives(fields, captions, where),
        meta={"origin": where},
    )


def _read(shard: Shard, offset: int, size: int, where: str) -> bytes:
    try:
        with shard.open() as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise NotReadNowError(f"{where}: cannot read the shard: {error.strerror}") from error
    if len(content) != size:
        raise UserError(f"{where}: the shard became shorter while in use; do not change data during a run")
    return content


def _load_member(shard: Shard, offset: int, size: int, where: str) -> Image.Image:
    return load_image(_read(shard, offset, size, where), name=where)


def _json_object(content: bytes, where: str) -> dict[str, Any]:
    """Its fields; none where it is another value."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"{where}.json: not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _captions(fields: dict[str, Any], where: str) -> tuple[str, ...]:
    """The texts of the list `captions`, or the one text `caption`."""
    found = fields.get("captions")
    if not _is_texts(found):  # it is not there, or is something else there
        found = [fields.get("caption")]
    if not _is_texts(found):
        raise BadSampleError(f'{where}.json: expected an object with a text "caption", or a list of texts "captions"')
    return tuple(decode_text(text.encode("utf-8", "surrogatepass"), f"{where}.json") for text in found)


def _negatives(fields: dict[str, Any], right: Sequence[str], where: str) -> list[Negative]:
    """Of the field `negatives`, as in a manifest."""
    given = fields.get("negatives")
    if not is_negatives(given):
        raise BadSampleError(f'{where}.json: field "negatives": expected {EXPECTED}')
    negatives = read_negatives(given)
    if problem := negatives_problem(negatives, right):
        raise BadSampleError(f"{where}.json: {problem}")
    return negatives


def _is_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
