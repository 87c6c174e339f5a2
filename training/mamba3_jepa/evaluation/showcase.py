"""Pictures of what a model does now, from what a validation collected."""

from __future__ import annotations

from pathlib import Path

from mamba3_jepa.data.sample import Source, image_to_show
from mamba3_jepa.evaluation.contact_sheet import contact_sheet
from mamba3_jepa.evaluation.retrieval import distinct, top_texts
from mamba3_jepa.evaluation.validate import Collected

_CARDS, _TOP_TEXTS = 12, 5


def write_contact_sheet(collected: Collected, source: Source, path: Path) -> Path:
    """The first few captions and questions with the texts nearest to their predicted embeddings.

    Captions are looked up among the captions, questions among the answers.
    """
    captions = [i for i, question in enumerate(collected.questions) if question is None]
    questions = [i for i, question in enumerate(collected.questions) if question is not None]
    half = _CARDS // 2
    chosen = captions[: _CARDS - min(half, len(questions))]
    chosen += questions[: _CARDS - len(chosen)]
    nearest = {i: texts for rows in (captions, questions) for i, texts in _nearest(collected, rows, chosen)}
    return contact_sheet(
        images=[image_to_show(source, int(collected.index[i])) for i in chosen],
        questions=[collected.questions[i] for i in chosen],
        expected=[collected.texts[i] for i in chosen],
        retrieved=[nearest[i] for i in chosen],
        path=path,
    )


def _nearest(collected: Collected, gallery: list[int], chosen: list[int]) -> list[tuple[int, list[tuple[str, float]]]]:
    """For each chosen row that belongs to the gallery: its nearest distinct texts with their cosines."""
    wanted = [i for i in gallery if i in set(chosen)]
    if not wanted:
        return []
    _, first = distinct([collected.texts[i] for i in gallery])
    rows = [gallery[i] for i in first]
    texts = [collected.texts[i] for i in rows]
    top = top_texts(collected.predicted[wanted], collected.target[rows], texts, k=_TOP_TEXTS)
    return list(zip(wanted, top, strict=True))
