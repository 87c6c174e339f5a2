"""Measure a checkpoint on any data: what `mamba3-jepa evaluate` does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.data.content import content_of
from mamba3_jepa.data.left_out import LeftOut
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.sample import Source, some_of
from mamba3_jepa.data.seen import warn_of_seen
from mamba3_jepa.device import checked_device
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.annotations import Annotation, read_annotations, repeated_ids
from mamba3_jepa.evaluation.answer_choice import AnswerChoice, answer_choice
from mamba3_jepa.evaluation.answer_metrics import AnswerMetrics
from mamba3_jepa.evaluation.answer_plots import plot_answers_by_type
from mamba3_jepa.evaluation.answers import Answers, nearest_texts, write_answer_sheet
from mamba3_jepa.evaluation.benchmarks import BenchmarkReport, benchmark_reports
from mamba3_jepa.evaluation.decoding import generate_texts
from mamba3_jepa.evaluation.measured_data import MeasuredData, MeasuredSplit, open_measured
from mamba3_jepa.evaluation.predictions import write_predictions
from mamba3_jepa.evaluation.recursion import RecursionReport, measure_recursion
from mamba3_jepa.evaluation.showcase import write_contact_sheet
from mamba3_jepa.evaluation.text_gallery import TextGallery
from mamba3_jepa.evaluation.validate import Captions, Collected, ValidationReport, collect, evaluate
from mamba3_jepa.evaluation.vqa_accuracy import N_ANSWERS
from mamba3_jepa.evaluation.zero_shot import (
    ZeroShotReport,
    class_embeddings,
    class_templates,
    different_labels,
    zero_shot,
)
from mamba3_jepa.files.checkpoint import Checkpoint, load_checkpoint
from mamba3_jepa.files.json_file import write_json
from mamba3_jepa.files.lines import read_lines
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.files.whole_file import demand_writable
from mamba3_jepa.models.finite import demand_finite
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.inference import EvaluateSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AnswersReport:
    """What was measured of the samples that the model should answer.

    generated: of the generated texts, None without; unfinished: the share of them that met the limit instead of
    ending; empty: the share that says nothing. nearest: of the nearest texts instead; choice: what questions were
    answered with there, None without questions.
    """

    validation: ValidationReport
    nearest: AnswerMetrics
    generated: AnswerMetrics | None
    unfinished: float | None
    empty: float | None
    choice: AnswerChoice | None
    zero_shot: ZeroShotReport | None
    benchmarks: list[BenchmarkReport]

    def metrics(self, prefix: str = "test") -> dict[str, float]:
        """Flat numbers: those of `ValidationReport` and `AnswerMetrics`, and with the prefix `test`:

        - `test/unfinished` and `test/empty`, where there are generated answers;
        - with questions `test/gallery_answers`, how many there are to choose from, `test/answers_known`, the share of
          questions of which a right one is among them, and `test/answers_unknown`, the number of the others;
        - with labels `test/zero_shot_top{1,5,10}`, `test/zero_shot_{samples,labels,templates}`;
        - of benchmarks `test/{benchmark}_{measure}_{nearest,generated}`, `test/{benchmark}_questions`.
        """
        values = self.validation.metrics(prefix)
        if self.generated is not None and self.unfinished is not None:
            values |= self.generated.metrics(prefix) | {f"{prefix}/unfinished": self.unfinished}
        if self.empty is not None:
            values[f"{prefix}/empty"] = self.empty
        if self.choice is not None:
            values[f"{prefix}/gallery_answers"] = len(self.choice.gallery.texts)
            values[f"{prefix}/answers_known"] = 1 - self.choice.n_unknown / self.nearest.n_questions
            values[f"{prefix}/answers_unknown"] = self.choice.n_unknown
        if self.zero_shot is not None:
            values |= {f"{prefix}/zero_shot_top{k}": share for k, share in self.zero_shot.recall.items()}
            values[f"{prefix}/zero_shot_samples"] = self.zero_shot.n_samples
            values[f"{prefix}/zero_shot_labels"] = self.zero_shot.n_labels
            values[f"{prefix}/zero_shot_templates"] = self.zero_shot.n_templates
        for report in self.benchmarks:
            values |= {f"{prefix}/{name}": value for name, value in report.metrics().items()}
        return values

    def by_type(self) -> dict[str, dict[str, float]]:
        """For each question type, most frequent first: how many, and the shares right by nearest and by generation."""
        rows: dict[str, dict[str, float]] = {}
        for kind, (share, questions) in self.nearest.by_type.items():
            rows[kind] = {"questions": questions, "nearest": share}
            if self.generated is not None:
                rows[kind]["generated"] = self.generated.by_type[kind][0]
        return rows


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Everything one evaluation measured.

    split, note: see `MeasuredData`. n_skipped: bad samples that were left out. answers: None where all samples are
    labelled as confused. recursion: None of a model without it.
    """

    data: str
    split: MeasuredSplit
    note: str | None
    n_skipped: int
    answers: AnswersReport | None
    recursion: RecursionReport | None


