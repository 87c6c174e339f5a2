"""The tables of `mamba3-jepa evaluate` that say what phase 3 is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mamba3_jepa.evaluation.belief import BeliefReport
from mamba3_jepa.evaluation.episode_recall import MEMORY_EPISODES, EpisodeFloor
from mamba3_jepa.evaluation.injection import SteadinessReport
from mamba3_jepa.evaluation.memory_trial import MemoryReport
from mamba3_jepa.evaluation.recursion import RecursionReport, scores
from mamba3_jepa.evaluation.selective import SelectiveReport
from mamba3_jepa.evaluation.tool_choice import ToolReport

_EPISODE_SHARES = ("found", "recalled", "recalled_without")

Table = tuple[list[str], list[list[str]]]


def recursion_tables(report: RecursionReport) -> Iterator[Table]:
    """Columns and rows of each table: what there is nothing to say about has none."""
    yield _kinds(report)
    if report.trials.selective:
        yield _wrong_answers(report.trials.selective, "wrong among {:,} answers")
    if report.trials.as_it_is:
        yield _wrong_answers(report.trials.as_it_is, "wrong among {:,} of what is not spoilt")
    if report.trials.injection is not None:
        yield _forms(report)
    if report.trials.belief is not None and report.trials.belief.forms:
        yield _belief(report.trials.belief)
    if report.trials.steadiness is not None:
        yield _kept(report.trials.steadiness)
    if report.memory is not None:
        yield _memory(report.memory)
    if report.episodes is not None:
        yield _episodes(report.episodes)
    if report.trials.tools is not None:
        yield _tools(report.trials.tools)


def _kinds(report: RecursionReport) -> Table:
    rows = [
        [kind, f"{values['samples']:,.0f}", _share(values["judged_confused"]), _share(values["auroc"]),
         _share(values["auroc_alike"])]
        for kind, values in report.by_kind().items()
    ]  # fmt: skip
    threshold = report.trials.confusion.calibration.threshold
    return ["confusion", "samples", f"judged confused (over {threshold:.4f})", "AUROC", "AUROC alike"], rows


def _wrong_answers(selective: Mapping[str, SelectiveReport], title: str) -> Table:
    rows = [[name, *(_share(value) for value in values.values())] for name, values in scores(selective).items()]
    return [title.format(len(selective[""].risk)), "AUROC", "AURC", "accuracy at 80 %", "accuracy at 95 %"], rows


def _forms(report: RecursionReport) -> Table:
    judged = {} if report.trials.injection is None else report.trials.injection.judged
    rows = [
        [form, *map(_share, vars(rates).values()), _share(judged[form].after) if form in judged else ""]
        for form, rates in report.by_form().items()
    ]
    return [
        "told to confused samples",
        "right before",
        "after",
        "after wrong knowledge",
        "after, if judged so",
    ], rows


def _belief(report: BeliefReport) -> Table:
    rows = [[form, f"{told:,}", _share(share)] for form, (told, share) in report.forms.items()]
    return ["told to samples judged confused", "told", "sure afterwards"], rows


def _kept(report: SteadinessReport) -> Table:
    row = [f"{report.n_samples:,} right answers", _share(report.always), _share(report.in_use)]
    return ["told what is false or irrelevant", "turned, always told", "turned, told where confused"], [row]


def _memory(report: MemoryReport) -> Table:
    rows = [
        [name, f"{rates.questions:,}", *(_share(value) for key, value in vars(rates).items() if key != "questions")]
        for name, rates in (("all", report.all), ("judged confused", report.judged))
        if rates is not None
    ]
    return [f"confused questions, {report.memory_texts} texts", "questions", "right before", "found", "right after",
            "without it: told", "changed"], rows  # fmt: skip


def _episodes(report: EpisodeFloor) -> Table:
    values = report.as_json()
    row = [f"{report.lookups:,} of spoilt pictures", *(_share(values[name]) for name in _EPISODE_SHARES)]
    return [f"lookups among {MEMORY_EPISODES} episodes", "found", "recalled", "without it: recalled"], [row]


def _tools(report: ToolReport) -> Table:
    rows = [["all", f"{report.n_samples:,}", _share(report.accuracy)]]
    rows += [[tool, f"{n:,}", _share(share)] for tool, (share, n) in report.by_tool.items()]
    return ["tool that is right", "samples", "chosen"], rows


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
