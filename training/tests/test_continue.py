"""A run goes on where it was left: on another number of processes, past bad samples, or not at all if it is another."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import ranks
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import preset
from mamba3_jepa.data import batch, images
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.sample import Sample, Source
from mamba3_jepa.data.sources import open_splits
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation import phase3_trials
from mamba3_jepa.files.checkpoint import DataRecord, load_checkpoint
from mamba3_jepa.files.metrics_log import read_metrics
from mamba3_jepa.settings.training import Phase1Settings, Phase2Settings, TrainSettings
from mamba3_jepa.training import phase1, phase2
from mamba3_jepa.training.beginning import Beginning
from mamba3_jepa.training.interrupt import Interrupted
from mamba3_jepa.training.phase1 import Phase1Task, train_phase1
from mamba3_jepa.training.run import Run

COMMANDS = {1: "train-jepa", 2: "train-decoder", 3: "train-agent"}
SHORT = ["--tiny", "--cpu", "--workers", "0", "--log-every", "1", "--epochs", "2"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {phase: write_checkpoint(folder / f"{phase}.pt", tiny_model(phase), phase) for phase in (1, 2)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """84 samples, 80 of them for training, with questions that have answers."""
    folder = tmp_path_factory.mktemp("pictures")
    write_data(folder, 80, 4)
    return folder


def write_data(folder: Path, n: int, n_val: int) -> list[str]:
    for name, numbers in (("manifest", range(n)), ("val", range(n, n + n_val))):
        lines = []
        for i in numbers:
            Image.new("RGB", (40, 32), (i * 3 % 256, i * 7 % 256, 90)).save(folder / f"{i}.png")
            asked = {"question": f"what is {i}?", "answer": f"it is {i}"} if i % 2 else {"text": f"picture {i}"}
            lines.append({"image": f"{i}.png", **asked})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--data-dir", str(folder)]


def command(phase: int, checkpoints: dict[int, Path], output_dir: Path, *arguments: str) -> list[str]:
    start = [] if phase == 1 else [f"--phase{phase - 1}-checkpoint", str(checkpoints[phase - 1])]
    return [COMMANDS[phase], *SHORT, *start, "--output-dir", str(output_dir), *arguments]


def lose_some(patch: pytest.MonkeyPatch, *reds: int) -> None:
    """Pictures of these shades can no longer be decoded, as with another version of Pillow; the files are the same."""

    def to_pixels(image: Image.Image, size: int) -> torch.Tensor:
        if image.getpixel((0, 0))[0] in reds:
            raise BadSampleError(f"a picture of {image.getpixel((0, 0))} cannot be decoded")
        return images.to_pixels(image, size)

    patch.setattr(batch, "to_pixels", to_pixels)


def stop_after(step: int, patch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """The next run in this process is asked to stop when it logs `step`."""
    log = Run.log

    def stopping(self: Run, position: Any, metrics: dict[str, float]) -> None:
        log(self, position, metrics)
        if position.step == step and "train/loss" in metrics:
            signal.raise_signal(number)

    patch.setattr(Run, "log", stopping)


def last(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("phase*_last.pt")
    return load_checkpoint(path).model


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-3) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=tolerance, rtol=tolerance, msg=name)


def train_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_another_division_of_the_same_global_batch(
    phase: int, checkpoints: dict[int, Path], pictures: Path, tmp_path: Path
) -> None:
    """1 x 16 is continued as 2 x 8; behind a frozen model as 1 x 8 with two micro-batches too."""
    arguments = ["--data-dir", str(pictures)]
    assert main(command(phase, checkpoints, tmp_path / "whole", *arguments, "--batch-size", "16")) == 0
    divided = {"processes": ["--batch-size", "8"]}
    if phase > 1:
        divided["accumulated"] = ["--batch-size", "8", "--grad-accum", "2"]
    for name, changed in divided.items():
        with pytest.MonkeyPatch.context() as patch:
            stop_after(3, patch)
            stopped = command(phase, checkpoints, tmp_path / name, *arguments, "--batch-size", "16")
            assert main(stopped) == 128 + signal.SIGTERM
        goes_on = command(phase, checkpoints, tmp_path / name, *arguments, *changed, "--resume")
        if name == "processes":
            status, said = ranks(2, *goes_on)
            assert status == 0, said
            assert "continuing from step 3" in said
        else:
            assert main(goes_on) == 0
        assert_close(last(tmp_path / name), last(tmp_path / "whole"))
        here, there = train_lines(tmp_path / name), train_lines(tmp_path / "whole")
        assert [line["step"] for line in here] == [line["step"] for line in there]
        for line, other in zip(here, there, strict=True):  # the same samples, in the same order, and all ranks' loss
            assert line["train/loss"] == pytest.approx(other["train/loss"], rel=2e-3), line["step"]


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_best_weights_that_another_measure_chose_are_measured_again(
    phase: int, checkpoints: dict[int, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As those are that were chosen on other scenes, before there was a test split; else a score of the old scale would
    never be reached, or the first validation would replace better weights."""
    arguments = ["--synthetic-scenes", "8", "--val-samples", "20", "--batch-size", "8", "--eval-every", "2"]
    arguments += ["--max-steps", "5"]
    assert main(command(phase, checkpoints, tmp_path / "whole", *arguments)) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch)
        assert main(command(phase, checkpoints, tmp_path / "run", *arguments)) == 128 + signal.SIGTERM
    path = tmp_path / "run" / f"phase{phase}_last.pt"
    content = torch.load(path, weights_only=True)
    assert "scenes-2/val/" in content["trainer"].pop("measure")
    content["data"]["fingerprint"] = content["data"]["fingerprint"].replace("scenes-2/val", "scenes-1/val")
    content["trainer"]["position"]["best_score"] = 1e9
    torch.save(content, path)
    assert main(command(phase, checkpoints, tmp_path / "run", *arguments, "--resume")) == 0
    assert f"phase{phase}_best.pt was chosen by another measure" in caplog.text
    scores = [
        load_checkpoint(tmp_path / name / path.name).trainer["position"]["best_score"] for name in ("whole", "run")
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)
    bests = [load_checkpoint(tmp_path / name / f"phase{phase}_best.pt").model for name in ("whole", "run")]
    assert_close(bests[1], bests[0], 1e-6)
    content["trainer"]["position"]["best_score"] = 1e9
    torch.save(content, path)
    (tmp_path / "run" / f"phase{phase}_best.pt").unlink()
    assert main(command(phase, checkpoints, tmp_path / "run", *arguments, "--resume")) == 0
    assert (tmp_path / "run" / f"phase{phase}_best.pt").exists()


