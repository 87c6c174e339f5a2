"""What lies in a folder, by the names of its files: what can be read, and what only looks like data.

Hidden files and folders, whose names begin with a dot, are nobody's data.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mamba3_jepa.data.images import IMAGE_SUFFIXES
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.files.special import is_special

# Suffixes of what looks like data and is not read, with the cure.
_UNDECODED = "no decoder for them: convert them to JPEG or PNG"
_COMPRESSED = "samples are read by position, which compression hides: unpack them to .tar"
_PACKED = "unpack them"
_MOVING = "samples are single images"
_TABLE = "list the samples in a manifest.jsonl"
_ADVICE = {
    suffix: advice
    for suffixes, advice in (
        (".tif .tiff .heic .heif .avif .jxl .jp2 .j2k .ico .tga .pbm .pgm .ppm .pnm .psd .svg .dib .exr", _UNDECODED),
        (".hdr .dng .cr2 .cr3 .nef .arw .raw", _UNDECODED),
        (".tar.gz .tgz .tar.bz2 .tbz .tbz2 .tar.xz .txz .tar.zst .tzst .tar.lz4 .tar.z", _COMPRESSED),
        (".zip .7z .rar .gz .bz2 .xz .zst", _PACKED),
        (".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg", _MOVING),
        (".json .jsonl .ndjson .csv .tsv .parquet .arrow .feather .tfrecord .h5 .hdf5 .mdb .npy .npz .pkl", _TABLE),
    )
    for suffix in suffixes.split()
}

# How files begin that are data whatever their name.
_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n": "PNG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF",
          b"PAR1": "Parquet"}  # fmt: skip
_START, _SNIFFED = 512, 1000


def suffix_of(name: str) -> str:
    """The suffix that says what a file is, in lower case, with its dot: ".jpg", ".tar.gz"."""
    stem, last = os.path.splitext(name.lower())
    double = os.path.splitext(stem)[1] + last
    return double if double in _ADVICE else last


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden; "." and ".." are not."""
    return name.startswith(".") and name not in (".", "..")


def looks_like_samples(suffix: str) -> bool:
    """Whether such files, which are not read, hold images or shards; tables often lie beside what is read."""
    return _ADVICE.get(suffix, _TABLE) != _TABLE


def described(unread: Mapping[str, int]) -> str:
    """Numbers of files by suffix, with what can be done: "3 .tif, 1 .heic (no decoder ...); 2 .zip (unpack them)"."""
    by_advice: dict[str, list[str]] = {}
    for suffix, count in sorted(unread.items(), key=lambda item: (-item[1], item[0])):
        by_advice.setdefault(_ADVICE.get(suffix, _PACKED), []).append(f"{count} {suffix}")
    return "; ".join(f"{', '.join(counts)} ({advice})" for advice, counts in by_advice.items())


def walk_visible(
    root: Path, *, linked: list[str] | None = None, on_error: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `root` down, relative to it ("" for itself), with the sorted names of its visible files.

    Args:
        linked: takes the relative paths of folders that are links; they are not followed.
        on_error: called with what kept a folder from being read; without it, that is an error.

    Raises:
        UserError: a folder cannot be read.
    """
    for directory, folders, names in os.walk(root, onerror=on_error or _refuse):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        relative = os.path.relpath(directory, root)
        relative = "" if relative == os.curdir else relative
        if linked is not None:
            linked += [os.path.join(relative, f) for f in folders if os.path.islink(os.path.join(directory, f))]
        yield relative, sorted(name for name in names if not is_hidden(name))


def nameless_data(root: Path) -> str:
    """Images and shards among the first `_SNIFFED` files below `root`, by how they begin and not by name, in words;
    empty if there are none."""
    found: Counter[str] = Counter()
    first = ""
    paths = (os.path.join(root, folder, name) for folder, names in walk_visible(root) for name in names)
    for path in itertools.islice((path for path in paths if not is_special(path)), _SNIFFED):
        try:
            with open(path, "rb") as file:
                kind = _kind_of(file.read(_START))
        except OSError:
            continue
        if kind:
            found[kind] += 1
            first = first or path
    counts = ", ".join(f"{count} {kind}" for kind, count in found.most_common())
    return f"{counts} files by what is in them, such as {path_text(first)} (give them their suffix)" if counts else ""


def _kind_of(start: bytes) -> str:
    """What a file is that begins so; empty where it is not known."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WebP"
    if start[257:262] == b"ustar":
        return "tar"
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")


def _refuse(error: OSError) -> None:
    raise UserError(f"{path_text(str(error.filename))}: cannot read the folder: {error.strerror}") from error


@dataclass
class Tally:
    """How many there are of something, and the first."""

    count: int = 0
    first: str = ""

    def add(self, name: str) -> None:
        """One more."""
        self.first = self.first if self.count else name
        self.count += 1

    def add_all(self, more: Tally, before: str = "") -> None:
        """All of `more`, with a text before the first."""
        if more.count:
            self.first = self.first if self.count else before + more.first
            self.count += more.count


@dataclass(frozen=True)
class Survey:
    """Visible files of a folder and those below by suffix, and its folders that are links, which are not followed."""

    counts: Counter[str]
    linked: list[str]

    @staticmethod
    def of(root: Path) -> Survey:
        """Look at every name.

        Raises:
            UserError: a folder cannot be read.
        """
        linked: list[str] = []
        counts = Counter(suffix_of(name) for _, names in walk_visible(root, linked=linked) for name in names)
        return Survey(counts, linked)

    @property
    def n_shards(self) -> int:
        """Files `*.tar`."""
        return self.counts[".tar"]

    @property
    def n_images(self) -> int:
        """Images in files of their own."""
        return sum(self.counts[suffix] for suffix in IMAGE_SUFFIXES)

    def unread(self, *, tables: bool) -> str:
        """What looks like data and is not read, in words; empty if nothing does. `tables`: those too."""
        unread = {suffix: self.counts[suffix] for suffix in self.counts if suffix in _ADVICE}
        seen = [described({suffix: n for suffix, n in unread.items() if tables or looks_like_samples(suffix)})]
        if tables and not self.n_images and self.counts[".txt"] > 1:  # one may be a note
            seen.append(f"{self.counts['.txt']} .txt (texts without an image beside them)")
        if self.linked:
            first = path_text(self.linked[0])
            seen.append(f"{len(self.linked)} links to folders, such as {first} (not followed: put the folder there)")
        return "; ".join(part for part in seen if part)
