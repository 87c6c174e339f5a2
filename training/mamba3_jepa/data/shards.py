"""WebDataset shards as img2dataset writes them: tars of `KEY.jpg` (.png, ...) and `KEY.txt` or `KEY.json`.

The key ends at the first dot of the name, as WebDataset has it. Names with more dots are understood all the same:
`a.2021.jpg` goes with `a.2021.txt`, and `a.input.jpg` with `a.outputs.txt` where key `a` has one image and one text.

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
from collections import Counter
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamba3_jepa.data.images import IMAGE_SUFFIXES, BadSampleError, NotReadNowError, load_image
from mamba3_jepa.data.records import decode_text
from mamba3_jepa.data.sample import Kind, OnBadSample, Place, Sample, state_of_files
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.data.survey import described, is_hidden, looks_like_samples, suffix_of, walk_visible
from mamba3_jepa.errors import UserError

_BLOCK, _RECORD = 512, 10_240  # an archive is filled up to whole records
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
    """Image-text pairs in every `*.tar` under a directory, in the order of the files' paths and of their members.

    Opening reads the headers of all shards. The group of a sample is its key, with the size of its image where several
    samples have that key: shards may be renamed and moved. Hidden files, folders and members are not looked at.

    n_left_out: images without text; n_further: images of samples that have one already; unread: members that look
    like samples and are not read, by suffix; n_folders: that hold shards.
    """

    synthetic = False

    def __init__(self, data_dir: str | Path, on_bad_sample: OnBadSample = "error") -> None:
        """
        Raises:
            UserError: a shard is truncated or no tar, an image has no text (with "skip" it is left out and
                counted), or there is no sample at all.
        """
        self.name = str(data_dir)
        self.n_left_out = self.n_further = 0
        self.unread: Counter[str] = Counter()
        names = sorted(_find_shards(Path(data_dir)))
        self._shards = [str(Path(data_dir) / name) for name in names]
        self.n_folders = len({os.path.dirname(name) for name in names})
        places, keys = array("q"), []
        digest = blake2b(b"groups without shards", digest_size=16)
        for shard, path in enumerate(self._shards):
            for key, image, text in self._image_members(path):
                if text is not None:
                    row = (shard, image.offset, image.size, text.offset, text.size, text.extension.endswith("json"))
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
            seen = f", but {described(self.unread)}" if self.unread else ""
            raise UserError(f"{self.name}: no image with a caption in {len(self._shards)} *.tar shards{seen}")
        self._keys = np.array(keys)  # one fixed-width array: far smaller than as many objects
        _, number, count = np.unique(self._keys, return_inverse=True, return_counts=True)
        self._repeated = (count > 1)[number]
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
            place=Place(path, image_offset, image_size),
            target=target,
            meta={"origin": where},
        )

    def group(self, i: int) -> str:
        key = self._key(i)
        return f"{key}, {self._places[i, 2]} bytes" if self._repeated[i] else key

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

    def _image_members(self, path: str) -> Iterator[tuple[str, Member, Member | None]]:
        """Key, image and caption of every sample of one shard; counts the members that are not read."""
        samples: dict[str, dict[str, Member]] = {}
        for member in read_tar_index(path):
            if any(map(is_hidden, member.name.split("/"))):
                continue
            folder, _, name = member.name.rpartition("/")
            stem, extension = name.partition(".")[0], member.extension
            files = samples.setdefault(os.path.normpath(f"{folder}/{stem}" if folder else stem), {})
            if _is_image(extension):
                self.n_further += extension in files  # the same name once more: the last one counts
            elif extension not in _TEXT_EXTENSIONS and looks_like_samples(suffix_of(name)):
                self.unread[suffix_of(name)] += 1
            files[extension] = member
        for key, files in samples.items():
            found = list(_pairs(key, files))
            self.n_further += sum(_is_image(extension) for extension in files) - len(found)
            yield from found


def _find_shards(root: Path) -> Iterator[str]:
    """Paths, relative to `root`, of its shards."""
    for folder, names in walk_visible(root):
        yield from (os.path.join(folder, name) for name in names if suffix_of(name) == ".tar")


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in _IMAGE_EXTENSIONS


def _pairs(key: str, files: dict[str, Member]) -> Iterator[tuple[str, Member, Member | None]]:
    """Key, image and caption of each sample in the `files` of one WebDataset key, by extension."""
    images: dict[str, Member] = {}  # by what stands between the key and the suffix, of each the first
    for extension, member in files.items():
        if _is_image(extension):
            images.setdefault(extension.rpartition(".")[0], member)
    texts = {middle: _text_of(files, middle) for middle in images}
    if len(images) == 1 and not any(texts.values()) and all(_is_role(name.rpartition(".")[0]) for name in files):
        yield key, next(iter(images.values())), _only_text(files)
        return
    for middle, image in images.items():
        # beside a whole sample, another image without a text of its own is one more view of it
        if texts[middle] is not None or texts.get("") is None:
            yield f"{key}.{middle}" if middle else key, image, texts[middle]


def _text_of(files: dict[str, Member], middle: str) -> Member | None:
    names = (f"{middle}.{extension}" if middle else extension for extension in _TEXT_EXTENSIONS)
    return next((files[name] for name in names if name in files), None)


def _only_text(files: dict[str, Member]) -> Member | None:
    """The one text of a key, whatever word stands before its suffix; None where there is none, or a choice."""
    for extension in _TEXT_EXTENSIONS:
        found = [member for name, member in files.items() if name.rpartition(".")[2] == extension]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _is_role(middle: str) -> bool:
    """Whether it names a part of a sample, as "input" does in `a.input.jpg`; a date or number tells samples apart."""
    return middle.replace("_", "").isalpha() or not middle


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
            following = _next_archive(file, position)
            if following is None:
                return
            position = following
            continue
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


def _next_archive(file: BinaryIO, end_mark: int) -> int | None:
    """Where another archive begins behind the end mark and its padding, as `cat a.tar b.tar` leaves it."""
    file.seek(end_mark)
    padding = file.read(_RECORD + _BLOCK)
    for offset in range(_BLOCK, len(padding), _BLOCK):
        block = padding[offset : offset + _BLOCK]
        if block.strip(b"\0"):
            return end_mark + offset if block[257:262] == b"ustar" else None
    return None


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
        raise NotReadNowError(f"{where}: cannot read the shard: {error.strerror}") from error
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
