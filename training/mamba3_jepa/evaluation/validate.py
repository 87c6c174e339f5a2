"""From a model and validation batches to the numbers of one evaluation.

`collect` runs the model once over the batches; `evaluate` turns what it collected into a `ValidationReport`.
Shapes: N samples, E embedding size, T distinct texts, G answers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mamba3_jepa.data.batch import Batch
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.answer_metrics import by_type_metrics
from mamba3_jepa.evaluation.embedding_metrics import (
    alignment,
    collapse_warning,
    effective_rank,
    same_point_warning,
    uniformity,
)
from mamba3_jepa.evaluation.retrieval import (
    AnswerReport,
    RetrievalReport,
    answer_accuracy,
    caption_retrieval,
    distinct,
    nearest_answer,
    retrieval,
)
from mamba3_jepa.evaluation.swaps import SwapReport, WrongText, swap_accuracy, wrong_texts
from mamba3_jepa.evaluation.text_gallery import TextGallery, asked_rows, caption_rows
from mamba3_jepa.models.network import eval_mode
from mamba3_jepa.models.vljepa import Mamba3Jepa

# Answers that are compared with each other: so many at most, and none that is rarer among the questions.
_FREQUENT_ANSWERS, _FREQUENT_SHARE = 100, 0.01


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What the model made of N samples, on the CPU in float32, in the order of the batches."""

    predicted: Tensor  # (N, E) L2-normalised
    target: Tensor  # (N, E) L2-normalised
    texts: list[str]  # N answers or captions
    questions: list[str | None]  # N; None for captions
    types: list[str | None]  # N, what is asked, see `question_type.asked_type`; None for captions
    index: Tensor  # (N,) int64, the samples' numbers in their source
    gate_activity: Tensor | None  # (n_layers,) mean over the samples; None without ANGN
    bad: list[str] = field(default_factory=list)  # what was wrong with each sample that was left out
    wrong: list[WrongText] = field(default_factory=list)  # texts that are wrong for a sample, beside its right one


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Every caption of some samples: T texts, their (T, E) embeddings, and for each the position of its sample."""

    texts: list[str]
    embeddings: Tensor
    sample: list[int]


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """The numbers of one evaluation; `warnings` are sentences to be said aloud."""

    n_samples: int
    retrieval: RetrievalReport
    answers: AnswerReport | None
    swaps: SwapReport | None
    alignment: float
    uniformity_predicted: float
    uniformity_target: float
    effective_rank_predicted: float
    effective_rank_target: float
    gate_activity: tuple[float, ...]
    warnings: tuple[str, ...]

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """Flat numbers for `metrics.jsonl`. With the prefix `val`:

        - `val/image_to_text_r{1,5,10}`, `val/text_to_image_r{1,5,10}`: recall in [0, 1];
        - `val/gallery_texts`, `val/gallery_images`, `val/samples`: sizes;
        - `val/alignment`; `val/uniformity_predicted`, `val/uniformity_target`, their mean `val/uniformity`;
        - `val/effective_rank_predicted`, `val/effective_rank_target`;
        - with questions: `val/answer_accuracy`, `val/questions`, and `val/answer_accuracy_{type}` of the most frequent
          question types, such as `val/answer_accuracy_what_color`, of scenes `val/answer_accuracy_color`;
        - with negatives: `val/swap_accuracy`, `val/swap_chance`, `val/swap_samples`, `val/swap_accuracy_{kind}`;
        - with ANGN: `val/gate_activity_{layer}`, the mean gate of each layer in [0, 1].
        """
        values: dict[str, float] = {}
        for k, recall in self.retrieval.image_to_text.items():
            values[f"image_to_text_r{k}"] = recall
        for k, recall in self.retrieval.text_to_image.items():
            values[f"text_to_image_r{k}"] = recall
        values["gallery_texts"] = self.retrieval.gallery_texts
        values["gallery_images"] = self.retrieval.gallery_images
        values["samples"] = self.n_samples
        values["alignment"] = self.alignment
        values["uniformity"] = (self.uniformity_predicted + self.uniformity_target) / 2
        values["uniformity_predicted"] = self.uniformity_predicted
        values["uniformity_target"] = self.uniformity_target
        values["effective_rank_predicted"] = self.effective_rank_predicted
        values["effective_rank_target"] = self.effective_rank_target
        if self.answers is not None:
            values["answer_accuracy"] = self.answers.accuracy
            values["questions"] = self.answers.n_questions
            values |= by_type_metrics("answer_accuracy", self.answers.by_type)
        if self.swaps is not None:
            values |= self.swaps.metrics()
        for layer, activity in enumerate(self.gate_activity):
            values[f"gate_activity_{layer}"] = activity
        return {f"{prefix}/{name}": value for name, value in values.items()}


@torch.no_grad()
def collect(
    model: Mamba3Jepa,
    batches: Iterable[Batch],
    device: torch.device | str,
    precision: AbstractContextManager | None = None,
) -> Collected:
    """Predicted and target embeddings of every sample. The model is in eval mode only meanwhile.

    No batch at all gives N = 0: one of several processes may have no share of a small validation set.

    Args:
        precision: entered once around the whole pass, such as `accelerator.autocast()`.
    """
    predicted = [torch.empty(0, model.config.embed_dim)]
    target = [torch.empty(0, model.config.embed_dim)]
    index = [torch.empty(0, dtype=torch.int64)]
    activity = None if model.angn is None else torch.zeros(model.config.predictor.n_layers)
    texts: list[str] = []
    questions: list[str | None] = []
    types: list[str | None] = []
    bad: list[str] = []
    wrong: list[WrongText] = []
    with eval_mode(model), precision or nullcontext():
        for batch in batches:
            bad += batch.bad
            if len(batch) == 0:
                continue
            batch = batch.to(device)
            embedding = model(*batch.inputs()).embedding.float()
            right = model.y_encoder(batch.target_ids, batch.target_mask).float()
            wrong += wrong_texts(model.y_encoder, batch, embedding, right, start=len(texts))
            predicted.append(embedding.cpu())
            target.append(right.cpu())
            texts += batch.targets
            questions += batch.questions
            types += batch.types
            index.append(batch.index.cpu())
            if activity is not None and model.angn is not None:
                activity += model.angn.activity().float().cpu() * len(batch)
    return Collected(
        predicted=torch.cat(predicted),
        target=torch.cat(target),
        texts=texts,
        questions=questions,
        types=types,
        index=torch.cat(index),
        bad=bad,
        wrong=wrong,
        gate_activity=None if activity is None else activity / max(1, len(texts)),
    )


def merge(parts: Sequence[Collected]) -> Collected:
    """What several processes collected, as one, in their order; a process may have collected nothing."""
    total = max(1, sum(len(part.texts) for part in parts))
    starts = list(itertools.accumulate((len(part.texts) for part in parts), initial=0))
    activity = [part.gate_activity * (len(part.texts) / total) for part in parts if part.gate_activity is not None]
    return Collected(
        predicted=torch.cat([part.predicted for part in parts]),
        target=torch.cat([part.target for part in parts]),
        texts=[text for part in parts for text in part.texts],
        questions=[question for part in parts for question in part.questions],
        types=[each for part in parts for each in part.types],
        index=torch.cat([part.index for part in parts]),
        bad=[message for part in parts for message in part.bad],
        wrong=[
            replace(each, sample=start + each.sample)
            for part, start in zip(parts, starts, strict=False)
            for each in part.wrong
        ],
        gate_activity=torch.stack(activity).sum(dim=0) if activity else None,
    )


def evaluate(
    collected: Collected,
    answers: TextGallery | None = None,
    captions: Captions | None = None,
) -> ValidationReport:
    """Retrieval, answers, and the state of the embeddings.

    Retrieval is computed on the captions (samples without a question) when there are at least two distinct
    ones, and on all samples otherwise. A question is answered by the nearest answer embedding.

    Args:
        answers: what questions may be answered with; unless given, all answers that are right for one of them.
        captions: where images have several, all of them, which retrieval is then computed on.

    Raises:
        UserError: nothing was collected.
    """
    if not collected.texts:
        raise UserError("validation: there is no sample to evaluate; is the held-out split empty?")
    _, first = distinct(collected.texts)
    text_embeddings = collected.target[first]  # (T, E): a text that occurs often is still one point
    warnings = (
        collapse_warning(collected.predicted, "predicted", n_distinct=len(first)),
        collapse_warning(text_embeddings, "target") or _same_point(collected),
    )
    activity = () if collected.gate_activity is None else tuple(collected.gate_activity.tolist())
    return ValidationReport(
        n_samples=len(collected.texts),
        retrieval=_retrieval(collected, captions),
        answers=_answer(collected, answers),
        swaps=swap_accuracy(collected.wrong, collected.questions),
        alignment=alignment(collected.predicted, collected.target),
        uniformity_predicted=uniformity(collected.predicted),
        uniformity_target=uniformity(text_embeddings),
        effective_rank_predicted=effective_rank(collected.predicted),
        effective_rank_target=effective_rank(text_embeddings),
        gate_activity=activity,
        warnings=tuple(warning for warning in warnings if warning is not None),
    )


def _same_point(collected: Collected) -> str | None:
    """A warning if frequent answers have fallen on one point, as "yes" and "no" may."""
    rows = asked_rows(collected.questions)
    counts = Counter(collected.texts[i] for i in rows)
    frequent = [text for text, count in counts.most_common(_FREQUENT_ANSWERS) if count >= _FREQUENT_SHARE * len(rows)]
    first = {text: i for i, text in reversed(list(enumerate(collected.texts)))}
    return same_point_warning(collected.target[[first[text] for text in frequent]], frequent) if frequent else None


def _retrieval(collected: Collected, captions: Captions | None) -> RetrievalReport:
    if captions is not None:
        rows = sorted(set(captions.sample))
        number = {row: i for i, row in enumerate(rows)}
        image_of = [number[row] for row in captions.sample]
        return caption_retrieval(collected.predicted[rows], captions.embeddings, captions.texts, image_of)
    rows = caption_rows(collected.questions)
    if len({collected.texts[i] for i in rows}) < 2:
        rows = list(range(len(collected.texts)))
    return retrieval(collected.predicted[rows], collected.target[rows], [collected.texts[i] for i in rows])


def _answer(collected: Collected, answers: TextGallery | None) -> AnswerReport | None:
    rows = asked_rows(collected.questions)
    if not rows:
        return None
    expected = [collected.texts[i] for i in rows]
    answers = answers or TextGallery.of_rows(collected.texts, collected.target, rows)
    given = nearest_answer(collected.predicted[rows], answers.embeddings, answers.texts)
    return answer_accuracy(given, expected, [collected.types[i] or "" for i in rows])
