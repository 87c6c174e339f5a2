"""Texts that are wrong for a sample, and which of them an epoch trains against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mamba3_jepa.data.plain_text import plain_text
from mamba3_jepa.data.splits import stable_hash


class Negative(NamedTuple):
    """A text that is wrong for a sample, and what was made wrong of the right one: empty where that is not known."""

    text: str
    kind: str = ""


ALL_KINDS = "all"  # what tables call all kinds together

EXPECTED = "a list of texts, or an object with such a list for each kind"


def read_negatives(given: list[str] | dict[str, list[str]] | None) -> list[Negative]:
    """The field `negatives` of a manifest or shard: a list of texts, or such a list for each kind."""
    by_kind = given if isinstance(given, dict) else {"": given or []}
    return [Negative(text.strip(), kind) for kind, texts in by_kind.items() for text in texts]


def is_negatives(value: Any) -> bool:
    """Whether a JSON value can be read by `read_negatives`."""
    lists = list(value.values()) if isinstance(value, dict) else [[] if value is None else value]
    return all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists)


def negatives_problem(negatives: Iterable[Negative], right: Iterable[str]) -> str | None:
    """What is wrong with the negatives of a sample whose right texts are `right`, or None.

    A text is right too if it differs from a right one in nothing but case and white space.
    """
    known = {plain_text(text) for text in right}
    for text, kind in negatives:
        if kind == ALL_KINDS:
            return (
                f'field "negatives": the kind "{ALL_KINDS}" is what all of them together are called: name it otherwise'
            )
        if not text:
            return f'field "negatives": a text is empty: expected {EXPECTED}'
        if plain_text(text) in known:
            return f'field "negatives": {text!r} is right: remove it'
    return None


def drawn(negatives: Iterable[Negative], n: int | None, *key: int) -> Sequence[Negative]:
    """`n` of the negatives, with different texts, or as many as there are; all of them if `n` is None.

    The choice is by hash of the `key` (seed, epoch, sample) and the texts: the same in every process, and in a run that
    is continued.
    """
    if not n:
        return list(negatives) if n is None else []
    distinct = list({each.text: each for each in negatives}.values())
    if len(distinct) <= n:
        return distinct
    words = "/".join(map(str, key))
    return sorted(distinct, key=lambda each: stable_hash(f"{words}/{each.text}"))[:n]