def evaluate_checkpoint(settings: EvaluateSettings) -> EvaluationReport:
    """Run the model over the data and write what was asked for.

    Raises:
        UserError: the settings, the checkpoint, the data or the device cannot be used, or an embedding is not finite.
    """
    settings.check()
    plots = None if settings.recursion_plots is None else settings.recursion_plots / "injection.png"
    demand_writable(settings.output, settings.predictions, settings.contact_sheet, settings.answer_sheet,
                    settings.answers_plot, plots)  # fmt: skip
    labels = None if settings.labels is None else different_labels(read_lines(settings.labels, "label"))
    templates = class_templates(settings.label_template, "label_template")
    device = checked_device(settings.device)
    checkpoint = load_checkpoint(settings.checkpoint)
    model = Mamba3Jepa.from_loaded(checkpoint, str(settings.checkpoint), device)
    if settings.answer_sheet is not None and model.y_decoder is None:
        raise UserError(
            f"`answer_sheet` shows generated answers, but {settings.checkpoint} has no Y-Decoder yet: phase 2 trains it"
        )
    for name in ("foreign_questions", "recursion_plots"):
        if getattr(settings, name) is not None and model.recursion is None:
            raise UserError(
                f"`{name}` measures confusion, but {settings.checkpoint} has no confusion monitor: phase 3 trains it"
            )
    listed = () if settings.foreign_questions is None else read_lines(settings.foreign_questions, "question")
    if model.y_decoder is not None:
        settings.generation.demand_choice(model.config.vocab_size)
    measures_recursion = _measures_recursion(model, settings)
    data = open_measured(settings, checkpoint, measures_recursion)
    source, indices = data.source, data.indices
    if len(indices) > settings.samples:
        logger.warning("%s: %d of %d samples are measured; `samples` takes more", source.name, settings.samples,
                       len(indices))  # fmt: skip
    indices = some_of(source, indices, settings.samples)
    about_data = partial(EvaluationReport, data=source.name, split=data.split, note=data.note)
    if not len(indices):
        _demand_nothing_of_answers(settings, source)
        report = about_data(
            n_skipped=0, answers=None, recursion=_recursion(model, data, None, checkpoint, settings, listed)
        )
        _write_numbers(settings, report)
        return report
    if not source.synthetic:
        phases = checkpoint.data.of_phases(checkpoint.phase)
        warn_of_seen(phases, content_of(source, indices).keys, same_split_as=data.held_out_of)
    loader = build_loader(
        source,
        indices,
        model.tokenizer,
        model.config,
        settings.batch_size,
        shuffle=False,
        seed=0,
        drop_last=False,
        workers=settings.workers,
        on_bad_sample=settings.on_bad_sample,
        hard_negatives=None,
    )
    collected = collect(model, loader, model.device)
    LeftOut().say(source.name, collected.bad)
    if not collected.texts:
        raise UserError(f"{source.name}: not one of {len(collected.bad)} samples could be read")
    for what, embeddings in (("predicted", collected.predicted), ("target", collected.target)):
        demand_finite(embeddings, model, f"the {what} embedding of sample", collected.index.tolist())
    found = read_annotations(source, collected.index.tolist())
    choice = answer_choice(model, collected, found, checkpoint.data.answers, settings)
    seen = collected.index.numpy()
    recursion = _recursion(model, data, seen, checkpoint, settings, listed) if measures_recursion else None
    measured, answers = _measure(model, collected, found, data, choice, settings, labels, templates)
    report = about_data(n_skipped=len(collected.bad), answers=measured, recursion=recursion)
    for warning in measured.validation.warnings:
        logger.warning(warning)
    _write(settings, report, measured, collected, answers, found, source)
    return report