def beginning(settings: TrainSettings, processes: int) -> Beginning:
    return Beginning(
        path=Path("there"), settings=settings.to_dict(), processes=processes, config=preset("tiny"), data=DataRecord()
    )


ONE = Phase1Settings(preset="tiny", batch_size=16)
LARGE = Phase1Settings(preset="tiny", batch_size=16, contrast_batch=64)
TWO = Phase2Settings(batch_size=16)


@pytest.mark.parametrize(
    ("settings", "processes", "other", "others", "cure"),
    [
        (ONE, 1, {"batch_size": 16}, 2, "`batch_size` 8,"),
        (ONE, 2, {"batch_size": 16}, 1, "`batch_size` 32,"),
        (ONE, 1, {"batch_size": 8, "grad_accum": 2}, 1, "`batch_size` 16,"),  # two contrasts are not a larger one
        (ONE, 1, {"batch_size": 5}, 3, "to divide"),
        (ONE, 1, {"batch_size": 8, "contrast_batch": 64}, 1, "`contrast_batch` 16,"),
        (LARGE, 1, {"contrast_batch": None}, 1, "`contrast_batch` 64,"),
        (TWO, 1, {"batch_size": 16, "grad_accum": 2}, 2, "`batch_size` 4,"),
    ],
)
def test_another_global_batch_is_refused(
    settings: TrainSettings, processes: int, other: dict[str, int], others: int, cure: str
) -> None:
    changed = type(settings)(**{**settings.to_dict(), **other})
    with pytest.raises(UserError, match=r"the global batch was \d+ samples") as refused:
        beginning(settings, processes).demand_same_settings(changed, others)
    assert cure in str(refused.value)


