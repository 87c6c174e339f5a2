"""Settings of `mamba3-jepa prepare ...`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mamba3_jepa.settings.common import Json
from mamba3_jepa.settings.limits import PIXELS, Checked, HashedSeed, Range

_FilePath = Annotated[Path, tyro.conf.arg(metavar="FILE")]
_FilePaths = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]
_Column = Annotated[str, tyro.conf.arg(metavar="NAME|auto|none")]


@dataclass(frozen=True, kw_only=True)
class EasyVqaSettings(Checked):
    """Where easy-VQA goes."""

    output: Path
    """The data directory to make."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class SceneFilesSettings(Checked):
    """Which scenes, and where they go."""

    output: Path
    """The data directory to make."""
    scenes: Annotated[int, Range(1, 10_000_000)] = 32
    """How many pictures."""
    image_size: Annotated[int, Range(16, PIXELS.high)] = 64
    """Their side in pixels."""
    seed: HashedSeed = 0
    """Other scenes with another seed."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class PublishedSettings(Checked):
    """Where the images of a published data set lie, and where its manifest goes."""

    data_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder that all its images are in, at whatever depth; they are not copied. Give the same to train-jepa."""
    output: _FilePath
    """The manifest to write, for --manifest of train-jepa and evaluate."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class VqaV2Settings(PublishedSettings):
    """The files of one split of VQA v2."""

    questions: _FilePath
    """v2_OpenEnded_mscoco_train2014_questions.json, or of another split."""
    annotations: _FilePath
    """v2_mscoco_train2014_annotations.json, or of another split."""


@dataclass(frozen=True, kw_only=True)
class CocoCaptionsSettings(PublishedSettings):
    """A file of COCO captions."""

    captions: _FilePath
    """captions_train2014.json, or of another split or year; or dataset_coco.json with Karpathy's splits."""
    splits: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SPLIT ...")] = ()
    """Of Karpathy's splits only these: train, restval, val, test; default: all."""


@dataclass(frozen=True, kw_only=True)
class GqaSettings(PublishedSettings):
    """Files of GQA."""

    questions: _FilePaths
    """train_balanced_questions.json, or of another split that has answers; several are one manifest."""


@dataclass(frozen=True, kw_only=True)
class TallyQaSettings(PublishedSettings):
    """A file of TallyQA."""

    questions: _FilePath
    """train.json or test.json."""


@dataclass(frozen=True, kw_only=True)
class PopeSettings(PublishedSettings):
    """Files of POPE."""

    questions: _FilePaths
    """coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json; several are one manifest."""


@dataclass(frozen=True, kw_only=True)
class LlavaSettings(PublishedSettings):
    """A file of LLaVA's instruction data."""

    conversations: _FilePath
    """llava_instruct_150k.json, llava_v1_5_mix665k.json, or another list of conversations."""


@dataclass(frozen=True, kw_only=True)
class ParquetSettings(Checked):
    """Parquet files with images in them, and where these go."""

    files: _FilePaths
    """The .parquet files of one split; they are one manifest."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The data directory to make: manifest.jsonl, and the images in images/."""
    image_column: Annotated[str, tyro.conf.arg(metavar="NAME|auto")] = "auto"
    """The column of images; auto: image, img, jpg or png."""
    question_column: _Column = "auto"
    """The column of questions; auto: question or query, if there is one; none, here and below: there is none."""
    answer_column: _Column = "auto"
    """The column of the answer that is trained on; auto: answer or multiple_choice_answer, if there is one."""
    answers_column: _Column = "auto"
    """The column of all answers to a question; auto: answers, if there is one."""
    captions_column: _Column = "auto"
    """The column of captions, one or several a row; auto: captions, caption, sentences, text or label, if there is
    one."""
    json: Json = False
