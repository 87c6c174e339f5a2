"""The command group `mamba3-jepa prepare ...`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated

import tyro

from mamba3_jepa.cli.commands import Commands
from mamba3_jepa.cli.output import say, write_out
from mamba3_jepa.settings.prepare import (
    CocoCaptionsSettings,
    EasyVqaSettings,
    GqaSettings,
    LlavaSettings,
    ParquetSettings,
    PopeSettings,
    PublishedSettings,
    SceneFilesSettings,
    TallyQaSettings,
    VqaV2Settings,
)

if TYPE_CHECKING:
    from mamba3_jepa.data.published.manifest import LeftOut, Line, Written

prepare = Commands()


@prepare.command(name="easy-vqa")
def prepare_easy_vqa(settings: Annotated[EasyVqaSettings, tyro.conf.arg(name="")]) -> None:
    """Write the easy-VQA data set (PyPI package easy-vqa) as a data directory, with its own test split."""
    from mamba3_jepa.data.easy_vqa import prepare_easy_vqa as write

    summary = write(settings.output)
    if settings.json:
        write_out(summary)
        return
    say(
        f"{summary.output_dir}: {summary.train_questions:,} training questions on {summary.train_images:,} images "
        f"(manifest.jsonl), {summary.test_questions:,} test questions on {summary.test_images:,} images (test.jsonl), "
        f"{summary.answers} different answers"
    )


@prepare.command(name="scenes")
def prepare_scenes(settings: Annotated[SceneFilesSettings, tyro.conf.arg(name="")]) -> None:
    """Write held-out synthetic scenes as a data directory: pictures to look at and to ask about."""
    from mamba3_jepa.data.scene_files import write_scenes

    lines = write_scenes(settings.output, settings.scenes, settings.image_size, settings.seed)
    if settings.json:
        write_out({"output_dir": settings.output, "scenes": settings.scenes, "lines": lines})
        return
    n = settings.scenes
    say(f"{settings.output}: {n:,} scenes, {lines:,} lines in manifest.jsonl, {2 * n:,} in demonstrations.jsonl")


@prepare.command(name="vqav2")
def prepare_vqav2(settings: Annotated[VqaV2Settings, tyro.conf.arg(name="")]) -> None:
    """Write a manifest of VQA v2 from its questions and annotations, with all ten answers of each question."""
    from mamba3_jepa.data.published.vqav2 import vqav2_lines

    _write(settings, "vqav2", lambda left_out: vqav2_lines(settings.questions, settings.annotations, left_out))


@prepare.command(name="coco-captions")
def prepare_coco_captions(settings: Annotated[CocoCaptionsSettings, tyro.conf.arg(name="")]) -> None:
    """Write a manifest of COCO captions, all five of each image: COCO's own files, or Karpathy's splits."""
    from mamba3_jepa.data.published.coco_captions import coco_lines

    _write(settings, "coco-captions", lambda left_out: coco_lines(settings.captions, settings.splits, left_out))


@prepare.command(name="gqa")
def prepare_gqa(settings: Annotated[GqaSettings, tyro.conf.arg(name="")]) -> None:
    """Write a manifest of GQA from its files of questions."""
    from mamba3_jepa.data.published.gqa import gqa_lines

    _write(settings, "gqa", lambda left_out: gqa_lines(settings.questions))


@prepare.command(name="tallyqa")
def prepare_tallyqa(settings: Annotated[TallyQaSettings, tyro.conf.arg(name="")]) -> None:
    """Write a manifest of TallyQA, questions that count."""
    from mamba3_jepa.data.published.tallyqa import tallyqa_lines

    _write(settings, "tallyqa", lambda left_out: tallyqa_lines(settings.questions))


@prepare.command(name="pope")
def prepare_pope(settings: Annotated[PopeSettings, tyro.conf.arg(name="")]) -> None:
    """Write a manifest of POPE, which asks whether objects are there that are not."""
    from mamba3_jepa.data.published.pope import pope_lines

    _write(settings, "pope", lambda left_out: pope_lines(settings.questions))


@prepare.command(name="llava")
def prepare_llava(settings: Annotated[LlavaSettings, tyro.conf.arg(name="")]) -> None:
    """Write a manifest of LLaVA's conversations, a line for each question in them."""
    from mamba3_jepa.data.published.llava import llava_lines

    _write(settings, "llava", lambda left_out: llava_lines(settings.conversations, left_out))


@prepare.command(name="parquet")
def prepare_parquet(settings: Annotated[ParquetSettings, tyro.conf.arg(name="")]) -> None:
    """Write a data directory from parquet files that hold the images, as those of the Hugging Face hub."""
    from mamba3_jepa.data.published.parquet import Columns
    from mamba3_jepa.data.published.parquet import prepare_parquet as write

    columns = Columns(
        image=settings.image_column,
        question=settings.question_column,
        answer=settings.answer_column,
        answers=settings.answers_column,
        captions=settings.captions_column,
    )
    _say(write(settings.files, settings.output, columns), json=settings.json)


def _write(settings: PublishedSettings, dataset: str, lines: Callable[[LeftOut], Iterable[Line]]) -> None:
    from mamba3_jepa.data.published.manifest import LeftOut, write_manifest

    left_out = LeftOut()
    _say(write_manifest(settings.output, settings.data_dir, lines(left_out), left_out, dataset), json=settings.json)


def _say(written: Written, *, json: bool) -> None:
    if json:
        left_out = [{"reason": reason} | vars(tally) for reason, tally in written.left_out.tallies.items()]
        write_out({"path": written.path, "lines": written.lines, "images": written.images, "left_out": left_out})
        return
    say(f"{written.path}: {written.lines:,} lines about {written.images:,} images")
    for sentence in written.left_out.sentences():
        say(f"left out: {sentence}")
