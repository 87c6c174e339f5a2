"""WebDataset shards as img2dataset writes them: tars of `KEY.jpg` (.png, ...) and `KEY.txt` or `KEY.json`.

`KEY.json` has a `caption`, and may have `negatives` as a manifest's line has them; beside `KEY.txt` it is not read.

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
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamba3_jepa.data.hard_negatives import EXPECTED, Negative, is_negatives, negatives_problem, read_negatives
from mamba3_jepa.data.images import IMAGE_SUFFIXES, BadSampleError, NotReadNowError, load_image
from mamba3_jepa.data.records import decode_text
from mamba3_jepa.data.sample import Kind, OnBadSample, Place, Sample, state_of_files
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.data.survey import Tally, described, is_hidden, looks_like_samples, suffix_of, walk_visible
from mamba3_jepa.data.tar_index import Member, read_tar_index
from mamba3_jepa.errors import UserError

_IMAGE_EXTENSIONS = {suffix[1:] for suffix in IMAGE_SUFFIXES}
_TEXT_EXTENSIONS = ("txt", "json")  # the first one present is used


class ShardSource:
    """Image-text pairs in every `*.tar` under a directory, in the order of the files' paths and of their members.

    Opening reads the headers of all shards. The group of a sample is its key, with the size of its image where several
    samples have that key: shards may be renamed and moved. Hidden files, folders and members are not looked at.

    n_left_out: images without text; n_further: images of samples that have one already; texts_alone: texts without
    image; unread: members that look like samples and are not read, by suffix; links: images and texts that are no
    regular members; damaged: what is wrong with shards that are read as far as they are whole; n_folders: that hold
    shards.
    """

    synthetic = False

    def __init__(self, data_dir: str | Path, on_bad_sample: OnBadSample = "error") -> None:
        """
        Raises:
            UserError: a shard is truncated or no tar (with "skip", what is whole is used), an image has no text (with
                "skip" it is left out and counted), or there is no sample at all.
        """
        self.name = str(data_dir)
        self.n_left_out = self.n_further = 0
        self.texts_alone = Tally()
        self.unread: Counter[str] = Counter()
        self.links = Tally()
        self.damaged = Tally()
        self._skips = on_bad_sample == "skip"
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
            seen = [described(self.unread), self.damaged.first, f"{self.links.count} links" if self.links.count else ""]
            but = f", but {'; '.join(filter(None, seen))}" if any(seen) else ""
            raise UserError(f"{self.name}: no image with a caption in {len(self._shards)} *.tar shards{but}")
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
        fields = _json_object(text, where) if is_json else {}
        captions = _captions(fields, where) if is_json else (decode_text(text, where),)
        return Sample(
            image=partial(_load_member, path, image_offset, image_size, where),
            place=Place(path, image_offset, image_size),
            target=captions[0],
            captions=captions if len(captions) > 1 else (),
            negatives=_negatives(fields, captions, where),
            meta={"origin": where},
        )

    def group(self, i: int) -> str:
        key = self._key(i)
        return f"{key}, {self._places[i, 2]} bytes" if self._repeated[i] else key

    def group_hashes(self) -> NDArray[np.uint64]:
        groups = (stable_hash(self.group(i)) for i in range(len(self)))
        return np.fromiter(groups, dtype=np.uint64, count=len(self))

    def indices(self, kind: Kind) -> NDArray[np.int64]:
        if kind == "captions":  # how many a JSON member holds is seen when it is read
            return np.flatnonzero(self._places[:, 5])
        return np.arange(len(self) if kind in ("all", "target", "caption") else 0)

    def file_state(self, indices: NDArray[np.int64]) -> str:
        """Changes when a shard of these samples does (see `sample.FileBacked`)."""
        return state_of_files(self._shards[shard] for shard in np.unique(self._places[indices, 0]))

    def _key(self, i: int) -> str:
        return bytes(self._keys[i]).decode("utf-8", "surrogateescape")

    def _image_members(self, path: str) -> Iterator[tuple[str, Member, Member | None]]:
        """Key, image and caption of every sample of one shard; counts the members that are not read."""
        samples: dict[str, dict[str, Member]] = {}
        for member in self._members(path):
            if any(map(is_hidden, member.name.split("/"))):
                continue
            folder, _, name = member.name.rpartition("/")
            stem, extension = name.partition(".")[0], member.extension
            files = samples.setdefault(os.path.normpath(f"{folder}/{stem}" if folder else stem), {})
            if _is_image(extension):
                self.n_further += extension in files  # the same name once more: the last one counts
            elif extension not in _TEXT_EXTENSIONS and _holds_samples(suffix_of(name)):
                self.unread[suffix_of(name)] += 1
            files[extension] = member
        for key, files in samples.items():
            found = list(_pairs(key, files))
            if not found and "txt" in files and not any(looks_like_samples(f".{each}") for each in files):
                self.texts_alone.add(f"{path}: {files['txt'].name}")
            self.n_further += sum(_is_image(extension) for extension in files) - len(found)
            yield from found

    def _members(self, path: str) -> Iterator[Member]:
        """The regular files of a shard; of a damaged one, if bad samples are skipped, those before the damage."""
        others: list[str] = []
        try:
            yield from read_tar_index(path, others)
        except UserError as error:
            if not self._skips:
                raise
            self.damaged.add(str(error).split("; download", maxsplit=1)[0])
        for name in others:
            suffix = suffix_of(name)
            if suffix[1:] in (*_IMAGE_EXTENSIONS, *_TEXT_EXTENSIONS) and not any(map(is_hidden, name.split("/"))):
                self.links.add(f"{path}: {name}")


def _find_shards(root: Path) -> Iterator[str]:
    """Paths, relative to `root`, of its shards."""
    for folder, names in walk_visible(root):
        yield from (os.path.join(folder, name) for name in names if suffix_of(name) == ".tar")


def _holds_samples(suffix: str) -> bool:
    return looks_like_samples(suffix) or suffix == ".tar"


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
