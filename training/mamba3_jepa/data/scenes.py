"""Synthetic scenes as a source of samples: coloured shapes with captions, questions and answers.

Every sample follows from (seed, split, index) alone. Six of the forty colour-shape pairs are held out: in
pictures and in questions they occur only in the "compositional" split. One caption in twenty, by hash, is
reserved for the "val" split and one for the "test" split: whatever the seeds and numbers of scenes, training sees no
caption of theirs, and what chooses the best checkpoint none of "test". "fresh" scenes are like those of "train", but
others: what a model answers to them is what it answers in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.data.draw import draw_scene
from mamba3_jepa.data.hard_negatives import Negative
from mamba3_jepa.data.lesson import Lesson
from mamba3_jepa.data.sample import Kind, Sample
from mamba3_jepa.data.scene_facts import lessons_about
from mamba3_jepa.data.scene_negatives import wrong_answers, wrong_captions
from mamba3_jepa.data.scene_tools import lessons_about_tools, tool_question
from mamba3_jepa.data.scene_wording import plain, worded
from mamba3_jepa.data.scene_world import (
    ALL_PAIRS,
    SEEN_PAIRS,
    Dice,
    Question,
    Scene,
    answerable_questions,
    mismatched_question,
    random_scene,
    unanswerable_question,
)
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.errors import UserError

SceneSplit = Literal["train", "fresh", "val", "test", "compositional"]
SceneKind = Literal["caption", "question", "unanswerable", "mismatched"]
ConfusingKind = Literal["unanswerable", "mismatched"]

MAX_QUESTIONS = 3  # so many different questions can be asked about any scene
_RESERVED_SHARE = 10  # one caption in so many is kept out of training, for "val" or "test"
_MAX_ATTEMPTS = 10_000
_MAX_OTHER_SCENES = 20  # tried for a question that does not fit; 98 of 100 have one


class SceneSource:
    """`n_scenes` scenes; each gives one sample of every kind, and `questions_per_scene` of kind "question".

    A "caption" has no question, a "question" its answer; both have `confused` False. "unanswerable" asks
    about an object that is not there and has no target. "mismatched" is a question of another scene that cannot
    be answered here; its target is the answer it has there, which nobody can tell from this picture. Both have
    `confused` True, and `indices("target")` leaves them out. In all splits but "train" and "fresh" all captions
    differ. Captions and questions have negatives (`scene_negatives`); what is held out of training is held out of those
    too.
    """

    synthetic = True

    def __init__(
        self,
        split: SceneSplit = "train",
        *,
        n_scenes: int = 20_000,
        seed: int = 0,
        image_size: int = 64,
        kinds: Sequence[SceneKind] = ("caption", "question"),
        questions_per_scene: int = 2,
    ) -> None:
        """
        Raises:
            UserError: impossible sizes, or more scenes asked for than there are different captions.
        """
        if n_scenes < 1 or image_size < 16 or not kinds or not 0 < questions_per_scene <= MAX_QUESTIONS:
            raise UserError(
                f"synthetic scenes: expected n_scenes >= 1 (found {n_scenes}), image_size >= 16 (found "
                f"{image_size}), at least one kind (found {list(kinds)}) and questions_per_scene from 1 to "
                f"{MAX_QUESTIONS} (found {questions_per_scene})"
            )
        self.split = split
        self.n_scenes = n_scenes
        self.seed = seed
        self.image_size = image_size
        self._slots: list[tuple[SceneKind, int]] = [
            (kind, i) for kind in kinds for i in range(questions_per_scene if kind == "question" else 1)
        ]
        self._pairs = ALL_PAIRS if split == "compositional" else SEEN_PAIRS
        self.name = f"synthetic scenes ({split})"
        self.fingerprint = f"scenes-2/{split}/{seed}/{n_scenes}/{image_size}/{self._slots}"
        self._attempts = None if split in ("train", "fresh") else self._distinct_attempts()

    def __len__(self) -> int:
        return self.n_scenes * len(self._slots)

    def scene(self, index: int) -> Scene:
        """Scene `index`, from 0 to `n_scenes` - 1."""
        if not 0 <= index < self.n_scenes:
            raise IndexError(f"scene {index} of {self.n_scenes}")
        if self._attempts is not None:
            return self._draft(index, int(self._attempts[index]))
        for attempt in range(_MAX_ATTEMPTS):
            scene = self._draft(index, attempt)
            if _reserved_for(scene.caption) is None:
                return scene
        raise AssertionError("one caption in ten cannot be all of them")

    def sample(self, i: int) -> Sample:
        index, slot = divmod(i, len(self._slots))
        kind, number = self._slots[slot]
        scene = self.scene(index)
        dice = Dice(kind, self.split, self.seed, index)
        if kind == "caption":
            return self._make(scene, index, kind, None, dice)
        if kind == "question":
            questions = answerable_questions(scene, dice, MAX_QUESTIONS, self._pairs)
            dice = Dice("wording", self.split, self.seed, index, number)
            return self._make(scene, index, kind, questions[number], dice)
        return self._make(scene, index, kind, self._confusing_question(scene, kind, dice), dice)

    def confusing(self, i: int, kind: ConfusingKind) -> Sample:
        """A sample of `kind` on the scene of sample i, with another question for every i."""
        index = i // len(self._slots)
        scene = self.scene(index)
        dice = Dice("confusing", kind, self.split, self.seed, i)
        return self._make(scene, index, kind, self._confusing_question(scene, kind, dice), dice)

    def demonstration(self, i: int) -> Sample:
        """A question about none of the scenes, with what a tool says of it, on the scene of sample i or without image;
        another for every i. What is asked in the other splits is never asked in "train" and "fresh"."""
        index = i // len(self._slots)
        dice = Dice("tool", self.split, self.seed, i)
        is_seen = self.split in ("train", "fresh")
        asked = tool_question(dice, is_seen)
        has_image = dice.pick((True, False))
        return Sample(
            image=partial(draw_scene, self.scene(index), self.image_size) if has_image else None,
            picture=f"scene {index}" if has_image else None,
            question=asked.question,
            target=asked.answer,
            confused=True,
            tool_used=asked.tool,
            knowledge=asked.answer,
            lessons=partial(lessons_about_tools, asked, Dice("told", self.split, self.seed, i), is_seen),
            meta={"origin": f"{self.name}, scene {index}", "scene": index, "asked": asked.tool, "plain": asked.plain},
        )

    def _make(self, scene: Scene, index: int, kind: SceneKind, asked: Question | None, dice: Dice) -> Sample:
        """`dice` chooses the words of the question."""
        meta = {"origin": f"{self.name}, scene {index}", "scene": index, "kind": kind}
        if asked is not None:
            meta |= {"asked": asked.asked, "plain": plain(asked)}
        return Sample(
            image=partial(draw_scene, scene, self.image_size),
            picture=f"scene {index}",
            question=None if asked is None else worded(asked, dice),
            target=scene.caption if asked is None else asked.answer,
            negatives=self._negatives(scene, index, asked) if kind in ("caption", "question") else (),
            confused=kind in ("unanswerable", "mismatched"),
            lessons=partial(self._lessons, scene, index, kind, asked),
            meta=meta,
        )

    def _negatives(self, scene: Scene, index: int, asked: Question | None) -> list[Negative]:
        dice = Dice("negatives", self.split, self.seed, index, "" if asked is None else plain(asked))
        if asked is not None:
            return wrong_answers(scene, asked, dice)
        return wrong_captions(scene, dice, self._pairs, self._may_be_said)

    def _lessons(self, scene: Scene, index: int, kind: SceneKind, asked: Question | None) -> list[Lesson]:
        dice = Dice("lessons", self.split, self.seed, index, kind, "" if asked is None else plain(asked))
        if asked is not None:
            return lessons_about(asked, scene if kind == "question" else None, dice, self._pairs)
        lessons = [Lesson(scene.caption, scene.caption, "caption")]
        for _ in range(_MAX_OTHER_SCENES):
            other = self.scene(dice.pick(range(self.n_scenes))).caption
            if other != scene.caption:
                return [*lessons, Lesson(other, other, "false")]
        return lessons

    def _may_be_said(self, scene: Scene) -> bool:
        return self.split not in ("train", "fresh") or _reserved_for(scene.caption) is None

    def group(self, i: int) -> str:
        return f"scene/{self.split}/{self.seed}/{i // len(self._slots)}"

    def group_hashes(self) -> NDArray[np.uint64]:
        groups = (stable_hash(self.group(i)) for i in range(len(self)))
        return np.fromiter(groups, dtype=np.uint64, count=len(self))

    def indices(self, kind: Kind) -> NDArray[np.int64]:
        chosen: dict[Kind, tuple[SceneKind, ...]] = {
            "all": ("caption", "question", "unanswerable", "mismatched"),
            "target": ("caption", "question"),
            "caption": ("caption",),
            "captions": (),
            "question": ("question",),
            "confused": ("caption", "question", "unanswerable", "mismatched"),
            "confusing": ("unanswerable", "mismatched"),
            "knowledge": (),
            "imageless": (),
            "tool": (),
        }
        slots = np.array([name in chosen[kind] for name, _ in self._slots])
        return np.flatnonzero(np.tile(slots, self.n_scenes))

    def _draft(self, index: int, attempt: int) -> Scene:
        dice = Dice("scene", self.split, self.seed, index, attempt)
        return random_scene(dice, with_held_out_pair=self.split == "compositional")

    def _distinct_attempts(self) -> NDArray[np.int64]:
        """For every scene the first attempt with a new caption (for "val" and "test": one reserved for it)."""
        seen: set[str] = set()
        attempts = np.zeros(self.n_scenes, dtype=np.int64)
        for index in range(self.n_scenes):
            for attempt in range(_MAX_ATTEMPTS):
                caption = self._draft(index, attempt).caption
                if caption not in seen and self.split in ("compositional", _reserved_for(caption)):
                    break
            else:
                raise UserError(f"{self.name}: there are not {self.n_scenes} scenes with different captions")
            seen.add(caption)
            attempts[index] = attempt
        return attempts

    def _confusing_question(self, scene: Scene, kind: ConfusingKind, dice: Dice) -> Question:
        if kind == "mismatched":
            for _ in range(_MAX_OTHER_SCENES):
                other = self.scene(dice.pick(range(self.n_scenes)))
                found = mismatched_question(scene, other, dice)
                if found is not None:
                    return found
        return unanswerable_question(scene, dice, self._pairs)


def may_have_validated_on_test(fingerprint: str | None) -> bool:
    """Whether a run with data of this fingerprint is from before there was a "test" split: its validation scenes were
    drawn from all reserved captions, those of "test" included."""
    return "scenes-1/val/" in (fingerprint or "")


def _reserved_for(caption: str) -> SceneSplit | None:
    rest, is_free = divmod(stable_hash(caption), _RESERVED_SHARE)
    if is_free:
        return None
    return "test" if rest % 2 else "val"
