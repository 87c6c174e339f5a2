"""Yes-no questions, as POPE scores them (Li et al. 2023, arXiv 2305.10355): yes is the positive class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class YesNoScores:
    """Shares in [0, 1]. Of nothing they are 0: precision where nobody says yes, recall where yes is never right.

    yes: how often yes is said; a model that always says it has the accuracy of the share of right ones, and recall 1.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float

    @staticmethod
    def of(said: Sequence[bool], right: Sequence[bool]) -> YesNoScores:
        """From what was said, and what would have been right, to N questions.

        Raises:
            ValueError: no questions, or lengths that differ.
        """
        if not right or len(said) != len(right):
            raise ValueError(f"{len(said)} answers for {len(right)} questions")
        agree = sum(a == b for a, b in zip(said, right, strict=True))
        both = sum(a and b for a, b in zip(said, right, strict=True))
        return YesNoScores(
            accuracy=agree / len(right),
            precision=_share(both, sum(said)),
            recall=_share(both, sum(right)),
            f1=_share(2 * both, sum(said) + sum(right)),
            yes=sum(said) / len(said),
        )


def says_yes(answer: str) -> bool:
    """Whether an answer is read as yes: whatever does not have "no" or "not" in its first sentence, an empty one too.

    That is POPE's own rule, so that numbers can be compared; upper case and commas do not count.
    """
    words = answer.partition(".")[0].replace(",", "").lower().split()
    return "no" not in words and "not" not in words


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
