"""`train-jepa --contrast-batch` through its command: what one large batch would have learned, however it is divided."""

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ranks
from short import changed

from mamba3_jepa.cli.main import main
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.files.metrics_log import read_metrics
from mamba3_jepa.training.phase1_objective import Phase1Objective

SHORT = ["train-jepa", "--tiny", "--cpu", "--synthetic-scenes", "16", "--val-samples", "24", "--batch-size", "8",
         "--max-steps", "9", "--epochs", "2", "--workers", "0", "--log-every", "1", "--save-every", "100",
         "--angn-enabled"]  # fmt: skip
IN_TWO_PASSES = ["--batch-size", "2", "--contrast-batch", "8"]


def train(output_dir: Path, *arguments: str) -> int:
    return main([*changed(SHORT, arguments), "--output-dir", str(output_dir)])


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(output_dir / "phase1_last.pt", phase=1).model


def train_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]


def assert_close(folder: Path, expected: Path, tolerance: float = 1e-3) -> None:
    ours, theirs = weights(folder), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=tolerance, rtol=tolerance, msg=name)


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one_batch"
    assert train(folder) == 0
    return folder


@pytest.fixture(scope="module")
def two_passes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "two_passes"
    assert train(folder, *IN_TWO_PASSES) == 0
    return folder


def test_two_passes_train_what_one_batch_trains(one_batch: Path, two_passes: Path) -> None:
    assert_close(two_passes, one_batch)
    ours, theirs = train_lines(two_passes), train_lines(one_batch)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, 10))
    assert [line["epoch"] for line in ours] == [line["epoch"] for line in theirs]
    for name in ("loss", "info_nce", "accuracy", "negatives", "hard_negatives", "temperature", "gate_sparsity",
                 "grad_norm"):  # fmt: skip
        expected = [line[f"train/{name}"] for line in theirs]
        assert [line[f"train/{name}"] for line in ours] == pytest.approx(expected, rel=1e-3), name
    assert train_lines(two_passes)[0]["train/negatives"] > 6, "of micro-batches of 2 it would be 1, and hard ones"
    last = [read_metrics(folder / "metrics.jsonl")[-1]["val/loss"] for folder in (two_passes, one_batch)]
    assert last[0] == pytest.approx(last[1], rel=1e-3)


def test_the_left_over_samples_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert train(tmp_path / "run", "--batch-size", "10", "--contrast-batch", "20", "--epochs", "1") == 0
    assert "a contrast of 20 samples: 2 micro-batches of 10 on each of 1 process(es)" in caplog.text
    assert "8 of 48 samples are left over in each epoch" in caplog.text
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("call", [6, 38, 67])
def test_stopped_in_either_pass_and_resumed_gives_the_same_bits(
    two_passes: Path, tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has 8 looks at a micro-batch: in the first step, of which nothing is saved, and in the middle of both
    epochs."""
    embed, seen = Phase1Objective.embed, []

    def stopping(self: Phase1Objective, batch: Any) -> Any:
        seen.append(1)
        if len(seen) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return embed(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Phase1Objective, "embed", stopping)
        assert train(tmp_path / "run", *IN_TWO_PASSES) == 128 + signal.SIGTERM
    assert len(seen) == call, "not one micro-batch more"
    assert train(tmp_path / "run", *IN_TWO_PASSES, "--resume") == 0
    ours, theirs = weights(tmp_path / "run"), weights(two_passes)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert [line["step"] for line in train_lines(tmp_path / "run")] == list(range(1, 10))


@pytest.mark.parametrize(
    "other", [["--batch-size", "4", "--contrast-batch", "8"], ["--batch-size", "8"]], ids=["larger", "one pass"]
)
def test_a_run_goes_on_with_other_micro_batches(
    one_batch: Path, tmp_path: Path, other: list[str], capfd: pytest.CaptureFixture
) -> None:
    assert train(tmp_path / "run", *IN_TWO_PASSES, "--max-steps", "4") == 0
    assert train(tmp_path / "run", "--batch-size", "4", "--contrast-batch", "16", "--resume") == 2
    said = capfd.readouterr().err
    assert "the global batch was 8 samples (--contrast-batch 8) and would now be 16" in said
    assert "give --contrast-batch 8," in said
    assert train(tmp_path / "run", *other, "--resume") == 0
    # The schedule was that of 4 steps before.
    whole = tmp_path / "whole"
    assert train(whole, "--max-steps", "4") == 0
    assert train(whole, "--resume") == 0
    assert_close(tmp_path / "run", whole)


def test_two_processes_with_accumulation(tmp_path: Path) -> None:
    """Two contrasts a step, each of two micro-batches on each process."""
    division = ["--batch-size", "2", "--contrast-batch", "8", "--grad-accum", "2", "--max-steps", "5"]
    arguments = changed(SHORT, [*division, "--output-dir", str(tmp_path / "two")])
    status, said = ranks(2, *arguments)
    assert status == 0, said
    assert train(tmp_path / "one", "--grad-accum", "2", "--max-steps", "5") == 0
    assert_close(tmp_path / "two", tmp_path / "one")
    assert train_lines(tmp_path / "two")[-1]["epoch"] == train_lines(tmp_path / "one")[-1]["epoch"] == 2


def test_bfloat16_is_close_to_one_batch(tmp_path: Path) -> None:
    runs = {"one": [], "two": IN_TWO_PASSES}
    for name, arguments in runs.items():
        assert train(tmp_path / name, "--precision", "bf16", "--max-steps", "3", *arguments) == 0
    one, two = (train_lines(tmp_path / name) for name in runs)
    for ours, theirs in zip(two, one, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=2e-2)
    assert_close(tmp_path / "two", tmp_path / "one", tolerance=2e-2)
    assert all(
        value.dtype == torch.float32 for value in weights(tmp_path / "two").values() if value.is_floating_point()
    )


def test_checkpointed_activations_give_the_same_bits(one_batch: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--checkpoint-activations") == 0
    ours, theirs = weights(tmp_path / "run"), weights(one_batch)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


BAD = {
    "no multiple": (
        ["--batch-size", "6", "--contrast-batch", "20"],
        "20: must be a multiple of the 6 samples of one micro-batch (--batch-size 6), such as 18 or 24",
    ),
    "less than one": (["--batch-size", "6", "--contrast-batch", "4"], "(--batch-size 6), such as 6"),
    "more than there is": (
        ["--contrast-batch", "56"],
        "--contrast-batch 56: a step of 56 is larger than the 48 samples there are",
    ),
    "more than there is, accumulated": (
        ["--contrast-batch", "24", "--grad-accum", "3"],
        "--contrast-batch 24 and --grad-accum 3: a step of 72 is larger than the 48 samples there are",
    ),
    "none": (["--contrast-batch", "0"], "--contrast-batch 0: must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    arguments, message = BAD[name]
    assert train(tmp_path / "run", *arguments) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
