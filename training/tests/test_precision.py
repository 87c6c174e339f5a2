"""What stays in float32 when a run computes in bfloat16: the logits, and everything that validation measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import Tensor

from mamba3_jepa.cli.main import main
from mamba3_jepa.data.sources import DataSplits
from mamba3_jepa.files.checkpoint import DataRecord
from mamba3_jepa.files.metrics_log import read_metrics
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Phase1Settings, Phase2Settings, Phase3Settings
from mamba3_jepa.training import phase2, phase3
from mamba3_jepa.training.phase1 import Phase1Task
from mamba3_jepa.training.start import open_data

SIZES = {"synthetic_scenes": 16, "val_samples": 24, "batch_size": 8}
SHORT = ["--tiny", "--cpu", "--synthetic-scenes", "16", "--val-samples", "24", "--batch-size", "8", "--workers", "0",
         "--epochs", "1", "--precision", "bf16"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three phases in bfloat16."""
    folder = tmp_path_factory.mktemp("bf16")
    assert main(["train-jepa", *SHORT, "--output-dir", str(folder / "phase1")]) == 0
    for command, before, phase in (("train-decoder", 1, 2), ("train-agent", 2, 3)):
        start = str(folder / f"phase{before}" / f"phase{before}_best.pt")
        arguments = [f"--phase{before}-checkpoint", start, "--output-dir", str(folder / f"phase{phase}")]
        assert main([command, *SHORT, *arguments]) == 0
    return folder


def measured(folder: Path, phase: int) -> dict[str, float]:
    """What the run's only validation logged."""
    (line,) = [line for line in read_metrics(folder / f"phase{phase}" / "metrics.jsonl") if "val/loss" in line]
    return {name: value for name, value in line.items() if name.startswith("val/") and name != "val/seconds"}


def test_phase_1_validates_in_float32(runs: Path) -> None:
    model = Mamba3Jepa.from_checkpoint(runs / "phase1" / "phase1_last.pt")
    settings = dataclasses.replace(Phase1Settings(tiny=True, **SIZES).resolved(), workers=0)
    again = Phase1Task(model, open_data(settings, model.config), settings).validate(torch.device("cpu")).metrics
    logged = measured(runs, 1)
    del again["val/loss"], logged["val/loss"]  # it depends on the temperature, which only the run knows
    assert again == logged


def test_phase_2_validates_in_float32(runs: Path) -> None:
    model = Mamba3Jepa.from_checkpoint(runs / "phase2" / "phase2_last.pt")
    settings = Phase2Settings(tiny=True, cache_dir=runs / "none", **SIZES).resolved("tiny")
    data = open_data(settings, model.config)
    val = phase2._outputs(model, data.val, data.val_indices[:24], settings, try_again=True)
    task = phase2.Phase2Task(model, val, val, data, settings, DataRecord())
    again = task.validate(torch.device("cpu")).metrics
    assert again == measured(runs, 2)


def test_phase_3_validates_in_float32(runs: Path) -> None:
    model = Mamba3Jepa.from_checkpoint(runs / "phase3" / "phase3_last.pt")
    settings = Phase3Settings(tiny=True, cache_dir=runs / "none", **SIZES).resolved("tiny")
    data: DataSplits = open_data(settings, model.config, kind="all", val_samples_per_scene=5, max_val_scenes=512)
    source, rows = phase3._confusion(data, "val", settings, model.config.query_prompt)
    val = phase3._outputs(model, source, rows, settings, demand_vectors=False, try_again=True)
    task = phase3.Phase3Task(model, val, val, settings, DataRecord())
    again = task.validate(torch.device("cpu")).metrics
    assert again == measured(runs, 3)


def test_the_logits_of_the_decoder_are_float32_under_autocast() -> None:
    decoder = tiny_model(2).y_decoder
    assert decoder is not None
    hidden: list[Tensor] = []
    decoder.backbone.register_forward_hook(lambda module, args, h: hidden.append(h[0] if isinstance(h, tuple) else h))
    embedding, ids = F.normalize(torch.randn(3, 32), dim=-1), torch.tensor([[1, 5, 7], [1, 9, 2], [1, 4, 4]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = decoder(embedding, ids)
        stepped, _ = decoder.step(ids[:, 0], decoder.prefill(embedding))
    expected = hidden[0][:, decoder.prefix_tokens :].float() @ decoder.lm_head.weight.T
    assert logits.dtype == stepped.dtype == torch.float32
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5)
    assert len(np.unique(logits.bfloat16().float().numpy() - logits.numpy())) > 100, "not rounded to bfloat16 before"


def test_the_logits_of_confusion_are_those_of_float32_under_autocast() -> None:
    recursion = tiny_model(3).recursion
    assert recursion is not None
    pooled = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    doubt = torch.randn(len(pooled), 2)
    expected = recursion.confusion_probe(pooled, doubt)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(recursion.confusion_probe(pooled, doubt), expected)
