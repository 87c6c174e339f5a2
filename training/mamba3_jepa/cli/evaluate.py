"""`mamba3-jepa evaluate`."""

from __future__ import annotations

from collections.abc import Iterator

from mamba3_jepa.cli.flags import with_flags
from mamba3_jepa.cli.output import say, show, table, write_out
from mamba3_jepa.cli.recursion_tables import recursion_tables
from mamba3_jepa.evaluation.benchmarks import BenchmarkReport, Scores
from mamba3_jepa.evaluation.evaluate import AnswersReport, evaluate_checkpoint, results
from mamba3_jepa.evaluation.swaps import SwapReport
from mamba3_jepa.settings.inference import EvaluateSettings

_MAX_TYPES = 20  # on the screen; the JSON file has all


def run_evaluate(settings: EvaluateSettings) -> None:
    """Measure the checkpoint, write what was asked for, and print the numbers.

    Raises:
        UserError: see `evaluate_checkpoint`.
    """
    report = evaluate_checkpoint(settings)
    if settings.json:
        write_out(results(settings, report))
        return
    say(report.data)
    if report.note is not None:
        say(with_flags(report.note))
    if report.answers is not None:
        _show_answers(report.answers)
    if report.recursion is not None:
        for each in recursion_tables(report.recursion):
            show(table(*each))


def _show_answers(report: AnswersReport) -> None:
    numbers = {name.removeprefix("test/"): value for name, value in report.metrics("test").items()}
    in_other_tables = {name for name in numbers if name.startswith(("exact_match_", "answer_accuracy_", "swap_"))}
    in_other_tables |= {name for each in report.benchmarks for name in each.metrics()}
    rows = [(name, f"{value:.4g}") for name, value in numbers.items() if name not in in_other_tables]
    show(table(("metric", "value"), rows))
    if report.nearest.by_type:
        show(table(*_types(report)))
    if report.validation.swaps is not None:
        show(table(*_swaps(report.validation.swaps)))
    for benchmark in report.benchmarks:
        show(table(*_benchmark(benchmark)))


def _types(report: AnswersReport) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the answers by question type."""
    shares = ["nearest", "generated"] if report.generated is not None else ["nearest"]
    shown = list(report.by_type().items())
    rows = [
        [kind, f"{values['questions']:,.0f}", *(f"{values[share]:.4f}" for share in shares)]
        for kind, values in shown[:_MAX_TYPES]
    ]
    if len(shown) > _MAX_TYPES:
        rest = sum(values["questions"] for _, values in shown[_MAX_TYPES:])
        rows.append([f"{len(shown) - _MAX_TYPES} rarer types", f"{rest:,.0f}", *("" for _ in shares)])
    return ["question type", "questions", *shares], rows


def _swaps(report: SwapReport) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the right text before the wrong ones, by what is wrong with those."""
    shown = list(report.rows().items())
    rows = [
        [kind, f"{values['samples']:,.0f}", f"{values['chance']:.4f}", f"{values['right']:.4f}"]
        for kind, values in shown[:_MAX_TYPES]
    ]
    if len(shown) > _MAX_TYPES:
        rows.append([f"{len(shown) - _MAX_TYPES} rarer kinds", "", "", ""])
    return ["exchanged", "samples", "chance", "swap accuracy"], rows


def _benchmark(report: BenchmarkReport) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each measure of all questions of a benchmark, then of their groups."""
    ways = list(report.scores.by_way)
    rows = list(_measures(report.benchmark, report.scores))
    for name, group in report.groups.items():
        for value, scores in list(group.items())[:_MAX_TYPES]:
            rows += _measures(f"{name}: {value}", scores)
        if len(group) > _MAX_TYPES:
            rest = sum(scores.questions for scores in list(group.values())[_MAX_TYPES:])
            rows.append([f"{name}: {len(group) - _MAX_TYPES} rarer ones", "", f"{rest:,}", *("" for _ in ways)])
    return ["benchmark", "measure", "questions", *ways], rows


def _measures(label: str, scores: Scores) -> Iterator[list[str]]:
    """A row for each measure."""
    first = next(iter(scores.by_way.values()))
    for number, measure in enumerate(first):
        shares = [f"{measures[measure]:.4f}" for measures in scores.by_way.values()]
        yield [label if number == 0 else "", measure, f"{scores.questions:,}" if number == 0 else "", *shares]
