"""A contrast without negatives is said at the start, where it can be known, and in the run, where it shows."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from mamba3_jepa.cli.main import main
from mamba3_jepa.training.negatives import NegativesWatch

AT_START = "nothing is learned; give"


def write_pairs(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        Image.new("RGB", (32, 32), (i * 16 % 256, 0, 255 - i * 16 % 256)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


def warnings_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, texts: list[str], *arguments: str) -> list[str]:
    data, run = write_pairs(tmp_path / "data", texts), tmp_path / "run"
    given = ["--tiny", "--cpu", "--val-fraction", "0.3", "--epochs", "1", "--log-every", "1", *arguments]
    assert main(["train-jepa", *given, "--data-dir", str(data), "--output-dir", str(run)]) == 0
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_batch_of_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = warnings_of(tmp_path, caplog, [f"number {i}" for i in range(16)], "--batch-size", "1", "--max-steps", "3")
    assert next(text for text in said if AT_START in text).startswith("a batch of 1 has no negatives")
    assert any("epoch 1: 3 of 3 batches had one text each" in text for text in said)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["train/negatives"] for line in logged if "train/negatives" in line} == {0}


@pytest.mark.parametrize("texts", [["a photo"] * 16, [f"{'so long a text ' * 40}{i}" for i in range(16)]])
def test_one_text_for_all(tmp_path: Path, caplog: pytest.LogCaptureFixture, texts: list[str]) -> None:
    said = warnings_of(tmp_path, caplog, texts, "--batch-size", "4")
    assert any("training samples have the same text" in text and AT_START in text for text in said)


def test_different_texts_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = warnings_of(tmp_path, caplog, [f"number {i}" for i in range(16)], "--batch-size", "4")
    assert not any("negatives" in text for text in said)


def test_a_row_of_batches_without_negatives_is_said_before_the_epoch_ends(caplog: pytest.LogCaptureFixture) -> None:
    watch = NegativesWatch()
    for _ in range(19):
        watch.see(torch.tensor(0.0))
    watch.see(torch.tensor(1.5))
    assert caplog.text == ""
    for _ in range(25):
        watch.see(torch.tensor(0.0))
    assert caplog.text.count("the last 20 batches had one text each") == 1
    watch.end_epoch(2)
    assert "epoch 3: 44 of 45 batches had one text each" in caplog.text
    caplog.clear()
    watch.end_epoch(3)
    assert caplog.text == ""
