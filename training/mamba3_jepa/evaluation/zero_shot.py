"""Zero-shot classification: classes told apart by the embeddings of their names.

Shapes: N samples, L labels, P templates, E embedding size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mamba3_jepa.data.plain_text import plain_text
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.retrieval import label_recall
from mamba3_jepa.files.lines import texts_or_file
from mamba3_jepa.models.finite import demand_finite
from mamba3_jepa.models.vljepa import Mamba3Jepa

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ZeroShotReport:
    """Samples whose text is one of the labels; recall: the share with the right label among the nearest k."""

    recall: dict[int, float]
    n_samples: int
    n_labels: int
    n_templates: int


def class_templates(values: Sequence[str], setting: str) -> list[str]:
    """The different templates given, or the lines of the file that the only one of them names.

    Raises:
        UserError: one does not have `{}` once, or names no file; names the setting.
    """
    templates = texts_or_file(values, "template", setting)
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"`{setting}` {template!r}: must contain {{}} once, where the label goes")
    return templates


def different_labels(labels: Sequence[str]) -> list[str]:
    """Those that differ in more than case and white space, the first of each; says how many others there were."""
    first = list({plain_text(label): label for label in reversed(labels)}.values())[::-1]
    if len(first) < len(labels):
        logger.warning("%d of %d labels differ from another in case only: each counts once",
                       len(labels) - len(first), len(labels))  # fmt: skip
    return first


def class_embeddings(model: Mamba3Jepa, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(L, E) of unit length, on the CPU: for each label the mean direction of its P texts, one for each template.

    Averaging in embedding space is what CLIP calls prompt ensembling (Radford et al. 2021, arXiv 2103.00020).

    Args:
        templates: texts with one `{}` each, where the label goes.

    Raises:
        UserError: no label, or an empty text; an embedding is not finite.
    """
    texts = [template.replace("{}", label) for label in labels for template in templates]
    embeddings = demand_finite(model.embed_text(texts).cpu(), model, "the embedding of the label", texts)
    return F.normalize(embeddings.unflatten(0, (len(labels), len(templates))).mean(dim=1), dim=-1)


def zero_shot(
    predicted: Tensor, texts: Sequence[str], labels: Sequence[str], embeddings: Tensor, n_templates: int = 1
) -> ZeroShotReport | None:
    """Classify the samples whose text is one of the labels, but for case and white space; None if there are none.

    Args:
        predicted: (N, E), of the N samples with these texts.
        embeddings: (L, E), of the L labels, made with so many templates.
    """
    number = {plain_text(label): i for i, label in enumerate(labels)}
    rows = [i for i, text in enumerate(texts) if plain_text(text) in number]
    if not rows:
        return None
    recall = label_recall(predicted[rows], embeddings, [number[plain_text(texts[i])] for i in rows])
    return ZeroShotReport(recall=recall, n_samples=len(rows), n_labels=len(labels), n_templates=n_templates)
