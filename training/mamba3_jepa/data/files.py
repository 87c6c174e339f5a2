"""Data as plain files: a manifest, or a folder of images each with a text file beside it."""

from __future__ import annotations

import glob
import io
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamba3_jepa.data.hard_negatives import negatives_problem
from mamba3_jepa.data.images import IMAGE_SUFFIXES, BadSampleError, NotReadNowError, load_image
from mamba3_jepa.data.records import (
    Record,
    not_text,
    parse_record,
    read_record,
    read_text,
    resolve_inside,
    with_slashes,
)
from mamba3_jepa.data.sample import Kind, OnBadSample, Place, Sample, state_of_files
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.data.strings import Strings
from mamba3_jepa.data.survey import Tally, walk_visible
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.encodings import lines_of, open_text
from mamba3_jepa.files.special import is_special

logger = logging.getLogger(__name__)

CHECKED_RECORDS = 100_000  # files of so many records are looked for when a manifest is opened (under a second)

_TARGET, _PROMPT, _CONFUSED, _KNOWLEDGE, _CONFUSING, _IMAGELESS, _CAPTIONS, _TOOL = 1, 2, 4, 8, 16, 32, 64, 128


class ManifestSource:
    """The records of `manifest.jsonl`, or of another file of its format.

    Opening reads the file once: every line is validated, and the files named by the first `CHECKED_RECORDS`
    are looked for (unless bad samples are skipped). Only the place of each line is kept (25 bytes a record),
    so that manifests of millions of lines cost little memory; a line is read again when its sample is asked
    for.
    """

    synthetic = False

    def __init__(
        self, data_dir: str | Path, file: str | Path = "manifest.jsonl", on_bad_sample: OnBadSample = "error"
    ) -> None:
        """
        Args:
            data_dir: where all that a record names must be.
            file: the manifest's path from there on, or, where it lies elsewhere, its absolute path.

        Raises:
            UserError: a line is malformed, or a file it names is missing (with "skip" malformed lines are left out, and
                their number is said); or there is no record at all.
        """
        self.root = Path(data_dir)
        self._root = Path(os.path.realpath(data_dir))
        self.path = self.root / file
        self.name = str(self.path)
        if is_special(self.path):
            raise UserError(f"{self.name}: a pipe, socket or device, not a file; a manifest is read more than once")
        offsets, lines, hashes, flags = array("q"), array("q"), array("Q"), array("B")
        digest = blake2b(digest_size=16)
        malformed = Tally()
        for line_number, offset, line in self._read_lines():
            digest.update(line)
            if not line.strip():
                continue
            where = self._where(line_number)
            try:
                record = with_slashes(parse_record(line, where), self._root)
            except UserError as error:
                if on_bad_sample == "error":
                    raise
                malformed.add(str(error))
                continue
            if on_bad_sample == "error" and len(offsets) < CHECKED_RECORDS:
                self._check_files(record, where)
            offsets.append(offset)
            lines.append(line_number)
            hashes.append(stable_hash(record.group))
            flags.append(_flags(record))
        if not offsets:
            first = f"; the first of {malformed.count} lines: {malformed.first}" if malformed.count else ""
            raise UserError(f"{self.name}: the manifest has no records; expected one JSON object a line{first}")
        if malformed.count:
            logger.warning("%s: %d lines left out, the first: %s", self.name, malformed.count, malformed.first)
        self.fingerprint = digest.hexdigest()
        self._offsets = np.array(offsets, dtype=np.int64)
        self._lines = np.array(lines, dtype=np.int64)
        self._hashes = np.array(hashes, dtype=np.uint64)
        self._flags = np.array(flags, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._offsets)

    def record(self, i: int) -> Record:
        """Record i, read from the file again."""
        where = self._where(int(self._lines[i]))
        try:
            with self.path.open("rb") as file:
                line = self._line_at(file, int(self._offsets[i]))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: {not_text(error)}; the file has been changed since it was opened") from error
        except OSError as error:
            raise NotReadNowError(f"{where}: cannot read the manifest again: {error.strerror}") from error
        return with_slashes(read_record(line, where), self._root)

    def sample(self, i: int) -> Sample:
        record = self.record(i)
        where = self._where(int(self._lines[i]))
        target = record.given_answer
        captions = tuple(caption.strip() for caption in record.captions or ())
        if record.text_path is not None:
            target = read_text(resolve_inside(self._root, record.text_path, where), where)
            if problem := negatives_problem(record.wrong, [target]):
                raise BadSampleError(f"{where}: {problem}")
        elif record.text is not None:
            target = record.text.strip()
        elif captions:
            target = captions[0]
        image = place = None
        if record.image is not None:
            image = partial(_load_inside, self._root, record.image, where)
            place = Place(str(self._root / record.image))
        return Sample(
            image=image,
            place=place,
            picture=None if record.image is None else record.group,
            question=record.prompt,
            target=target,
            captions=captions,
            answers=tuple(answer.strip() for answer in record.answers or ()),
            negatives=record.wrong,
            confused=record.is_confused,
            tool_used=record.tool_used,
            knowledge=record.knowledge,
            meta={"origin": where, "image": record.image, "id": record.id, "meta": record.meta},
        )

    def group(self, i: int) -> str:
        return self.record(i).group

    def group_hashes(self) -> NDArray[np.uint64]:
        return self._hashes

    def indices(self, kind: Kind) -> NDArray[np.int64]:
        confusing, prompt = (self._flags & _CONFUSING) > 0, (self._flags & _PROMPT) > 0
        target = ((self._flags & _TARGET) > 0) & ~confusing
        chosen = {
            "all": np.ones(len(self), dtype=bool),
            "target": target,
            "caption": target & ~prompt,
            "captions": (self._flags & _CAPTIONS) > 0,
            "question": target & prompt,
            "confused": (self._flags & _CONFUSED) > 0,
            "confusing": confusing,
            "knowledge": (self._flags & _KNOWLEDGE) > 0,
            "imageless": (self._flags & _IMAGELESS) > 0,
            "tool": (self._flags & _TOOL) > 0,
        }
        return np.flatnonzero(chosen[kind])

    def file_state(self, indices: NDArray[np.int64]) -> str:
        """Changes when an image or a text file of these samples does (see `sample.FileBacked`)."""
        records = (self.record(int(i)) for i in indices)
        paths = (path for record in records for path in (record.image, record.text_path) if path is not None)
        return state_of_files(self._root / path for path in dict.fromkeys(paths))

    def _line_at(self, file: BinaryIO, offset: int) -> bytes:
        """The line that begins there, in UTF-8."""
        file.seek(offset)
        if self._encoding == "utf-8":
            return file.readline()
        return io.TextIOWrapper(file, self._encoding, newline="\n").readline().encode()

    def _where(self, line_number: int) -> str:
        return f"{self.name} line {line_number}"

    def _read_lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Line number from 1, byte offset and content, in UTF-8, of every line."""
        try:
            with self.path.open("rb") as file:
                self._encoding = open_text(file, self.name)
                for line_number, (offset, line) in enumerate(lines_of(file, self._encoding), start=1):
                    yield line_number, offset, line
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}: {not_text(error)}") from error
        except OSError as error:
            raise UserError(f"{self.name}: cannot read the manifest: {error.strerror}") from error

    def _check_files(self, record: Record, where: str) -> None:
        for field, relative in (("image", record.image), ("text", record.text_path)):
            if relative is not None and not os.path.isfile(self._root / relative):
                raise UserError(
                    f'{where}: field "{field}": there is no file {self._root / relative}; '
                    "correct the path, or leave such records out with `on_bad_sample` skip"
                )
        for caption in record.captions or ():
            if caption.endswith(".txt") and "\0" not in caption and os.path.isfile(self._root / caption):
                raise UserError(
                    f'{where}: field "captions": {caption!r} is a file; captions are the texts themselves, not paths'
                )


def _flags(record: Record) -> int:
    return (
        _TARGET * (record.text is not None or record.captions is not None or record.given_answer is not None)
        | _PROMPT * (record.prompt is not None)
        | _CONFUSED * (record.is_confused is not None)
        | _KNOWLEDGE * (record.knowledge is not None)
        | _CONFUSING * (record.is_confused is True)
        | _IMAGELESS * (record.image is None)
        | _CAPTIONS * (len(record.captions or ()) > 1)
        | _TOOL * (record.tool_used is not None)
    )


def _load_inside(root: Path, relative: str, where: str) -> Image.Image:
    path = resolve_inside(root, relative, where)
    if is_special(path):
        raise BadSampleError(f"{where}: {path} is no image file, but a pipe, socket or device")
    return load_image(path, name=f"{where}: {path}")


class FolderSource:
    """Image-text pairs `x.jpg` + `x.txt` anywhere under a directory, in the order of their paths; hidden files and
    folders are not looked at."""

    synthetic = False

    def __init__(self, data_dir: str | Path, on_bad_sample: OnBadSample = "error") -> None:
        """
        Raises:
            UserError: there is no image, or an image has no text (with "skip" it is left out and counted).
        """
        self._root = Path(os.path.realpath(data_dir))
        self.name = str(data_dir)
        self.n_left_out = 0
        self.texts_alone = Tally()
        self._images = Strings(self._find(on_bad_sample))
        if not len(self._images):
            raise UserError(f"{self.name}: no image with a text file beside it")
        digest = blake2b("\n".join(self._images).encode("utf-8", "surrogateescape"), digest_size=16)
        self.fingerprint = digest.hexdigest()

    def _find(self, on_bad_sample: OnBadSample) -> Iterator[str]:
        for relative, has_text in _walk_images(self._root, self.texts_alone):
            if has_text:
                yield relative
            elif on_bad_sample == "error":
                raise UserError(
                    f"{self._root / relative}: the image has no text file {Path(relative).stem}.txt beside "
                    "it; add it, write a manifest.jsonl, or leave such images out with `on_bad_sample` skip"
                )
            else:
                self.n_left_out += 1

    def __len__(self) -> int:
        return len(self._images)

    def sample(self, i: int) -> Sample:
        relative = self._images[i]
        where = str(Path(self.name) / relative)
        text_path = resolve_inside(self._root, str(_text_beside(self._root / relative)), where)
        return Sample(
            image=partial(_load_inside, self._root, relative, where),
            place=Place(str(self._root / relative)),
            target=read_text(text_path, where),
            meta={"origin": where, "image": relative},
        )

    def group(self, i: int) -> str:
        return self._images[i]

    def group_hashes(self) -> NDArray[np.uint64]:
        return np.fromiter(map(stable_hash, self._images), dtype=np.uint64, count=len(self))

    def indices(self, kind: Kind) -> NDArray[np.int64]:
        return np.arange(len(self) if kind in ("all", "target", "caption") else 0)

    def file_state(self, indices: NDArray[np.int64]) -> str:
        """Changes when an image or a text file of these samples does (see `sample.FileBacked`)."""
        images = (self._root / self._images[i] for i in indices)
        return state_of_files(path for image in images for path in (image, _text_beside(image)))


def _text_beside(image: Path) -> Path:
    """The caption's path; the suffix may be in upper case, as the image's may."""
    lower = image.with_suffix(".txt")
    if lower.exists():
        return lower
    others = (path for path in image.parent.glob(f"{glob.escape(image.stem)}.*") if path.suffix.lower() == ".txt")
    return next(others, lower)


def _walk_images(root: Path, texts_alone: Tally) -> Iterator[tuple[str, bool]]:
    """Relative path of every image, in sorted order, and whether a text file is beside it; `texts_alone` takes those of
    texts of whose name there is nothing else."""
    for folder, names in walk_visible(root):
        parted = [os.path.splitext(name) for name in names]
        stems = Counter(stem for stem, _ in parted)
        with_text = {stem for stem, suffix in parted if suffix.lower() == ".txt"}
        for name, (stem, suffix) in zip(names, parted, strict=True):
            if suffix.lower() == ".txt" and stems[stem] == 1:
                texts_alone.add(os.path.join(folder, name))
            elif suffix.lower() in IMAGE_SUFFIXES:
                yield os.path.join(folder, name), stem in with_text
