"""Benchmarks of visual question answering: which measure each has, and the groups of questions it is reported for.

A question belongs to the benchmark that its `meta` names as `dataset`, as `prepare` writes it; where it names none that
is known here and several people have answered it, its measure is VQA accuracy. Or the user names one for all of them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mamba3_jepa.data.plain_text import plain_text
from mamba3_jepa.evaluation.vqa_accuracy import N_ANSWERS, normalised_answer, vqa_accuracy
from mamba3_jepa.evaluation.yes_no import YesNoScores, says_yes

logger = logging.getLogger(__name__)

SEVERAL_ANSWERS = "several answers"  # the benchmark of questions that name none


class Question(NamedTuple):
    """answer: the one that is right where only one can be; answers: all that people gave, one or more, empty ones of
    those who gave none among them; meta: what the data says of the question, by name."""

    answer: str
    answers: tuple[str, ...]
    meta: Meta


Measures = dict[str, float]
Meta = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """score: measures, by name, of N answers to N questions; groups: by name, what divides the questions: the value of
    one, or None where it has none; counts: whether a question is one of those that the benchmark is measured on."""

    score: Callable[[Sequence[str], Sequence[Question]], Measures]
    groups: Mapping[str, Callable[[Meta], str | None]]
    counts: Callable[[Question], bool] = lambda question: True


@dataclass(frozen=True, kw_only=True)
class Scores:
    """questions: how many; by_way: the measures of each way of answering, such as "nearest" and "generated"."""

    questions: int
    by_way: dict[str, Measures]


@dataclass(frozen=True, kw_only=True)
class BenchmarkReport:
    """Scores of one benchmark.

    groups: for each way to divide the questions the scores of each group, the largest first. odd_counts: questions
    measured by VQA accuracy that do not have `N_ANSWERS` answers; left_out: questions that do not count.
    """

    benchmark: str
    scores: Scores
    groups: dict[str, dict[str, Scores]]
    odd_counts: int
    left_out: int

    def metrics(self) -> Measures:
        """Flat numbers, such as `vqav2_accuracy_nearest` and `vqav2_questions`."""
        name = self.benchmark.replace(" ", "_")
        values = {f"{name}_questions": float(self.scores.questions)}
        for way, measures in self.scores.by_way.items():
            values |= {f"{name}_{measure}_{way}": value for measure, value in measures.items()}
        return values

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        values = asdict(self)
        del values["benchmark"]
        return values


def benchmark_reports(
    questions: Sequence[Question], given: Mapping[str, Sequence[str]], benchmark: str | None = None
) -> list[BenchmarkReport]:
    """A report for each benchmark that some of N questions belong to, in the order in which they occur; says of how
    many questions there is none because they do not count.

    Args:
        given: for each way of answering, such as "nearest", the N answers; an empty text is one, too.
        benchmark: the one that all questions belong to, whatever their `meta` names.

    Raises:
        ValueError: lengths differ.
    """
    if any(len(texts) != len(questions) for texts in given.values()):
        raise ValueError(f"{len(questions)} questions with {[len(texts) for texts in given.values()]} answers")
    rows: dict[str, list[int]] = defaultdict(list)
    for row, question in enumerate(questions):
        name = benchmark or _benchmark_of(question)
        if name is not None:
            rows[name].append(row)
    reports = []
    for name, chosen in rows.items():
        counted = [row for row in chosen if BENCHMARKS[name].counts(questions[row])]
        left_out = len(chosen) - len(counted)
        if left_out:
            logger.warning("%s: %d of %d questions do not count in its measure", name, left_out, len(chosen))
        if counted:
            reports.append(_report(name, counted, questions, given, left_out))
    return reports


def _benchmark_of(question: Question) -> str | None:
    name = question.meta.get("dataset")
    if isinstance(name, str) and name in BENCHMARKS:
        return name
    return SEVERAL_ANSWERS if len(question.answers) > 1 else None


def _report(
    name: str, rows: Sequence[int], questions: Sequence[Question], given: Mapping[str, Sequence[str]], left_out: int
) -> BenchmarkReport:
    benchmark = BENCHMARKS[name]

    def scores(chosen: Sequence[int]) -> Scores:
        asked = [questions[row] for row in chosen]
        by_way = {way: benchmark.score([texts[row] for row in chosen], asked) for way, texts in given.items()}
        return Scores(questions=len(chosen), by_way=by_way)

    groups: dict[str, dict[str, Scores]] = {}
    for label, value_of in benchmark.groups.items():
        members: dict[str, list[int]] = defaultdict(list)
        for row in rows:
            value = value_of(questions[row].meta)
            if value is not None:
                members[value].append(row)
        if members:
            by_size = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
            groups[label] = {value: scores(chosen) for value, chosen in by_size}
    odd = sum(len(questions[row].answers) != N_ANSWERS for row in rows) if benchmark.score is _vqa else 0
    return BenchmarkReport(benchmark=name, scores=scores(rows), groups=groups, odd_counts=odd, left_out=left_out)


def _vqa(given: Sequence[str], questions: Sequence[Question]) -> Measures:
    return _mean(vqa_accuracy(text, question.answers) for text, question in zip(given, questions, strict=True))


def _same(given: Sequence[str], questions: Sequence[Question]) -> Measures:
    """Equal but for case, white space and a period at the end."""

    def plain(text: str) -> str:
        return plain_text(text).rstrip(".")

    return _mean(plain(text) == plain(question.answer) for text, question in zip(given, questions, strict=True))


def _number(given: Sequence[str], questions: Sequence[Question]) -> Measures:
    """The same number, in digits or words ("3", "three")."""
    return _mean(
        normalised_answer(text) == normalised_answer(question.answer)
        for text, question in zip(given, questions, strict=True)
    )


def _yes_no(given: Sequence[str], questions: Sequence[Question]) -> Measures:
    said, right = [says_yes(text) for text in given], [says_yes(question.answer) for question in questions]
    return asdict(YesNoScores.of(said, right))


def _mean(scores: Iterable[float]) -> Measures:
    values = list(scores)
    return {"accuracy": sum(values) / len(values)}


def _field(*path: str) -> Callable[[Meta], str | None]:
    """The text that is found under these names, one inside the other."""

    def value_of(meta: Meta) -> str | None:
        value: Any = meta
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value if isinstance(value, str) else None

    return value_of


_structural, _semantic = _field("types", "structural"), _field("types", "semantic")


def _gqa_answer(meta: Meta) -> str | None:
    """GQA calls all questions open that query something, and the others, which verify, compare or choose, binary."""
    structural = _structural(meta)
    return structural and ("open" if structural == "query" else "binary")


def _balanced(question: Question) -> bool:
    return question.meta.get("isBalanced") is not False


def _answered_by_yes_or_no(question: Question) -> bool:
    """The measure reads any other word as yes, which is meant for what a model says and not for what is right."""
    return normalised_answer(question.answer) in ("yes", "no")


def _complexity(meta: Meta) -> str | None:
    simple = meta.get("issimple")
    return ("simple" if simple else "complex") if isinstance(simple, bool) else None


BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": Benchmark(_vqa, {"answer type": _field("answer_type"), "question type": _field("question_type")}),
    SEVERAL_ANSWERS: Benchmark(_vqa, {}),
    "gqa": Benchmark(_same, {"answer": _gqa_answer, "structural": _structural, "semantic": _semantic}, _balanced),
    "tallyqa": Benchmark(_number, {"complexity": _complexity}),
    "pope": Benchmark(_yes_no, {"category": _field("category")}, _answered_by_yes_or_no),
}
