"""VQA accuracy: an answer against those of several people (Antol et al. 2015, arXiv 1505.00468).

Texts are normalised as the official evaluation code does it (github.com/GT-Vision-Lab/VQA, vqaEval.py), its oddities
included, so that numbers can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

N_ANSWERS = 10  # of each question of VQA v1 and v2, and of those that follow them
_ENOUGH = 3  # people who say the same make an answer right

_DIGITS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
# Apostrophes and colons stay (girl's, 2:50), periods have a rule of their own.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # 2.5 keeps it

_CONTRACTIONS = [
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's", "isn't", "it'd", "it'd've",
    "it'll", "ma'am", "might've", "mightn't", "mightn't've", "must've", "mustn't", "needn't", "not've", "o'clock",
    "oughtn't", "'ow's'at", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've", "somebody'd've",
    "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's", "something'd",
    "something'd've", "something'll", "that's", "there'd", "there'd've", "there're", "there's", "they'd", "they'd've",
    "they'll", "they're", "they've", "'twas", "wasn't", "we'd've", "we've", "weren't", "what'll", "what're", "what's",
    "what've", "when's", "where'd", "where's", "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll",
    "why're", "why's", "won't", "would've", "wouldn't", "wouldn't've", "y'all", "y'all'd've", "y'all'll", "you'd",
    "you'd've", "you'll", "you're", "you've",
]  # fmt: skip
# By the same word with any one of its apostrophes missing: "dont", "couldnt've", "couldn'tve".
_WITH_APOSTROPHE = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTIONS for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


@lru_cache(maxsize=1 << 16)
def normalised_answer(text: str) -> str:
    """The text in lower case, without articles, its number words up to ten as digits and its contractions with their
    apostrophe.

    Periods go unless a digit follows. Another mark becomes a blank; it goes without one if it stands beside a blank
    somewhere in the text, or if the text has a comma between digits.
    """
    without_blank = _COMMA_IN_NUMBER.search(text) is not None
    becomes = {
        ord(mark): "" if without_blank or f"{mark} " in text or f" {mark}" in text else " "
        for mark in _MARKS
        if mark in text
    }
    plain = _PERIOD.sub("", text.translate(becomes)).lower()
    words = [_DIGITS.get(word, word) for word in plain.split()]
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(given: str, answers: Sequence[str]) -> float:
    """How right an answer is, in [0, 1]: min(people who say the same / 3, 1), averaged over leaving each of them out.

    Where all people say the same, the texts are compared as they are, but for case: such questions often ask what is
    written somewhere. With fewer than four people all of the others are enough, and one person's answer is right or
    wrong.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one answer")
    given, answers = _stripped(given), [_stripped(answer) for answer in answers]
    if len(set(answers)) > 1:
        given, answers = normalised_answer(given), [normalised_answer(answer) for answer in answers]
    same = sum(answer.lower() == given.lower() for answer in answers)
    if len(answers) == 1:
        return float(same)
    enough = min(_ENOUGH, len(answers) - 1)
    without_same, without_other = min((same - 1) / enough, 1), min(same / enough, 1)
    return (same * without_same + (len(answers) - same) * without_other) / len(answers)


def _stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
