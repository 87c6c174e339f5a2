"""Phase 1 through its real command: what it leaves behind, how it stops, how it continues."""

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from fork_server import Program
from processes import torchrun
from short import changed

from mamba3_jepa.cli.main import main
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.files.metrics_log import read_metrics
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.training import loop
from mamba3_jepa.training.run import Run

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_jepa.py"
SHORT = ["--tiny", "--synthetic-scenes", "16", "--val-samples", "24", "--batch-size", "8", "--epochs", "2",
         "--workers", "0", "--log-every", "1"]  # fmt: skip


def train(output_dir: Path, *arguments: str) -> int:
    return main(["train-jepa", *changed(SHORT, arguments), "--output-dir", str(output_dir)])


def start(output_dir: Path, *arguments: str, drawn: bool = False) -> Program:
    return Program([*SHORT, "--output-dir", str(output_dir), *arguments], program=SCRIPT, drawn=drawn)


def finish(process: Program) -> tuple[int, str]:
    _, stderr = process.outputs()
    return process.wait(), stderr.decode()


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(output_dir / "phase1_last.pt", phase=1).model


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    code, stderr = finish(start(folder, "--angn-enabled", drawn=True))
    assert code == 0, stderr
    assert "SYNTHETIC" in stderr
    return folder


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "phase1_best.pt", "phase1_last.pt", "config.json", "metrics.jsonl", "contact_sheet.png", "plots"
    }  # fmt: skip
    config = json.loads((finished / "config.json").read_text())
    assert config["data"]["synthetic"] is True
    assert config["settings"]["preset"] == "tiny"
    lines = read_metrics(finished / "metrics.jsonl")
    last = {key: value for line in lines for key, value in line.items()}
    wanted = {"train/loss", "train/temperature", "train/lr", "train/samples_per_second", "train/gate_activity_0",
              "val/loss", "val/image_to_text_r1", "val/image_to_text_r5", "val/image_to_text_r10",
              "val/text_to_image_r1", "val/alignment", "val/uniformity", "val/effective_rank_predicted",
              "val/gate_activity_1", "val/answer_accuracy", "val/answer_accuracy_existence"}  # fmt: skip
    assert wanted <= set(last)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 12
    assert losses[-1] < losses[0]


def test_the_best_is_right_most_often(finished: Path) -> None:
    validations = [line for line in read_metrics(finished / "metrics.jsonl") if "val/loss" in line]
    assert len(validations) == 2
    shares = ("val/image_to_text_r1", "val/answer_accuracy", "val/swap_accuracy")
    best = max(validations, key=lambda line: sum(line[name] for name in shares))
    saved = load_checkpoint(finished / "phase1_best.pt").metrics
    assert {name: best[name] for name in saved} == saved


def test_validation_questions_are_answered_with_known_answers_too(finished: Path) -> None:
    checkpoint = load_checkpoint(finished / "phase1_best.pt")
    model = Mamba3Jepa.from_checkpoint(finished / "phase1_best.pt")
    val = SceneSource("val", n_scenes=8, image_size=checkpoint.config.vision.image_size)
    asked = [val.sample(i) for i in val.indices("question").tolist()]
    right = [sample.target or "" for sample in asked]
    assert set(checkpoint.data.answers) - set(right), "some that are right for none of them"
    answers = list(dict.fromkeys(right + checkpoint.data.answers))
    predicted = model.embed([sample.image() for sample in asked if sample.image], [each.question for each in asked])
    given = [answers[i] for i in (predicted @ model.embed_text(answers).T).argmax(dim=1).tolist()]
    share = sum(a == b for a, b in zip(given, right, strict=True)) / len(right)
    assert checkpoint.metrics["val/answer_accuracy"] == pytest.approx(share)


