"""The easy-VQA data set (questions about coloured shapes, 13 answers), from the PyPI package of that name."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.json_file import json_line
from mamba3_jepa.files.whole_file import whole_folder


@dataclass(frozen=True, kw_only=True)
class EasyVqaSummary:
    """What was written."""

    output_dir: Path
    train_images: int
    train_questions: int
    test_images: int
    test_questions: int
    answers: int


def prepare_easy_vqa(output_dir: str | Path) -> EasyVqaSummary:
    """Writes easy-VQA as a data directory.

    `manifest.jsonl` holds its training questions, `test.jsonl` its own test split, `images/train/N.png` and
    `images/test/N.png` the pictures. All of it appears at once: written beside `output_dir`, then renamed.

    Raises:
        UserError: the package is not installed, `output_dir` holds something already, or cannot be written.
    """
    if importlib.util.find_spec("easy_vqa") is None:
        raise UserError("the package easy-vqa, which carries the data, is not installed: pip install easy-vqa")
    import easy_vqa

    output = Path(output_dir)
    with whole_folder(output) as build:
        train_images = _copy_images(easy_vqa.get_train_image_paths(), build / "images" / "train")
        test_images = _copy_images(easy_vqa.get_test_image_paths(), build / "images" / "test")
        train = _write_manifest(build / "manifest.jsonl", "train", easy_vqa.get_train_questions())
        test = _write_manifest(build / "test.jsonl", "test", easy_vqa.get_test_questions())
    return EasyVqaSummary(
        output_dir=output,
        train_images=train_images,
        train_questions=train,
        test_images=test_images,
        test_questions=test,
        answers=len(easy_vqa.get_answers()),
    )


def _copy_images(paths: dict[int, str], folder: Path) -> int:
    folder.mkdir(parents=True)
    for number, path in paths.items():
        shutil.copyfile(path, folder / f"{number}.png")
    return len(paths)


def _write_manifest(path: Path, split: str, questions: tuple[list[str], list[str], list[int]]) -> int:
    with path.open("wb") as file:
        for question, answer, number in zip(*questions, strict=True):
            record: dict[str, Any] = {
                "image": f"images/{split}/{number}.png",
                "question": question,
                "answer": answer,
            }
            file.write(json_line(record))
    return len(questions[0])