def test_the_same_global_batch_is_not_refused() -> None:
    for settings, processes, other, others in (
        (ONE, 1, {"batch_size": 8}, 2),
        (ONE, 2, {"batch_size": 4}, 8),
        (ONE, 1, {"batch_size": 4, "contrast_batch": 16}, 2),
        (LARGE, 1, {"batch_size": 4}, 8),
        (LARGE, 2, {"batch_size": 64, "contrast_batch": None}, 1),
        (TWO, 1, {"batch_size": 4, "grad_accum": 2}, 2),
        (TWO, 2, {"batch_size": 1, "grad_accum": 32}, 1),
    ):
        changed = type(settings)(**{**settings.to_dict(), **other})
        beginning(settings, processes).demand_same_settings(changed, others)
    with pytest.raises(UserError, match="`grad_accum` 1 -> 2"):
        beginning(ONE, 1).demand_same_settings(Phase1Settings(**{**ONE.to_dict(), "grad_accum": 2}), 1)


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_an_image_that_cannot_be_read_any_more_is_passed(
    phase: int,
    checkpoints: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """--on-bad-sample, and what else is about reading, is free."""
    (tmp_path / "data").mkdir()
    arguments = write_data(tmp_path / "data", 80, 4)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(6, patch)
        assert main(command(phase, checkpoints, tmp_path / "run", *arguments)) == 128 + signal.SIGTERM
    before = load_checkpoint(tmp_path / "run" / f"phase{phase}_last.pt").data.train_samples
    lose_some(monkeypatch, *(i * 3 for i in range(0, 80, 3)))
    goes_on = command(phase, checkpoints, tmp_path / "run", *arguments, "--resume")
    if phase > 1:
        goes_on += ["--cache-dir", str(tmp_path / "afresh")]
    assert main(goes_on) == 2
    assert "cannot be decoded" in capfd.readouterr().err
    assert main([*goes_on, "--on-bad-sample", "skip"]) == 0
    data = load_checkpoint(tmp_path / "run" / f"phase{phase}_last.pt").data
    assert before == 80
    if phase == 1:  # six of the bad samples came before the stop in both epochs
        assert data.train_samples == 59
    if phase == 2:
        assert data.train_samples == 53
    if phase == 3:  # more: a question that is asked without its image does not need it
        assert data.train_samples is not None
        assert 53 <= data.train_samples < 80
    assert phase == 1 or "training samples can be read, it was 80" in caplog.text
    steps = [line["step"] for line in train_lines(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


def test_fewer_samples_than_a_batch_are_an_error_that_says_why(
    checkpoints: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    arguments = write_data(tmp_path / "data", 20, 4)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(1, patch)
        assert main(command(2, checkpoints, tmp_path / "run", *arguments)) == 128 + signal.SIGTERM
    lose_some(monkeypatch, *(i * 3 for i in range(12)))
    goes_on = command(2, checkpoints, tmp_path / "run", *arguments, "--resume", "--on-bad-sample", "skip")
    assert main([*goes_on, "--cache-dir", str(tmp_path / "afresh")]) == 2
    error = capfd.readouterr().err
    assert "a batch of 16 is larger than the 8 samples there are: 12 were left out, the first: " in error


def test_an_epoch_without_a_sample_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    arguments = [*write_data(tmp_path / "data", 20, 4), "--on-bad-sample", "skip", "--batch-size", "4"]
    for i in range(20):
        (tmp_path / "data" / f"{i}.png").write_bytes(b"no image")
    assert main(command(1, {}, tmp_path / "run", *arguments)) == 2
    error = capfd.readouterr().err
    assert "epoch 1: not one of its samples could be read: 20 were left out, the first: " in error


def test_a_validation_without_a_sample_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    arguments = [*write_data(tmp_path / "data", 20, 4), "--on-bad-sample", "skip", "--angn-enabled"]
    for i in range(20, 24):
        (tmp_path / "data" / f"{i}.png").write_bytes(b"no image")
    assert main(command(1, {}, tmp_path / "run", *arguments)) == 2
    assert "validation: not one of 4 samples could be read: " in capfd.readouterr().err


def test_data_that_runs_out_is_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Phase1Task, "batches", lambda self, epoch, skip: iter(()))
    assert main(command(1, {}, tmp_path / "run", "--synthetic-scenes", "8")) == 2
    assert "epoch 1: the data gave fewer batches than one step needs" in capfd.readouterr().err


_save = Run.save


class _Killed(BaseException):
    """Stands in for SIGKILL."""


def _killed_between(run: Run, *, best: dict[str, Any] | None, last: dict[str, Any] | None) -> None:
    """`Run.save` that is killed when the best weights are there and the last checkpoint is not."""
    _save(run, best=best, last=None)
    run.writer.wait()
    if last is not None:
        raise _Killed


def test_killed_before_the_first_last_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    scenes = ["--synthetic-scenes", "16", "--val-samples", "12"]
    run = command(1, {}, tmp_path / "run", *scenes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", _killed_between)
        with pytest.raises(_Killed):
            main(run)
    assert train_lines(tmp_path / "run")
    (tmp_path / "data").mkdir()
    for arguments, message in (
        (["--lr", "0.5"], "--lr"),
        (["--batch-size", "8"], "the global batch was 16 samples"),
        (["--angn-enabled"], "angn.enabled False -> True"),
        (write_data(tmp_path / "data", 20, 4), "the data has changed since"),
    ):
        before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        assert main([*run, "--resume", *arguments]) == 2
        assert message in capfd.readouterr().err
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert main([*run, "--resume"]) == 0
    assert [line["step"] for line in train_lines(tmp_path / "run")] == list(range(1, 7))
    assert sum("val/loss" in line for line in read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
    (aside,) = tmp_path.glob("run.*")
    assert (aside / "phase1_best.pt").exists(), "what was saved is not overwritten"


def test_a_folder_that_holds_another_phase_is_moved_aside(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    scenes = ["--synthetic-scenes", "8", "--val-samples", "12", "--batch-size", "8"]
    assert main(command(1, checkpoints, tmp_path / "run", *scenes)) == 0
    assert main(command(2, checkpoints, tmp_path / "run", *scenes, "--resume")) == 0
    (aside,) = tmp_path.glob("run.*")
    assert (aside / "phase1_last.pt").exists()
    assert "val/exact_match" not in json.dumps(read_metrics(aside / "metrics.jsonl"))
    assert not (tmp_path / "run" / "phase1_last.pt").exists()


def test_without_its_last_checkpoint_a_run_is_moved_aside_and_not_overwritten(tmp_path: Path) -> None:
    run = command(1, {}, tmp_path / "run", "--synthetic-scenes", "8", "--val-samples", "12", "--batch-size", "8")
    assert main(run) == 0
    best = (tmp_path / "run" / "phase1_best.pt").read_bytes()
    (tmp_path / "run" / "phase1_last.pt").rename(tmp_path / "elsewhere.pt")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main([*run, "--resume", "--max-steps", "1"]) == 0
    (aside,) = tmp_path.glob("run.*")
    assert (aside / "phase1_best.pt").read_bytes() == best
    assert (aside / "metrics.jsonl").read_bytes() == metrics
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1]


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_stopped_while_validating(phase: int, checkpoints: dict[int, Path], tmp_path: Path) -> None:
    """The validation is made when the run goes on, so nothing differs from a run that was left alone."""
    scenes = ["--synthetic-scenes", "16", "--val-samples", "24", "--batch-size", "8"]
    assert main(command(phase, checkpoints, tmp_path / "whole", *scenes)) == 0

    def stopping(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    places = {1: (phase1, "collect"), 2: (phase2, "generate_texts"), 3: (phase3_trials, "evaluate_confusion")}
    module, name = places[phase]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, stopping)
        assert main(command(phase, checkpoints, tmp_path / "run", *scenes)) == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / f"phase{phase}_best.pt").exists()
    assert main(command(phase, checkpoints, tmp_path / "run", *scenes, "--resume")) == 0
    ours = last(tmp_path / "run")
    for name, value in last(tmp_path / "whole").items():
        assert torch.equal(ours[name], value), name
    lines = [
        [{key: value for key, value in line.items() if "second" not in key and key not in ("time", "train/data_wait")}
         for line in read_metrics(tmp_path / folder / "metrics.jsonl")]
        for folder in ("whole", "run")
    ]  # fmt: skip
    assert lines[0] == lines[1]
    whole, run = (load_checkpoint(tmp_path / folder / f"phase{phase}_best.pt") for folder in ("whole", "run"))
    assert {key for key in whole.metrics if whole.metrics[key] != run.metrics[key]} <= {"val/seconds"}


class _Stuck:
    """Scenes of which none is read any more once it is `stuck`, as on a network disk that is gone."""

    def __init__(self, source: Source) -> None:
        self._source, self.stuck = source, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def sample(self, i: int) -> Sample:
        if self.stuck:
            signal.raise_signal(signal.SIGTERM)
            threading.Event().wait(300)
            raise AssertionError("nobody heard it")
        return self._source.sample(i)


def test_stopped_while_waiting_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_splits(None, image_size=preset("tiny").vision.image_size, n_scenes=16, n_val_scenes=4)
    settings = Phase1Settings(tiny=True, cpu=True, batch_size=8, log_every=1, output_dir=tmp_path / "run")
    source = _Stuck(data.train)
    log = Run.log

    def sticking(self: Run, position: Any, metrics: dict[str, float]) -> None:
        log(self, position, metrics)
        source.stuck = position.step == 2

    monkeypatch.setattr(Run, "log", sticking)
    with pytest.raises(Interrupted, match=r"after step 2 of .*saved in") as stopped:
        train_phase1(settings, data=dataclasses.replace(data, train=source))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    trainer = load_checkpoint(tmp_path / "run" / "phase1_last.pt").trainer
    assert trainer is not None
    assert trainer["position"]["step"] == 2


def test_stopped_while_the_tokenizer_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(*arguments: Any) -> Any:
        for i in range(100):
            if i == 50:
                signal.raise_signal(signal.SIGTERM)
            yield f"text {i}"

    monkeypatch.setattr(phase1, "source_texts", texts)
    assert main(command(1, {}, tmp_path / "run", "--synthetic-scenes", "8")) == 128 + signal.SIGTERM
    assert not (tmp_path / "run").exists()
