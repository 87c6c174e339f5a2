"""Samples a model should be confused by, made from any data, beside those it should not be confused by.

Every question, and every other caption, is offered as it is. Every question is offered once more in a way that cannot
be answered, or that may not be, and the other captions with a spoilt image, so that there are about equally many of
each kind. Everything follows from (seed, index).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamba3_jepa.config import QUERY_PROMPT
from mamba3_jepa.contract import MEMORY_TOOL
from mamba3_jepa.data.confusion_plan import (
    CLEAR,
    CONFUSION_KINDS,
    CORRUPTED,
    DEGRADED,
    FOREIGN,
    GIVEN,
    IMAGELESS,
    MADE_KINDS,
    MISMATCHED,
    SHUFFLED,
    TOOL,
    UNANSWERABLE,
    Base,
    MadeKind,
    plan,
)
from mamba3_jepa.data.corruption import CORRUPTIONS, corrupt, degrade
from mamba3_jepa.data.foreign import foreign_question, foreign_text, shuffled
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.lesson import Lesson
from mamba3_jepa.data.plain_text import plain_text
from mamba3_jepa.data.sample import Kind, Sample, Source, file_state
from mamba3_jepa.data.scene_wording import SHOWN
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.errors import UserError

_ANSWERED = (CLEAR, DEGRADED, SHUFFLED)
_REMEMBERED = (MISMATCHED, UNANSWERABLE, IMAGELESS)  # what a memory of the scenes could know

_SOME = 64  # samples that show which tools a kind needs
_OTHERS = 20  # samples looked at for something that is known elsewhere
_SAID = 2  # of what is known of the sample whose question a foreign one took the place of
_TEXTS = 4096  # different ones that have nothing to do with the data: each is embedded


class ConfusionSource:
    """A view of some samples of a source; `meta["kind"]` of each of its samples is one of

    - "clear": as it is, not confused;
    - "given": as it is, with the manifest's own `confused`;
    - "mismatched": a question with the image of another group, of which the data does not ask the same;
    - "unanswerable": of scenes, a question about an object that is not there;
    - "corrupted": its image destroyed beyond recognition;
    - "imageless": a question asked without its image, unless the data answers it without one;
    - "foreign": a question of another topic, in another language, or garbled, in the place of its own;
    - "degraded": its image spoilt to some degree, from hardly to wholly;
    - "shuffled": a question with its words in disorder, which may still be understood;
    - "tool": of scenes, a question that a tool answers, such as a sum, with what the tool says.

    Of "clear", "degraded" and "shuffled" samples whoever has a model sees if it answers rightly; all others but "given"
    are confused. Their target is the right answer all the same, which only somebody who knows more could give: the
    answer the question had where it came from, or the caption. A scene's unanswerable question has none, nor has
    a foreign one. Samples labelled as confused are only "given". Samples with neither target nor label are left out.

    Attributes:
        kinds: (len(self),) uint8, positions in `CONFUSION_KINDS`.
        confused: (len(self),) bool.
        answered: (len(self),) bool, the samples "clear", "degraded" and "shuffled".
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int] | NDArray[np.int64],
        seed: int = 0,
        made_kinds: Sequence[MadeKind] = MADE_KINDS,
        *,
        beside: Sequence[Source] = (),
        query_prompt: str = QUERY_PROMPT,
    ) -> None:
        """
        Args:
            indices: samples of `source` to make this of, such as one side of a split; of the others only what they
                ask is looked at, so that nothing made contradicts them.
            made_kinds: the kinds of confusion to make.
            beside: more sources that nothing made may contradict, such as the other side of a split.
            query_prompt: what an image-text pair asks.

        Raises:
            UserError: none of the samples is of use.
        """
        self._source, self._seed = source, seed
        self.name, self.synthetic = f"{source.name} with confusion", source.synthetic
        base = Base.of(source, np.unique(np.asarray(indices, dtype=np.int64)), beside, query_prompt)
        if not len(base.index):
            raise UserError(f'{source.name}: no sample has a question with an answer, a caption, or a "confused" label')
        rows, kinds, donors = plan(base, np.random.default_rng([seed % 2**64, len(base.index)]), set(made_kinds))
        self._base, self._donor, self.kinds = base.index[rows], donors, kinds
        self.answered = np.isin(kinds, _ANSWERED)
        self.confused = np.where(kinds == GIVEN, base.confused[rows], (kinds > GIVEN) & ~self.answered)
        content = blake2b(digest_size=16)
        for array in (self._base, self._donor, self.kinds):
            content.update(np.ascontiguousarray(array).tobytes())
        self.fingerprint = f"confusion-5/{source.fingerprint}/{seed}/{content.hexdigest()}"

    def __len__(self) -> int:
        return len(self._base)

    def sample(self, i: int) -> Sample:
        kind, index = int(self.kinds[i]), int(self._base[i])
        if kind in (MISMATCHED, UNANSWERABLE) and isinstance(self._source, SceneSource):
            made = self._source.confusing(index, "mismatched" if kind == MISMATCHED else "unanswerable")
        elif kind == TOOL and isinstance(self._source, SceneSource):
            made = self._source.demonstration(index)
        else:
            made = self._made(self._source.sample(index), kind, i)
        if kind > GIVEN:
            made = dataclasses.replace(made, tool_used=self._tool(kind, made))
        meta = {**made.meta, "kind": CONFUSION_KINDS[kind]}
        return dataclasses.replace(made, confused=bool(self.confused[i]), meta=meta)

    @cached_property
    def tools(self) -> list[str]:
        """The names of the tools that its samples need, in order; those that cannot be read aside."""
        rows = self.indices("tool")
        if isinstance(self._source, SceneSource):  # each tool comes up in any dozen
            some = [rows[self.kinds[rows] == kind][:_SOME] for kind in np.unique(self.kinds[rows])]
            rows = np.concatenate([rows[:0], *some])
        names = set()
        for i in rows.tolist():
            with contextlib.suppress(BadSampleError):
                names.add(self.sample(i).tool_used)
        return sorted(name for name in names if name is not None)

    def _tool(self, kind: int, made: Sample) -> str | None:
        """The tool that a sample needs that was made: of what was asked before it was changed, nothing is known."""
        if kind in _REMEMBERED and isinstance(self._source, SceneSource):
            return MEMORY_TOOL
        return made.tool_used if kind == TOOL else None

    def _made(self, sample: Sample, kind: int, i: int) -> Sample:
        if kind == MISMATCHED:
            donor = self._source.sample(int(self._donor[i]))
            meta = {**sample.meta, "image_of": donor.meta.get("origin")}
            return dataclasses.replace(sample, image=donor.image, picture=donor.picture, place=donor.place, meta=meta)
        if kind == IMAGELESS:
            return dataclasses.replace(sample, image=None, picture=None, place=None)
        dice = stable_hash(f"{CONFUSION_KINDS[kind]}/{self._seed}/{int(self._base[i])}")
        if kind == FOREIGN and sample.question is not None:
            things = SHOWN if isinstance(self._source, SceneSource) else ()
            question = foreign_question(sample.question, dice, things)
            meta = {name: value for name, value in sample.meta.items() if name != "asked"}
            return dataclasses.replace(sample, question=question, target=None, answers=(), knowledge=None, meta=meta)
        if kind == SHUFFLED and sample.question is not None:
            return dataclasses.replace(sample, question=shuffled(sample.question, dice))
        if kind in (CORRUPTED, DEGRADED) and sample.image is not None:
            name, level = list(CORRUPTIONS)[dice % len(CORRUPTIONS)], (dice >> 32) / 2**32
            if kind == CORRUPTED:
                image, how = partial(_corrupted, sample.image, name, dice), {"corruption": name}
            else:
                image, how = partial(_degraded, sample.image, level, dice), {"level": f"{level:.3f}"}
            return dataclasses.replace(sample, image=image, picture=None, place=None, meta={**sample.meta, **how})
        return sample

    def lessons(self, i: int, sample: Sample | None = None) -> list[Lesson]:
        """What one could be told about sample i: what is known of it, and something that has nothing to do with the
        data. To a foreign question both tell nothing; where nothing is known, nothing is told.

        Args:
            sample: sample i, where it has been read.

        Raises:
            BadSampleError: a sample cannot be read.
        """
        sample = self.sample(i) if sample is None else sample
        seed = stable_hash(f"foreign text/{self._seed}/{int(self._base[i])}/{int(self.kinds[i])}")
        if self.kinds[i] == FOREIGN:
            known = self._known(i, self._source.sample(int(self._base[i])))
            told = [lesson.knowledge for lesson in known if isinstance(lesson.knowledge, str)]
            some = [told[(seed + n) % len(told)] for n in range(min(_SAID, len(told)))]
            foreign = Lesson(foreign_text(seed, sample.question or ""), None, "foreign")
            return [*(Lesson(text, None, "irrelevant") for text in some), foreign]
        known, text = self._known(i, sample), foreign_text(seed % _TEXTS)
        said = f" {_words_of(text)} "
        if not known or any(f" {plain_text(lesson.answer or '')} " in said for lesson in known):
            return known
        return [*known, Lesson(text, None, "foreign")]

    def _known(self, i: int, sample: Sample) -> list[Lesson]:
        """Scenes make it up. Other data has its own knowledge, the answer, a caption of the same image with the answer
        in it, and what is known of another sample; nothing without an answer."""
        if sample.lessons is not None:
            return sample.lessons()
        if sample.target is None:
            return []
        lessons = [Lesson(sample.target, sample.target, "answer")]
        if sample.knowledge is not None:
            is_result = sample.tool_used not in (None, MEMORY_TOOL)
            lessons.append(Lesson(sample.knowledge, sample.target, "result" if is_result else "given"))
        caption = self._caption_of(int(self._base[i])) if sample.question is not None else None
        if caption is not None and f" {plain_text(sample.target)} " in f" {_words_of(caption)} ":
            lessons.append(Lesson(caption, sample.target, "caption"))
        other = self._told_elsewhere(i, sample)
        return lessons if other is None else [*lessons, other]

    def _caption_of(self, index: int) -> str | None:
        """A caption of the image of sample `index` of the source."""
        group = self._source.group_hashes()[index]
        place = int(np.searchsorted(self._captions[0], group))
        if place == len(self._captions[0]) or self._captions[0][place] != group:
            return None
        try:
            return self._source.sample(int(self._captions[1][place])).target
        except BadSampleError:
            return None

    @cached_property
    def _captions(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The groups that have captions, ascending, and a sample with one of each."""
        index = np.intersect1d(self._source.indices("caption"), self._base)
        groups, first = np.unique(self._source.group_hashes()[index], return_index=True)
        return groups, index[first]

    def _told_elsewhere(self, i: int, sample: Sample) -> Lesson | None:
        """What is known of another sample that asks as this one does: that is false here, if it is about the same, and
        otherwise it tells nothing; None if none is found that differs from what is right of this one."""
        right = {plain_text(text) for text in (*sample.targets, *sample.answers)}
        group = self._source.group(int(self._base[i]))
        for attempt in range(_OTHERS):
            place = stable_hash(f"told elsewhere/{self._seed}/{int(self._base[i])}/{attempt}") % len(self._base)
            try:
                other = self._source.sample(int(self._base[place]))
            except BadSampleError:
                continue
            if other.target is None or plain_text(other.target) in right:
                continue
            if (other.question is None) != (sample.question is None):
                continue
            if other.knowledge is not None and other.knowledge == sample.knowledge:
                continue
            if other.question is None and self._source.group(int(self._base[place])) == group:
                continue  # another caption of the same image is as right
            known = other.target if other.knowledge is None else other.knowledge
            if same_question(other, sample) or not isinstance(known, str):
                return Lesson(known, other.target, "false")
            return Lesson(known, None, "irrelevant")
        return None

    def bases(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples of the data that these are made of, by number: a question as it is and spoilt share one."""
        return self._base[indices]

    def n_made_of(self, indices: NDArray[np.int64]) -> int:
        """How many samples of the data some of these are made of."""
        return len(np.unique(self._base[indices]))

    def group(self, i: int) -> str:
        return self._source.group(int(self._base[i]))

    def group_hashes(self) -> NDArray[np.uint64]:
        return self._source.group_hashes()[self._base]

    def indices(self, kind: Kind) -> NDArray[np.int64]:
        if kind in ("all", "confused"):
            return np.arange(len(self))
        if kind == "confusing":
            return np.flatnonzero(self.confused)
        chosen = np.isin(self._base, self._source.indices(kind))
        if kind in ("target", "question", "knowledge"):  # made of a question with an answer, but without one itself
            chosen &= ~np.isin(self.kinds, (UNANSWERABLE, FOREIGN))
        if kind == "knowledge":
            chosen |= self.kinds == TOOL
        elif kind == "imageless":
            chosen |= self.kinds == IMAGELESS
        elif kind == "tool":
            chosen &= self.kinds <= GIVEN
            if isinstance(self._source, SceneSource):
                chosen |= np.isin(self.kinds, (*_REMEMBERED, TOOL))
        return np.flatnonzero(chosen)

    def file_state(self, indices: NDArray[np.int64]) -> str:
        """Changes when a file does that any of these samples may be read from (see `sample.FileBacked`)."""
        donors = self._donor[indices]
        return file_state(self._source, np.unique(np.concatenate([self._base[indices], donors[donors >= 0]])))


def topic(sample: Sample) -> str:
    """What samples that ask the same have in common, however they put it."""
    return plain_text(str(sample.meta.get("plain", sample.question or "")))


def same_question(a: Sample, b: Sample) -> bool:
    """Whether two samples ask the same."""
    return topic(a) == topic(b)


def _words_of(text: str) -> str:
    return " ".join("".join(letter if letter.isalnum() else " " for letter in plain_text(text)).split())


def _corrupted(load: Callable[[], Image.Image], name: str, seed: int) -> Image.Image:
    return corrupt(load(), name, seed)


def _degraded(load: Callable[[], Image.Image], level: float, seed: int) -> Image.Image:
    return degrade(load(), level, seed)