def results(settings: EvaluateSettings, report: EvaluationReport) -> dict[str, Any]:
    """All that was measured, ready for JSON."""
    values: dict[str, Any] = {"checkpoint": path_text(settings.checkpoint), "data": report.data}
    values |= {"split": report.split, "note": report.note}
    answers = report.answers
    values["answers_from"] = None if answers is None or answers.choice is None else answers.choice.origin
    values["skipped_samples"] = report.n_skipped
    if answers is not None:
        values |= answers.metrics() | {"by_type": answers.by_type()}
        if answers.validation.swaps is not None:
            values["swaps"] = answers.validation.swaps.rows()
        values["benchmarks"] = {each.benchmark: each.as_json() for each in answers.benchmarks}
    if report.recursion is not None:
        values["recursion"] = report.recursion.as_json()
    return values


def _measures_recursion(model: Mamba3Jepa, settings: EvaluateSettings) -> bool:
    has_both = model.recursion is not None and model.y_decoder is not None
    return has_both and not settings.skip_recursion and not settings.skip_generation


def _demand_nothing_of_answers(settings: EvaluateSettings, source: Source) -> None:
    """Where every sample is labelled as confused or has no answer, there are no right answers to measure."""
    for name in ("labels", "benchmark", "predictions", "contact_sheet", "answer_sheet", "answers_plot"):
        if getattr(settings, name) is not None:
            raise UserError(
                f"`{name}` is about what the model should answer, but all {len(source)} samples of {source.name} are "
                "labelled as confused, or have no answer: leave it out"
            )
    logger.warning("%s: all %d samples are labelled as confused, or have no answer: only confusion is measured",
                   source.name, len(source))  # fmt: skip


def _measure(
    model: Mamba3Jepa,
    collected: Collected,
    found: Sequence[Annotation],
    data: MeasuredData,
    choice: AnswerChoice | None,
    settings: EvaluateSettings,
    labels: Sequence[str] | None,
    templates: Sequence[str],
) -> tuple[AnswersReport, Answers]:
    """All measures of what the model made of some samples, and the answers themselves."""
    gallery = None if choice is None else choice.gallery
    answers, unfinished = _answers(model, collected, found, gallery, settings)
    report = AnswersReport(
        validation=evaluate(collected, gallery, captions=_captions(model, found)),
        nearest=answers.nearest_metrics(),
        generated=None if unfinished is None else answers.metrics(),
        unfinished=unfinished,
        empty=None if unfinished is None else sum(not text.strip() for text in answers.generated) / len(found),
        choice=choice,
        zero_shot=None if labels is None else _zero_shot(model, collected, labels, templates, settings),
        benchmarks=_benchmarks(answers, found, data.source, settings.benchmark),
    )
    return report, answers


def _recursion(
    model: Mamba3Jepa,
    data: MeasuredData,
    pictures: NDArray[np.int64] | None,
    checkpoint: Checkpoint,
    settings: EvaluateSettings,
    listed: Sequence[str],
) -> RecursionReport:
    """What phase 3 is for; pictures: see `measure_recursion`."""
    return measure_recursion(
        model,
        data.source,
        data.confusion_indices,
        seed=int(checkpoint.run["seed"]),
        kinds=settings.confusion_kinds,
        samples=settings.samples,
        listed=listed,
        pictures=pictures,
        batch_size=settings.batch_size,
        workers=settings.workers,
        on_bad_sample=settings.on_bad_sample,
    )


def _zero_shot(
    model: Mamba3Jepa, collected: Collected, labels: Sequence[str], templates: Sequence[str], settings: EvaluateSettings
) -> ZeroShotReport:
    embeddings = class_embeddings(model, labels, templates)
    report = zero_shot(collected.predicted, collected.texts, labels, embeddings, len(templates))
    if report is None:
        raise UserError(
            f"{settings.labels}: none of the {len(collected.texts)} samples has one of these {len(labels)} labels "
            f"as its answer or caption, such as {labels[0]!r}; the first one has {collected.texts[0]!r}"
        )
    return report


