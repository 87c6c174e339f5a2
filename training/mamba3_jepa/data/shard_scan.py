"""What one WebDataset shard holds: its samples by position, and what lies in it without being one.

The key ends at the first dot of the name, as WebDataset has it. Names with more dots are understood all the same:
`a.2021.jpg` goes with `a.2021.txt`, and `a.input.jpg` with `a.outputs.txt` where key `a` has one image and one text.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mamba3_jepa.data.images import IMAGE_SUFFIXES
from mamba3_jepa.data.survey import Tally, is_hidden, looks_like_samples, suffix_of
from mamba3_jepa.data.tar_index import Member, ShardDamagedError, read_tar_index
from mamba3_jepa.errors import UserError

_IMAGE_EXTENSIONS = {suffix[1:] for suffix in IMAGE_SUFFIXES}
_TEXT_EXTENSIONS = ("txt", "json")  # the first one present is used


@dataclass(kw_only=True)
class Found:
    """What lies in a shard beside its samples; texts name no shard.

    n_further: images of samples that have one already; n_left_out: images without text, lonely: what is wrong with the
    first of them; damage: what is wrong with the shard, which was read as far as it is whole; both empty if nothing is.
    texts_alone: texts without image; links: images and texts that are no regular members; unread: members that look
    like samples and are not read, by suffix.
    """

    n_further: int = 0
    n_left_out: int = 0
    lonely: str = ""
    damage: str = ""
    texts_alone: Tally = field(default_factory=Tally)
    links: Tally = field(default_factory=Tally)
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def problem(self) -> str:
        """Why the shard is refused unless bad samples are skipped; empty if it is not."""
        return self.damage or self.lonely


@dataclass
class ShardScan:
    """One shard, read by its headers alone.

    samples: key, image and caption of each, in order. is_given: False where the system did not give the file, which it
    may another time.
    """

    samples: list[tuple[bytes, Member, Member]] = field(default_factory=list)
    found: Found = field(default_factory=Found)
    is_given: bool = True

    @staticmethod
    def of(path: str | Path) -> ShardScan:
        """Look at every header."""
        scan = ShardScan()
        scan._read(str(path))
        return scan

    def _read(self, path: str) -> None:
        files_of: dict[str, dict[str, Member]] = {}
        for member in self._members(path):
            if any(map(is_hidden, member.name.split("/"))):
                continue
            folder, _, name = member.name.rpartition("/")
            stem, extension = name.partition(".")[0], member.extension
            files = files_of.setdefault(os.path.normpath(f"{folder}/{stem}" if folder else stem), {})
            if _is_image(extension):
                self.found.n_further += extension in files  # the same name once more: the last one counts
            elif extension not in _TEXT_EXTENSIONS and _holds_samples(suffix_of(name)):
                self.found.unread[suffix_of(name)] += 1
            files[extension] = member
        for key, files in files_of.items():
            found = list(_pairs(key, files))
            if not found and "txt" in files and not any(looks_like_samples(f".{each}") for each in files):
                self.found.texts_alone.add(files["txt"].name)
            self.found.n_further += sum(_is_image(extension) for extension in files) - len(found)
            for name, image, text in found:
                self._add(name, image, text)

    def _add(self, key: str, image: Member, text: Member | None) -> None:
        if text is not None:
            self.samples.append((key.encode("utf-8", "surrogateescape"), image, text))
            return
        self.found.n_left_out += 1
        self.found.lonely = self.found.lonely or (
            f"{image.name} has neither {key}.txt nor {key}.json beside it; rewrite the shard, or leave such images out "
            "with `on_bad_sample` skip"
        )

    def _members(self, path: str) -> Iterator[Member]:
        """The regular files of a shard; of a damaged one those before the damage."""
        others: list[str] = []
        try:
            yield from read_tar_index(path, others)
        except UserError as error:
            self.found.damage = str(error).removeprefix(f"{path}: ")
            self.is_given = isinstance(error, ShardDamagedError)
        for name in others:
            suffix = suffix_of(name)
            if suffix[1:] in (*_IMAGE_EXTENSIONS, *_TEXT_EXTENSIONS) and not any(map(is_hidden, name.split("/"))):
                self.found.links.add(name)


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
