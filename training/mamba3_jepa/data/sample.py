"""What every source of data gives: samples by index, and enough about them to split and select."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamba3_jepa.data.hard_negatives import Negative
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.lesson import Lesson
from mamba3_jepa.data.splits import spread, stable_hash

if TYPE_CHECKING:
    from mamba3_jepa.data.ahead import Ahead
    from mamba3_jepa.data.windows import Window

OnBadSample = Literal["error", "skip"]

# Samples that have: anything; a target text that is right for what they show, so none that are labelled as confused;
# such a target but no question; perhaps several captions; a question and such a target; a `confused` label; that label,
# and it is true; a knowledge text or vector; no image;
# a tool that was used.
Kind = Literal[
    "all", "target", "caption", "captions", "question", "confused", "confusing", "knowledge", "imageless", "tool"
]


class Place(NamedTuple):
    """Where bytes lie: `size` of them in the file `path`, from `offset` on; None: all."""

    path: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample. Nothing is decoded until `image` is called.

    image: returns the decoded RGB image, or raises `BadSampleError`; None for a sample without image.
    picture: tells its picture from the others of the source: samples that say the same see the same pixels; None where
        that is not known.
    place: where its picture lies; None where it is in no file.
    question: None for an image-text pair, whose query is then `ModelConfig.query_prompt`.
    target: the answer or the caption; None where there is none to learn from. Of several captions the first.
    captions: all of them, where the data gives a list of one image's; training shows another in each epoch
        (`target_in`). answers: all that people gave, where the data has them, empty ones too; evaluation asks for all.
    negatives: texts that are wrong in its place.
    tool_used: name of the tool that was needed.
    knowledge: a text, or a vector whose length is checked where the knowledge dimension is known.
    lessons: returns what one could be told about it, where the source can make that up; None where it cannot.
    meta: `origin` says in words where the sample comes from; synthetic scenes add more.
    """

    image: Callable[[], Image.Image] | None
    picture: str | None = None
    place: Place | None = None
    question: str | None = None
    target: str | None = None
    captions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    negatives: Sequence[Negative] = ()
    confused: bool | None = None
    tool_used: str | None = None
    knowledge: str | list[float] | None = None
    lessons: Callable[[], list[Lesson]] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[str, ...]:
        """Every text that training may show as the target; none where there is no target."""
        return self.captions or (() if self.target is None else (self.target,))

    def target_in(self, epoch: int, *, index: int, seed: int) -> str | None:
        """The target that training shows in an epoch; `index`: the sample's number in its source."""
        return self.captions[turn(len(self.captions), epoch, index, seed)] if self.captions else self.target


def turn(n: int, epoch: int, index: int, seed: int) -> int:
    """Which of n texts sample `index` has in an epoch: as if drawn, and the same in every process."""
    return stable_hash(f"text of {index} in {epoch} with {seed}") % n


class Source(Protocol):
    """A fixed sequence of samples, cheap to pickle into worker processes.

    name: for messages; synthetic: True if nothing of it is real data; fingerprint: changes when the samples
    do, as far as can be told without reading every file.
    """

    name: str
    synthetic: bool
    fingerprint: str

    def __len__(self) -> int: ...

    def sample(self, i: int) -> Sample:
        """Sample i. Raises `BadSampleError` if its text cannot be read; its image is read later."""
        ...

    def group(self, i: int) -> str:
        """What must stay on one side of a split: the image's path, or the text of a sample without image."""
        ...

    def group_hashes(self) -> NDArray[np.uint64]:
        """(len(self),) `splits.stable_hash` of every group."""
        ...

    def indices(self, kind: Kind) -> NDArray[np.int64]:
        """The indices, ascending, of the samples of one kind."""
        ...


def source_texts(
    source: Source, indices: Sequence[int] | NDArray[np.int64], bad: list[str] | None = None
) -> Iterator[str]:
    """Every question and every target of some samples, to train a tokenizer on; decodes no image.

    Args:
        bad: takes what was wrong with samples that cannot be read, which are then passed over.

    Raises:
        BadSampleError: a sample cannot be read, and there is no `bad`.
    """
    for i in indices:
        try:
            sample = source.sample(int(i))
        except BadSampleError as error:
            if bad is None:
                raise
            bad.append(str(error))
            continue
        if sample.question is not None:
            yield sample.question
        yield from sample.targets


def image_to_show(source: Source, i: int) -> Image.Image | None:
    """The image of sample i; None where there is none, or it can no longer be read: a picture less stops no run."""
    try:
        load = source.sample(i).image
        return None if load is None else load()
    except BadSampleError:
        return None


@runtime_checkable
class FileBacked(Protocol):
    """A source, or a view of one, whose samples lie in files that may be replaced while its fingerprint stays."""

    def file_state(self, indices: NDArray[np.int64]) -> str:
        """Digest of names, sizes and modification times of the files these samples are read from."""
        ...


@runtime_checkable
class Digested(Protocol):
    """A source that may have kept digests of its samples, so that nothing need be read to compare them."""

    def digests(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]] | None:
        """`content.Content.texts` and `pictures` of some samples; None where none are kept."""
        ...


@runtime_checkable
class Sharded(Protocol):
    """A source whose samples lie in shards, one after the other. shard_ends: (shards,), where those of each end."""

    @property
    def shard_ends(self) -> NDArray[np.int64]: ...


@runtime_checkable
class Fetched(Sharded, Protocol):
    """A source in shards that are fetched when they are needed."""

    def demand_room(self, window: int | None) -> None:
        """Refuse, with a `UserError`, to mix so many shards, or to read one after the other, if there is no room."""
        ...

    def ahead(self, windows: Iterator[Window]) -> Ahead:
        """Fetches these windows while batches are made."""
        ...

    def near(self, indices: NDArray[np.int64], at_most: int) -> NDArray[np.int64]:
        """So many of the indices, ascending, the same on every machine, that are cheap to read together."""
        ...


def some_of(source: Source, indices: NDArray[np.int64], at_most: int) -> NDArray[np.int64]:
    """The same `at_most` indices on every machine, in order: spread over all of them, or, where reading is dear, near
    to each other."""
    if isinstance(source, Fetched) and len(indices) > at_most:
        return source.near(indices, at_most)
    return spread(indices, at_most)


def file_state(source: Source, indices: NDArray[np.int64]) -> str:
    """`source.file_state(indices)`; empty for a source without files."""
    return source.file_state(indices) if isinstance(source, FileBacked) else ""


def state_of_files(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Digest of the paths given, with size and modification time of each file; a missing one counts as missing."""
    digest = blake2b(digest_size=16)
    for path in paths:
        try:
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"{os.fspath(path)}\0{state}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