def _captions(model: Mamba3Jepa, found: Sequence[Annotation]) -> Captions | None:
    """All captions, embedded; None where no image has more than one. Of several lines with one picture the first
    stands for it."""
    images = {each.picture or f"row {row}": row for row, each in reversed(list(enumerate(found))) if each.captions}
    rows = sorted(images.values())
    if all(len(found[row].captions) == 1 for row in rows):
        return None
    sample = [row for row in rows for _ in found[row].captions]
    texts = [caption for row in rows for caption in found[row].captions]
    embeddings = model.embed_text(texts).cpu()
    return Captions(texts=texts, embeddings=demand_finite(embeddings, model, "the embedding of", texts), sample=sample)


def _benchmarks(
    answers: Answers, found: Sequence[Annotation], source: Source, benchmark: str | None
) -> list[BenchmarkReport]:
    """The benchmarks that the questions belong to; says what is odd about the questions."""
    rows = [row for row, each in enumerate(found) if each.question is not None]
    given = {"nearest": answers.nearest} | ({"generated": answers.generated} if answers.generated else {})
    reports = benchmark_reports(
        [question for each in found if (question := each.question) is not None],
        {way: [texts[row] for row in rows] for way, texts in given.items()},
        benchmark,
    )
    if benchmark is not None and not reports:
        raise UserError(
            f"`benchmark` {benchmark}: {source.name} has no question that it is measured on, of {len(rows)} questions"
        )
    for report in reports:
        if report.odd_counts:
            logger.warning(
                "%s: %d of %d questions do not have %d answers; published VQA accuracies are of so many",
                source.name, report.odd_counts, report.scores.questions, N_ANSWERS,
            )  # fmt: skip
    if reports and (repeated := repeated_ids(found)):
        logger.warning("%s: %d questions have the id of an earlier one; each counts", source.name, repeated)
    return reports


def _answers(
    model: Mamba3Jepa,
    collected: Collected,
    found: Sequence[Annotation],
    gallery: TextGallery | None,
    settings: EvaluateSettings,
) -> tuple[Answers, float | None]:
    """What is nearest and what is generated, and the share of the latter that met the limit; None if none are."""
    said: list[tuple[str, bool]] = []
    if model.y_decoder is not None and not settings.skip_generation and collected.texts:
        said = generate_texts(model, collected.predicted, settings.generation, settings.batch_size)
    answers = Answers(
        index=collected.index.tolist(),
        questions=collected.questions,
        types=collected.types,
        expected=collected.texts,
        generated=[text for text, _ in said],
        nearest=nearest_texts(collected.predicted, collected.target, collected.texts, collected.questions, gallery),
        also_right=[
            tuple(caption for caption in each.captions if caption != expected)
            for each, expected in zip(found, collected.texts, strict=True)
        ],
    )
    return answers, sum(not finished for _, finished in said) / len(said) if said else None


def _write(
    settings: EvaluateSettings,
    report: EvaluationReport,
    measured: AnswersReport,
    collected: Collected,
    answers: Answers,
    found: Sequence[Annotation],
    source: Source,
) -> None:
    """The files that were asked for."""
    nearest = measured.nearest.by_type
    if settings.answers_plot is not None and not nearest:
        raise UserError(f"`answers_plot`: {report.data} has no questions to draw")
    _write_numbers(settings, report)
    if settings.contact_sheet is not None:
        gallery = None if measured.choice is None else measured.choice.gallery
        write_contact_sheet(collected, source, settings.contact_sheet, gallery)
    if settings.answer_sheet is not None:
        write_answer_sheet(answers, source, settings.answer_sheet)
    if settings.answers_plot is not None:
        generated = None if measured.generated is None else measured.generated.by_type
        plot_answers_by_type(settings.answers_plot, generated=generated, nearest=nearest)
    if settings.predictions is not None:
        write_predictions(answers, found, settings.predictions)


def _write_numbers(settings: EvaluateSettings, report: EvaluationReport) -> None:
    """And the pictures of them."""
    if settings.output is not None:
        write_json(settings.output, results(settings, report))
    if settings.recursion_plots is not None and report.recursion is not None:
        report.recursion.trials.plot(settings.recursion_plots)
