"""Pictures of what a model does now, from what a validation collected."""

from __future__ import annotations

from pathlib import Path

from mamba3_jepa.data.sample import Source, image_to_show
from mamba3_jepa.evaluation.contact_sheet import contact_sheet
from mamba3_jepa.evaluation.retrieval import top_texts
from mamba3_jepa.evaluation.text_gallery import TextGallery, asked_rows, caption_rows
from mamba3_jepa.evaluation.validate import Collected

_CARDS, _TOP_TEXTS = 12, 5


def write_contact_sheet(collected: Collected, source: Source, path: Path, answers: TextGallery | None = None) -> Path:
    """The first few captions and questions with the texts nearest to their predicted embeddings.

    Captions are looked up among the captions, questions among `answers`, or else among their own right answers.
    """
    captions, questions = caption_rows(collected.questions), asked_rows(collected.questions)
    half = _CARDS // 2
    chosen = captions[: _CARDS - min(half, len(questions))]
    chosen += questions[: _CARDS - len(chosen)]
    nearest: dict[int, list[tuple[str, float]]] = {}
    for rows, gallery in ((captions, None), (questions, answers)):
        wanted = [i for i in rows if i in set(chosen)]
        if wanted:
            gallery = gallery or TextGallery.of_rows(collected.texts, collected.target, rows)
            top = top_texts(collected.predicted[wanted], gallery.embeddings, gallery.texts, k=_TOP_TEXTS)
            nearest |= zip(wanted, top, strict=True)
    return contact_sheet(
        images=[image_to_show(source, int(collected.index[i])) for i in chosen],
        questions=[collected.questions[i] for i in chosen],
        expected=[collected.texts[i] for i in chosen],
        retrieved=[nearest[i] for i in chosen],
        path=path,
    )
