"""WebDataset shards as img2dataset writes them: tars of `KEY.jpg` (.png, .webp) and `KEY.txt` or `KEY.json`.

Samples are read by position, so that shuffling, the hash split and exact resume are those of every other
source. The index is made here because the alternatives do not fit: webdataset streams (and its random-access
module, `wids`, is gone since 1.0), while `tarfile` spends 65 microseconds a member on it, ten minutes for
CC3M; reading only names and sizes takes 7, one minute. Nothing is ever unpickled: of each sample only the
image and its caption are read.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamba3_jepa.data.images import IMAGE_SUFFIXES, BadSampleError, load_image
from mamba3_jepa.data.records import decode_text
from mamba3_jepa.data.sample import Kind, OnBadSample, Sample, state_of_files
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.errors import UserError

_BLOCK = 512
_IMAGE_EXTENSIONS = {suffix[1:] for suffix in IMAGE_SUFFIXES}
_TEXT_EXTENSIONS = ("txt", "json")  # the first one present is used


class Member(NamedTuple):
    """One regular file in a tar archive: its name, where its bytes start, and how many they are."""

    name: str
    offset: int
    size: int

    @property
    def extension(self) -> str:
        """Everything after the first dot of the file's name, in lower case."""
        return os.path.basename(self.name).partition(".")[2].lower()


class ShardSource:
    """Image-text pairs in every `*.tar` of a directory, in the order of the file names and of their members.

    Opening reads the headers of all shards. The group of a sample is "SHARD/KEY".
    """

    synthetic = False

    def __init__(self, data_dir: str | Path, on_bad_sample: OnBadSample = "error") -> None:
        """
        Raises:
            UserError: a shard is truncated or no tar, an image has no text (with "skip" it is left out and
                counted), or there is no sample at all.
        """
        self.name = str(data_dir)
        self.n_left_out = 0
        self._shards = sorted(str(path) for path in Path(data_dir).glob("*.tar"))
        places, keys = array("q"), []
        digest = blake2b(digest_size=16)
        for shard, path in enumerate(self._shards):
            for key, image, text in _image_members(path):
                if text is not None:
                    row = (shard, image.offset, image.size, text.offset, text.size, text.extension == "json")
                    places.extend(row)
                    keys.append(key.encode("utf-8", "surrogateescape"))
                    digest.update(repr((row, keys[-1])).encode())
                elif on_bad_sample == "skip":
                    self.n_left_out += 1
                else:
                    raise UserError(
                        f"{path}: {image.name} has neither {key}.txt nor {key}.json beside it; "
                        "rewrite the shard, or leave such images out with `on_bad_sample` skip"
                    )
        if not keys:
            raise UserError(f"{self.name}: no image with a caption in {len(self._shards)} *.tar shards")
        self._keys = np.array(keys)  # one fixed-width array: far smaller than as many objects
        self._places = np.array(places, dtype=np.int64).reshape(-1, 6)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def sample(self, i: int) -> Sample:
        shard, image_offset, image_size, text_offset, text_size, is_json = map(int, self._places[i])
        path = self._shards[shard]
        where = f"{path}: {self._key(i)}"
        text = _read(path, text_offset, text_size, where)
        target = _json_caption(text, where) if is_json else decode_text(text, where)
        return Sample(
            image=partial(_load_member, path, image_offset, image_size, where),
            target=target,
            meta={"origin": where},
        )

    def group(self, i: int) -> str:
        return f"{os.path.basename(self._shards[self._places[i, 0]])}/{self._key(i)}"

    def group_hashes(self) -> NDArray[np.uint64]:
        groups = (stable_hash(self.group(i)) for i in range(len(self)))
        return np.fromiter(groups, dtype=np.uint64, count=len(self))

    def indices(self, kind: Kind) -> NDArray[np.int64]:
        return np.arange(len(self) if kind in ("all", "target", "caption") else 0)

    def file_state(self, indices: NDArray[np.int64]) -> str:
        """Changes when a shard of these samples does (see `sample.FileBacked`)."""
        return state_of_files(self._shards[shard] for shard in np.unique(self._places[indices, 0]))

    def _key(self, i: int) -> str:
        return bytes(self._keys[i]).decode("utf-8", "surrogateescape")


