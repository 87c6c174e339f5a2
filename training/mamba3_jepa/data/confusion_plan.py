"""Which samples become confusing, and how: dealt over whole data, before one of them is read.

Letters: n samples of use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.data.asked import Asked, pair_hashes, question_hashes
from mamba3_jepa.data.sample import Source
from mamba3_jepa.data.scenes import SceneSource

MadeKind = Literal["mismatched", "unanswerable", "corrupted", "imageless", "foreign", "degraded", "shuffled", "tool"]
MADE_KINDS: tuple[MadeKind, ...] = get_args(MadeKind)
CONFUSION_KINDS = ("clear", "given", *MADE_KINDS)
CLEAR, GIVEN, MISMATCHED, UNANSWERABLE, CORRUPTED, IMAGELESS, FOREIGN, DEGRADED, SHUFFLED, TOOL = range(10)

_DONOR_ROUNDS = 50  # images tried for a question before it is taken not to have a wrong one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """What is known of the n samples of use. Arrays of length n.

    index: their numbers in the source; caption, question: which kind they are, with a target; image: have one;
    labelled, confused: have the manifest's label, and what it says; question_hash, group: stable hashes.
    asked: what must not be contradicted.
    makes_own: the source itself has confusing samples; then `question_hash` and `asked` are not needed and empty.
    """

    index: NDArray[np.int64]
    caption: NDArray[np.bool_]
    question: NDArray[np.bool_]
    image: NDArray[np.bool_]
    labelled: NDArray[np.bool_]
    confused: NDArray[np.bool_]
    question_hash: NDArray[np.uint64]
    group: NDArray[np.uint64]
    asked: Asked
    makes_own: bool

    @staticmethod
    def of(source: Source, indices: NDArray[np.int64], beside: Sequence[Source], query_prompt: str) -> Base:
        makes_own = isinstance(source, SceneSource)
        useful = source.indices("target")
        if not makes_own:
            useful = np.union1d(useful, source.indices("confused"))
        index = np.intersect1d(indices, useful)
        caption = np.isin(index, source.indices("caption"))
        labelled = np.zeros(len(index), dtype=bool) if makes_own else np.isin(index, source.indices("confused"))
        question_hash = np.zeros(len(index), dtype=np.uint64)
        asked = Asked(pairs=question_hash[:0], without_image=question_hash[:0])
        if not makes_own:
            question_hash = question_hashes(source, index, query_prompt)
            asked = Asked.of(source, index, question_hash, beside, query_prompt=query_prompt)
        return Base(
            index=index,
            caption=caption & ~labelled,
            question=np.isin(index, source.indices("question")),
            image=~np.isin(index, source.indices("imageless")),
            labelled=labelled,
            confused=labelled & np.isin(index, source.indices("confusing")),
            question_hash=question_hash,
            group=source.group_hashes()[index],
            asked=asked,
            makes_own=makes_own,
        )


def plan(
    base: Base, dice: np.random.Generator, made: set[MadeKind]
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]:
    """Which sample becomes what: rows of `base`, their kinds, and the source indices whose image they get, else -1.

    Half of the captions are spoilt in equal shares of the ways there are, instead of clear. The questions are dealt to
    the kinds so that, with those captions, each occurs equally often, as far as that goes; of "degraded" samples the
    captions are not counted: what a model errs in is to be learned of questions as well.
    """
    of_images = [kind for kind in (CORRUPTED, DEGRADED) if CONFUSION_KINDS[kind] in made]
    captions = dice.permutation(np.flatnonzero(base.caption))
    spoilt = captions[: len(captions) // 2] if of_images else captions[:0]
    questions = dice.permutation(np.flatnonzero(base.question & base.image & ~(base.labelled & base.confused)))
    donors = np.full(len(base.index), -1, dtype=np.int64)
    takes = {_kind(name): np.ones(len(questions), dtype=bool) for name in MADE_KINDS if name in made}
    if MISMATCHED in takes and not base.makes_own:
        donors[questions] = _donors(base, questions, dice)
        takes[MISMATCHED] = donors[questions] >= 0
    elif MISMATCHED in takes:
        takes[MISMATCHED][:] = len(np.unique(base.group)) > 1
    for kind in takes.keys() & {UNANSWERABLE, TOOL}:
        takes[kind][:] = base.makes_own
    if IMAGELESS in takes:
        takes[IMAGELESS] = ~np.isin(base.question_hash, base.asked.without_image)[questions] | base.makes_own
    have = {kind: len(spoilt[i :: len(of_images)]) for i, kind in enumerate(of_images) if kind != DEGRADED}
    altered = _dealt(takes, have, len(questions))
    as_it_is = np.flatnonzero((base.question | base.caption) & ~base.labelled)
    parts = [
        (np.setdiff1d(as_it_is, spoilt), CLEAR),
        (np.flatnonzero(base.labelled), GIVEN),
        *((spoilt[number :: len(of_images)], kind) for number, kind in enumerate(of_images)),
        *((questions[altered == kind], kind) for kind in takes),
    ]
    rows = np.concatenate([part for part, _ in parts])
    kinds = np.concatenate([np.full(len(part), kind, dtype=np.uint8) for part, kind in parts])
    order = np.lexsort((kinds, rows))
    rows, kinds = rows[order], kinds[order]
    return rows, kinds, np.where(kinds == MISMATCHED, donors[rows], -1)


def _kind(name: MadeKind) -> int:
    return CONFUSION_KINDS.index(name)


def _dealt(takes: dict[int, NDArray[np.bool_]], have: dict[int, int], n: int) -> NDArray[np.int64]:
    """(n,) kinds, dealt to those that take each so that all come to have equally many; -1 where none takes it.

    The kinds that take fewest are dealt to first, so that they are not left with what they cannot take.
    """
    dealt = np.full(n, -1, dtype=np.int64)
    open_kinds = sorted(takes, key=lambda kind: (int(takes[kind].sum()), kind))
    while open_kinds:
        left = dealt < 0
        each = -(-(int(left.sum()) + sum(have.get(kind, 0) for kind in open_kinds)) // len(open_kinds))
        kind = open_kinds.pop(0)
        dealt[np.flatnonzero(left & takes[kind])[: max(0, each - have.get(kind, 0))]] = kind
    return dealt


def _donors(base: Base, questions: NDArray[np.int64], dice: np.random.Generator) -> NDArray[np.int64]:
    """For each question a sample with an image of another group, of which the same is not asked; -1 if none is found.

    All questions look at once, each at a random sample; those that cannot use it look again.
    """
    found = np.full(len(questions), -1, dtype=np.int64)
    candidates = np.flatnonzero(base.image)
    if not len(candidates):
        return found
    open_rows = np.arange(len(questions))
    for _ in range(_DONOR_ROUNDS):
        if not len(open_rows):
            break
        donor = dice.choice(candidates, len(open_rows))
        own = questions[open_rows]
        fits = base.group[donor] != base.group[own]
        fits &= ~np.isin(pair_hashes(base.question_hash[own], base.group[donor]), base.asked.pairs)
        found[open_rows[fits]] = base.index[donor[fits]]
        open_rows = open_rows[~fits]
    return found
