"""`mamba3-jepa evaluate`."""

from __future__ import annotations

from mamba3_jepa.cli.output import say, show, table
from mamba3_jepa.evaluation.evaluate import EvaluationReport, evaluate_checkpoint
from mamba3_jepa.evaluation.swaps import SwapReport
from mamba3_jepa.settings.inference import EvaluateSettings

_MAX_TYPES = 20  # on the screen; the JSON file has all


def run_evaluate(settings: EvaluateSettings) -> None:
    """Measure the checkpoint, write what was asked for, and print the numbers.

    Raises:
        UserError: see `evaluate_checkpoint`.
    """
    report = evaluate_checkpoint(settings)
    numbers = {name.removeprefix("test/"): value for name, value in report.metrics("test").items()}
    by_type = [name for name in numbers if name.startswith(("exact_match_", "swap_"))]  # they have tables of their own
    rows = [(name, f"{value:.4g}") for name, value in numbers.items() if name not in by_type]
    say(report.data)
    show(table(("metric", "value"), rows))
    if report.nearest.by_type:
        show(table(*_types(report)))
    if report.validation.swaps is not None:
        show(table(*_swaps(report.validation.swaps)))


def _types(report: EvaluationReport) -> tuple[list[str], list[list[str]]]:
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