def test_the_learned_temperature_is_in_the_checkpoints(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = [line["train/temperature"] for line in read_metrics(finished / "metrics.jsonl") if "train/loss" in line]
    for name in ("phase1_best.pt", "phase1_last.pt"):
        checkpoint = load_checkpoint(finished / name)
        assert checkpoint.temperature is not None
        assert min(abs(checkpoint.temperature - each) for each in logged) < 1e-4
        assert checkpoint.temperature != pytest.approx(0.07, abs=1e-6), "where it started"
        capsys.readouterr()
        assert main(["inspect", str(finished / name)]) == 0
        assert f"learned temperature {checkpoint.temperature:.4g}" in capsys.readouterr().out
    assert checkpoint.trainer is not None
    assert checkpoint.temperature == pytest.approx(float(checkpoint.trainer["objective"]["log_temperature"].exp()))


def test_only_what_should_train_has_moved(finished: Path) -> None:
    checkpoint = load_checkpoint(finished / "phase1_last.pt")
    torch.manual_seed(0)
    untouched = VisionEncoder(checkpoint.config.vision).state_dict()
    trained = {name.removeprefix("x_encoder."): value for name, value in checkpoint.model.items()
               if name.startswith("x_encoder.")}  # fmt: skip
    torch.manual_seed(1)
    other = VisionEncoder(checkpoint.config.vision).state_dict()
    assert any(not torch.equal(other[name], value) for name, value in trained.items())
    # the seed decides the X-Encoder's weights, so bytes equal to a fresh one were never touched
    fresh = _fresh_model(checkpoint).x_encoder.state_dict()
    assert_identical(fresh, trained)
    assert untouched.keys() == trained.keys()
    before = _fresh_model(checkpoint).state_dict()
    moved = {name.split(".")[0] for name, value in checkpoint.model.items() if not torch.equal(before[name], value)}
    assert moved == {"predictor", "y_encoder", "angn"}


def _fresh_model(checkpoint) -> Mamba3Jepa:  # type: ignore[no-untyped-def]
    from accelerate.utils import set_seed

    from mamba3_jepa.data.tokenizer import TextTokenizer

    set_seed(0)
    return Mamba3Jepa(checkpoint.config, TextTokenizer.from_json(checkpoint.tokenizer))


def test_the_checkpoint_alone_gives_embeddings(finished: Path) -> None:
    model = Mamba3Jepa.from_checkpoint(finished / "phase1_best.pt")
    predicted = model.embed([None, None], ["What colour is the circle?", None])
    answers = model.embed_text(["red", "blue"])
    assert predicted.shape == answers.shape == (2, 32)
    torch.testing.assert_close(predicted.norm(dim=1), torch.ones(2))


def test_killed_at_any_moment_and_resumed_gives_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """SIGKILL several times, wherever it happens to fall, until the run gets through."""
    chance = random.Random(0)
    folder = tmp_path / "killed"
    kills = 0
    while True:
        process = start(folder, "--angn-enabled", "--save-every", "1", "--resume", drawn=True)
        if kills < 3:
            while not (folder / "metrics.jsonl").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 1.5))
            process.send_signal(signal.SIGKILL)
            kills += 1
        code, stderr = finish(process)
        if code == 0:
            break
        assert code == -signal.SIGKILL, stderr
    assert_identical(weights(folder), weights(finished))
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_asked_to_stop_it_saves_and_says_so(finished: Path, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "stopped"
    process = start(folder, "--angn-enabled")
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    code, stderr = finish(process)
    assert code == 128 + number, stderr
    assert "--resume continues" in stderr
    assert "Traceback" not in stderr
    assert train(folder, "--angn-enabled", "--resume") == 0
    # in this process the number of threads differs: equal up to rounding
    ours = weights(folder)
    for name, value in weights(finished).items():
        torch.testing.assert_close(ours[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    two = changed(SHORT, ["--cpu", "--batch-size", "4", "--output-dir", str(tmp_path / "two")])
    status, said = torchrun(2, *two, program=SCRIPT)
    assert status == 0, said
    assert train(tmp_path / "one", "--cpu") == 0
    one = weights(tmp_path / "one")
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, one[name], atol=1e-3, rtol=1e-3, msg=name)
    steps = [line["step"] for line in read_metrics(tmp_path / "two" / "metrics.jsonl") if "train/loss" in line]
    assert steps == list(range(1, 13))


def test_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(folder, "--max-steps", "1") == 0
    first = (folder / "phase1_last.pt").read_bytes()
    assert train(folder, "--max-steps", "1", "--seed", "1") == 0
    (aside,) = [path for path in tmp_path.iterdir() if path != folder]
    assert (aside / "phase1_last.pt").read_bytes() == first


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    """Both runs go to where the link leads; there the earlier one is moved aside."""
    link, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    link.symlink_to(disk / "there")
    for _ in range(2):
        assert train(link, "--max-steps", "1") == 0
        assert link.is_symlink()
        assert (disk / "there" / "phase1_last.pt").is_file()
    assert len(list(disk.glob("there.*"))) == 1


def test_accumulated_micro_batches_are_one_step(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--grad-accum", "3") == 0
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_bfloat16(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--precision", "bf16", "--max-steps", "3") == 0
    assert all(
        value.dtype == torch.float32 for value in weights(tmp_path / "run").values() if value.is_floating_point()
    )


def test_a_non_finite_loss_stops_the_run_and_names_the_step(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert train(tmp_path / "run", "--lr", "1e30", "--warmup-steps", "0", "--max-grad-norm", "1e30") == 2
    stderr = capfd.readouterr().err
    assert "non-finite" in stderr
    assert "step 2" in stderr


def _write_manifest(folder: Path, n: int, broken: range) -> None:
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(n):
        path = folder / "images" / f"{i}.png"
        Image.new("RGB", (40, 30), (i * 7 % 256, 90, 200)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:40])
        text = f"picture {i} " + "of a very long text " * (30 if i % 4 == 0 else 1)
        lines.append(json.dumps({"image": f"images/{i}.png", "text": text}) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))


def test_bad_images_and_long_texts_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Among them a whole batch of bad images: with batch 1 every bad image is one."""
    data = tmp_path / "data"
    _write_manifest(data, 24, broken=range(3, 7))
    (data / "val.jsonl").write_text(
        '{"image": "images/0.png", "text": "one"}\n{"image": "images/1.png", "text": "two"}\n'
    )
    arguments = ["--data-dir", str(data), "--epochs", "1", "--batch-size", "1", "--on-bad-sample", "skip"]
    assert train(tmp_path / "run", *arguments) == 0
    assert "epoch 1: 4 bad samples skipped, the first:" in caplog.text
    assert "texts longer than the token limit were cut" in caplog.text
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert sum(line["train/skipped_samples"] for line in lines) == 4
    assert len(lines) == 24
    assert all(line["train/loss"] is not None for line in lines)


def test_a_bad_image_stops_the_run_with_its_path(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    _write_manifest(tmp_path / "data", 24, broken=range(3, 7))
    assert train(tmp_path / "run", "--data-dir", str(tmp_path / "data"), "--val-fraction", "0.2") == 2
    stderr = capfd.readouterr().err
    assert re.search(r"images/[3-6]\.png", stderr)
    assert "Traceback" not in stderr


BAD_ARGUMENTS = {
    "unknown flag": (["--colour", "red"], "colour"),
    "not a number": (["--epochs", "many"], "epochs"),
    "zero": (["--grad-accum", "0"], "--grad-accum 0: must be at least 1"),
    "batch larger than the data": (["--batch-size", "4000"], "larger than the 48 samples"),
    "accumulation larger than the epoch": (["--grad-accum", "50"], "lower --batch-size or --grad-accum"),
    "no such data": (["--data-dir", "/nowhere"], "there is no such directory"),
    "no such ViT": (["--vit-checkpoint", "/nowhere.pt"], "/nowhere.pt"),
    "no such tokenizer": (["--tokenizer", "/nowhere.json"], "/nowhere.json"),
    "contradiction": (["--preset", "mini"], "contradict"),
    "patches that do not fit": (["--patch-size", "5"], "--patch-size 5: must divide the 32 pixels"),
    "shift out of the image": (["--image-shift", "32"], "--image-shift 32: must lie between 0 and 31 pixels"),
    "fp16 on CPU": (["--precision", "fp16", "--cpu"], "needs a CUDA GPU"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    arguments, message = BAD_ARGUMENTS[name]
    try:
        code = train(tmp_path / "run", *arguments)
    except SystemExit as error:  # the command line's own errors
        code = error.code
    assert code == 2
    captured = capfd.readouterr()
    assert message in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run" / "phase1_last.pt").exists()


def test_full_size_without_a_vision_encoder_says_where_to_get_one(capfd: pytest.CaptureFixture) -> None:
    assert main(["train-jepa"]) == 2
    assert "--vit-checkpoint" in capfd.readouterr().err


def test_resume_refuses_what_would_be_another_run(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    assert train(folder, "--max-steps", "2") == 0
    before = (folder / "phase1_last.pt").read_bytes()
    for arguments, message in (
        (["--lr", "0.5"], "--lr"),
        (["--angn-enabled"], "angn.enabled False -> True"),
        (["--synthetic-scenes", "32"], "--synthetic-scenes"),
    ):
        assert train(folder, "--max-steps", "2", "--resume", *arguments) == 2
        assert message in capfd.readouterr().err
    assert main(["train-jepa", "--preset", "mini", "--output-dir", str(folder), "--resume"]) == 2
    assert "preset" in capfd.readouterr().err
    (folder / "phase1_last.pt").write_bytes(before[: len(before) // 2])
    assert train(folder, "--max-steps", "2", "--resume") == 2
    assert "cut short" in capfd.readouterr().err


@pytest.mark.parametrize(("pause", "drawn"), [(0, [4, 8, 12]), (10**9, [4, 12])])
def test_pictures_are_drawn_first_and_last_and_between_as_far_as_time_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: int, drawn: list[int]
) -> None:
    steps = []

    def plot(run: Run) -> None:
        steps.append(read_metrics(run.folder / "metrics.jsonl")[-1]["step"])

    monkeypatch.setattr(loop, "_UNDRAWN", pause)
    monkeypatch.setattr(Run, "plot", plot)
    assert train(tmp_path / "run", "--eval-every", "4") == 0
    assert steps == drawn


def test_full_disk_stops_with_the_old_checkpoint_intact(tmp_path: Path) -> None:
    """A file-size limit, set once the first checkpoint is there, stands in for the full disk."""
    folder = tmp_path / "run"
    assert train(folder, "--max-steps", "2") == 0
    before = (folder / "phase1_last.pt").read_bytes()
    program = tmp_path / "limited.py"
    program.write_text(
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, resource.RLIM_INFINITY))\n"
        "from mamba3_jepa.cli.main import main; sys.exit(main(sys.argv[1:]))\n"
    )
    code, stderr = finish(Program(["train-jepa", *SHORT, "--output-dir", str(folder), "--resume"], program=program))
    assert code == 2
    assert "could not write checkpoint" in stderr
    assert (folder / "phase1_last.pt").read_bytes() == before
    assert not list(folder.glob(".*tmp"))
