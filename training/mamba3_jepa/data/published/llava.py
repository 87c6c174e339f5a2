"""LLaVA's instruction data: conversations about an image, or none, in turns of "human" and "gpt" (Liu et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamba3_jepa.data.published.fields import Fields
from mamba3_jepa.data.published.manifest import LeftOut, Line
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.json_stream import json_entries

_IMAGE = "<image>"  # where the image goes among the words
_SPEAKERS = ("human", "gpt", "system")


def llava_lines(conversations: Path, left_out: LeftOut) -> Iterator[Line]:
    """A line for each question with its answer; what was said before in the conversation is not in it.

    Raises:
        UserError: the file is not in this layout.
    """
    for entry in json_entries(conversations):
        talk = Fields(entry.value, entry.where)
        image = talk.kept("image").get("image")
        if isinstance(image, list):
            left_out.add("conversations about several images", entry.where)
            continue
        images = () if image is None or image == "" else (talk.text("image"),)  # with its key, without, or null
        for turn, (question, answer) in enumerate(_exchanges(talk, left_out), start=1):
            if not images and not question:
                left_out.add("turns without question or answer", entry.where)
                continue
            yield Line(entry.where, images, _said(question, answer, bool(images)) | _named(talk, turn))


def _exchanges(talk: Fields, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """Each question with what follows it."""
    question: str | None = None
    for said in talk.objects("conversations"):
        speaker, words = said.text("from"), said.text("value").replace(_IMAGE, " ").strip()
        if speaker not in _SPEAKERS:
            raise UserError(f'{said.where}: field "from": expected {", ".join(_SPEAKERS)}, found {speaker!r}')
        if speaker == "gpt" and question is not None and words:
            yield question, words
            question = None
        elif speaker != "human" or question is not None:
            left_out.add("turns without question or answer", said.where)
        if speaker == "human":
            question = words
    if question is not None:
        left_out.add("turns without question or answer", talk.where)


def _said(question: str, answer: str, has_image: bool) -> dict[str, Any]:
    """One question about the image, a request without one, or, where nothing but the image is shown, a caption."""
    if not has_image:
        return {"query": question, "answer": answer}
    return {"question": question, "answer": answer} if question else {"captions": [answer]}


def _named(talk: Fields, turn: int) -> dict[str, Any]:
    return {"id": talk.identity("id"), "meta": {"turn": turn}} if "id" in talk else {"meta": {"turn": turn}}