def _image_members(path: str) -> Iterator[tuple[str, Member, Member | None]]:
    """Key, image and caption of every image in one shard; the key ends at the first dot of the name."""
    samples: dict[str, dict[str, Member]] = {}
    for member in read_tar_index(path):
        folder, _, name = member.name.rpartition("/")
        stem = name.partition(".")[0]
        samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[member.extension] = member
    for key, files in samples.items():
        image = next((files[extension] for extension in files if extension in _IMAGE_EXTENSIONS), None)
        if image is not None:
            yield key, image, next((files[e] for e in _TEXT_EXTENSIONS if e in files), None)


def read_tar_index(path: str | Path) -> Iterator[Member]:
    """The regular files of an uncompressed tar archive (ustar, pax or GNU), without reading their contents.

    Raises:
        UserError: not such an archive, damaged, or cut off (the end mark is missing).
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            yield from _members(file, size, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read the shard: {error.strerror}") from error


def _members(file: BinaryIO, file_size: int, path: str) -> Iterator[Member]:
    position = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        file.seek(position)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise UserError(
                f"{path}: the shard is truncated: it stops at byte {file_size:,} without tar's end mark; "
                "download or write it again"
            )
        if not header.strip(b"\0"):
            return
        size = _number(header[124:136], path, position)
        if pax.get("size", "").isdigit():
            size = int(pax["size"])
        if header[257:262] != b"ustar":
            raise UserError(f"{path}: not an uncompressed tar archive, or damaged, at byte {position:,}")
        start = position + _BLOCK
        position = start + -(-size // _BLOCK) * _BLOCK
        if start + size > file_size:
            raise UserError(
                f"{path}: the shard is truncated: a member at byte {start:,} needs {size:,} bytes and the "
                f"file has {file_size:,}; download or write it again"
            )
        kind = header[156:157]
        if kind == b"x":
            pax = _pax_fields(file.read(size))
        elif kind == b"L":
            long_name = _text(file.read(size))
        elif kind != b"g":
            if kind in (b"0", b"\0"):
                yield Member(pax.get("path") or long_name or _name(header), start, size)
            pax, long_name = {}, None


def _number(field: bytes, path: str, position: int) -> int:
    """Octal text, or big-endian binary behind a byte 0x80 where the number is too large for that."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ") or b"0"
    if digits.strip(b"01234567"):  # `int` alone would also take signs, and a negative size never ends
        raise UserError(f"{path}: not an uncompressed tar archive, or damaged, at byte {position:,}")
    return int(digits, 8)


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), header[345:500]
    is_posix = header[257:263] == b"ustar\0"  # GNU keeps other things in the place of the prefix
    return f"{_text(prefix)}/{name}" if is_posix and prefix[0] else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_fields(content: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`, where LENGTH counts the whole record."""
    fields: dict[str, str] = {}
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or length <= len(digits):
            break  # damaged: the name and size in the ordinary header still stand
        fields[_text(key)] = _text(value)
        content = content[length:]
    return fields


def _read(path: str, offset: int, size: int, where: str) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise BadSampleError(f"{where}: cannot read the shard: {error.strerror}") from error
    if len(content) != size:
        raise UserError(f"{where}: the shard became shorter while in use; do not change data during a run")
    return content


def _load_member(path: str, offset: int, size: int, where: str) -> Image.Image:
    return load_image(_read(path, offset, size, where), name=where)


def _json_caption(content: bytes, where: str) -> str:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise BadSampleError(f"{where}.json: not valid JSON: {error}") from error
    caption = value.get("caption") if isinstance(value, dict) else None
    if not isinstance(caption, str):
        raise BadSampleError(f'{where}.json: expected an object with a text "caption"')
    return decode_text(caption.encode("utf-8", "surrogatepass"), f"{where}.json")
