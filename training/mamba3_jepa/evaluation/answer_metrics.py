"""How good generated answers are: exact match by kind of question, and BLEU."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mamba3_jepa.data.plain_text import plain_text

ByType = Mapping[str, tuple[float, int]]
"""For each question type, most frequent first, its share of right answers in [0, 1] and its number of questions."""

# A data set may have thousands of ways to begin a question; the log gets the frequent ones.
MAX_LOGGED_TYPES = 16


@dataclass(frozen=True, kw_only=True)
class AnswerMetrics:
    """Generated texts against the expected ones.

    Shares are in [0, 1], and None where there is no such sample; BLEU is from 0 to 100, over everything.

    by_type: exact matches by question type.
    """

    exact_match: float
    question_exact_match: float | None
    caption_exact_match: float | None
    bleu: float
    by_type: ByType
    n_samples: int
    n_questions: int

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """Flat numbers for `metrics.jsonl`. With the prefix `val`:

        - `val/exact_match`: of the questions, or of everything when there is no question;
        - `val/all_exact_match`, and with captions `val/caption_exact_match`;
        - `val/exact_match_{type}` for the most frequent question types, such as `val/exact_match_what_color`, of
          scenes `val/exact_match_color`;
        - `val/bleu`.
        """
        exact_match = self.exact_match if self.question_exact_match is None else self.question_exact_match
        values = {"exact_match": exact_match, "all_exact_match": self.exact_match, "bleu": self.bleu}
        if self.caption_exact_match is not None:
            values["caption_exact_match"] = self.caption_exact_match
        values |= by_type_metrics("exact_match", self.by_type)
        return {f"{prefix}/{name}": value for name, value in values.items()}


def answer_metrics(
    expected: Sequence[str],
    generated: Sequence[str],
    types: Sequence[str | None],
    also_right: Sequence[Sequence[str]] | None = None,
) -> AnswerMetrics:
    """Compare N generated texts with the N expected ones; a question type of None marks a caption.

    Args:
        also_right: for each of the N the further texts that are right: a match of any counts, and BLEU takes all.

    Raises:
        ValueError: no texts, or lengths that differ.
    """
    if not expected or len({len(expected), len(generated), len(types)}) != 1:
        raise ValueError(f"{len(generated)} generated texts for {len(expected)} expected and {len(types)} questions")
    references = [[text, *more] for text, more in zip(expected, also_right or [()] * len(expected), strict=True)]
    right = [any(same_text(text, said) for text in texts) for texts, said in zip(references, generated, strict=True)]
    of_questions: dict[str, list[bool]] = defaultdict(list)
    of_captions: list[bool] = []
    for kind, is_right in zip(types, right, strict=True):
        if kind is None:
            of_captions.append(is_right)
        else:
            of_questions[kind].append(is_right)
    by_frequency = sorted(of_questions.items(), key=lambda item: (-len(item[1]), item[0]))
    return AnswerMetrics(
        exact_match=sum(right) / len(right),
        question_exact_match=_share([is_right for _, group in by_frequency for is_right in group]),
        caption_exact_match=_share(of_captions),
        bleu=bleu(references, generated),
        by_type={kind: (sum(group) / len(group), len(group)) for kind, group in by_frequency},
        n_samples=len(right),
        n_questions=len(right) - len(of_captions),
    )


def by_type_metrics(name: str, by_type: ByType) -> dict[str, float]:
    """The shares of the most frequent question types, such as `name_what_color`."""
    values: dict[str, float] = {}
    for kind, (share, _) in list(by_type.items())[:MAX_LOGGED_TYPES]:
        values.setdefault(name + "_" + re.sub(r"\W+", "_", kind), share)
    return values


def same_text(expected: str, generated: str) -> bool:
    """Equal but for case and white space."""
    return plain_text(expected) == plain_text(generated)


def bleu(references: Sequence[Sequence[str]], generated: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100, as sacrebleu computes it, with one reference each or more.

    n-grams longer than every text do not count, so that one-word answers can be right.
    """
    from sacrebleu.metrics import BLEU

    most = max(map(len, references))
    streams: list[Any] = [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
    return float(BLEU(effective_order=True).corpus_score(list(generated), streams).score)


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None
