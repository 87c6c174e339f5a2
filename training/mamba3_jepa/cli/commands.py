"""The command groups `mamba3-jepa prepare ...` and `mamba3-jepa bench ...`."""

from __future__ import annotations

from pathlib import Path

import tyro
from rich.console import Console

prepare = tyro.extras.SubcommandApp()
bench = tyro.extras.SubcommandApp()


@prepare.command(name="easy-vqa")
def prepare_easy_vqa(output: Path) -> None:
    """Write the easy-VQA data set (PyPI package easy-vqa) as a data directory, with its own test split.

    Args:
        output: The data directory to make.
    """
    from mamba3_jepa.data.easy_vqa import prepare_easy_vqa as write

    summary = write(output)
    Console().print(
        f"{summary.output_dir}: {summary.train_questions:,} training questions on {summary.train_images:,} images "
        f"(manifest.jsonl), {summary.test_questions:,} test questions on {summary.test_images:,} images (test.jsonl), "
        f"{summary.answers} different answers",
        highlight=False,
    )
