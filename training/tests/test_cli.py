"""The command line as a user meets it: help at once, every subcommand through its real entry point."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fork_server import Program
from short import BENCH_DATA, BENCH_LAYER

from mamba3_jepa.cli.main import main
from mamba3_jepa.files.checkpoint import load_checkpoint, save_checkpoint
from mamba3_jepa.stop_signals import STOP_SIGNALS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["--tiny", "--synthetic-scenes", "16", "--val-samples", "24", "--max-steps", "2", "--batch-size", "8"]
    assert main(["train-jepa", *arguments, "--output-dir", str(folder)]) == 0
    return folder / "phase1_best.pt"


@pytest.mark.parametrize(
    "command", [[], ["train-jepa"], ["evaluate"], ["bench"], ["bench", "layer"], ["prepare"], ["cache", "list"]]
)
def test_help_does_not_load_torch(command: list[str]) -> None:
    """What makes --help slow is importing the networks' libraries; the time itself depends on the machine."""
    program = (
        "import sys; from mamba3_jepa.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as error: assert error.code == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", program, *command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout


@pytest.mark.parametrize("scenes", [None, "val", "compositional"])
def test_evaluate_writes_what_it_measured(
    checkpoint: Path, tmp_path: Path, scenes: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default on scenes that did not choose the checkpoint; on those that did it says so."""
    output, sheet = tmp_path / "out" / "numbers.json", tmp_path / "sheet.png"
    arguments = ["--checkpoint", str(checkpoint), *(["--scenes", scenes] if scenes else []), "--samples", "48"]
    assert main(["evaluate", *arguments, "--output", str(output), "--contact-sheet", str(sheet)]) == 0
    numbers = json.loads(output.read_text())
    assert numbers["test/samples"] == 48
    assert 0 <= numbers["test/image_to_text_r1"] <= numbers["test/image_to_text_r10"] <= 1
    assert numbers["data"] == f"synthetic scenes ({scenes or 'test'})"
    assert numbers["split"] == (scenes or "test")
    shown = capsys.readouterr().out
    assert ("--scenes test measures others" in shown) == (scenes == "val")
    assert ("may look too good" in (numbers["note"] or "")) == (scenes == "val")
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_evaluate_says_that_a_validation_split_chose_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "scenes", "--output", str(tmp_path / "data"), "--scenes", "20", "--image-size", "32"]) == 0
    for arguments, split in (([], "val"), (["--manifest", "manifest.jsonl"], "manifest")):
        command = ["evaluate", "--checkpoint", str(checkpoint), "--data-dir", str(tmp_path / "data"), *arguments]
        assert main([*command, "--output", str(tmp_path / "numbers.json")]) == 0
        numbers, shown = json.loads((tmp_path / "numbers.json").read_text()), capsys.readouterr().out
        assert numbers["split"] == split
        assert ("--manifest measures others" in shown) == (split == "val") == (numbers["note"] is not None)


def test_a_checkpoint_from_before_there_was_a_test_split(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = load_checkpoint(checkpoint)
    assert old.data.fingerprint is not None
    assert "+scenes-2/val/" in old.data.fingerprint
    old.data = dataclasses.replace(old.data, fingerprint=old.data.fingerprint.replace("scenes-2/val", "scenes-1/val"))
    save_checkpoint(tmp_path / "old.pt", old)
    assert main(["evaluate", "--checkpoint", str(tmp_path / "old.pt"), "--samples", "12"]) == 0
    assert "from before there was a test split" in capsys.readouterr().out


def test_a_collapsed_model_is_said_aloud(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collapsed = load_checkpoint(checkpoint)
    collapsed.model["predictor.pred_head.weight"] = torch.zeros_like(collapsed.model["predictor.pred_head.weight"])
    save_checkpoint(tmp_path / "collapsed.pt", collapsed)
    assert main(["evaluate", "--checkpoint", str(tmp_path / "collapsed.pt"), "--samples", "48"]) == 0
    assert "the predicted embeddings have collapsed to one point" in caplog.text


def test_evaluate_on_a_named_manifest(checkpoint: Path, tmp_path: Path) -> None:
    records = [{"image": None, "query": f"What is {i}?", "answer": str(i % 3)} for i in range(7)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "numbers.json"
    arguments = ["--checkpoint", str(checkpoint), "--data-dir", str(tmp_path), "--manifest", "test.jsonl"]
    assert main(["evaluate", *arguments, "--output", str(output)]) == 0
    numbers = json.loads(output.read_text())
    assert (numbers["test/samples"], numbers["test/questions"], numbers["test/gallery_texts"]) == (7, 7, 3)


def test_evaluate_with_bad_input(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    for arguments, message in (
        (["--checkpoint", "/nowhere.pt"], "no checkpoint at /nowhere.pt"),
        (["--checkpoint", str(checkpoint), "--data-dir", "/nowhere"], "there is no such directory"),
        (["--checkpoint", str(checkpoint), "--device", "cuda:7"], "--device cuda:7: not available here"),
        (["--checkpoint", str(checkpoint), "--samples", "8", "--output", "/proc/nowhere/x.json"], "cannot write"),
    ):
        assert main(["evaluate", *arguments]) == 2
        assert message in capfd.readouterr().err


def test_bench_layer_prints_ratios(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "layer", *BENCH_LAYER, "--scaling-lengths", "32", "64"]) == 0
    out = capsys.readouterr().out
    assert "sequential reference" in out
    assert "ratio to the floor" in out


def test_bench_data_prints_rates(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "data", *BENCH_DATA]) == 0
    assert "waiting" in capsys.readouterr().out


def test_none_is_no_number_and_a_text_like_any_other(checkpoint: Path, capfd: pytest.CaptureFixture) -> None:
    arguments = ["ask", "--checkpoint", str(checkpoint), "is it red?", "--json"]
    for flag in ("--max-tokens", "--top-k", "--top-p"):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, flag, "None"])
        assert stopped.value.code == 2
        assert f"Error parsing {flag}: " in capfd.readouterr().err
    assert main([*arguments, "--image", "None"]) == 2
    assert capfd.readouterr().err == "error: None: there is no such image file\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_takes_the_half_written_file_along(tmp_path: Path, number: signal.Signals) -> None:
    script = """
import os, signal, sys, time
from pathlib import Path
from mamba3_jepa.cli import main
from mamba3_jepa.files.whole_file import whole_file

# tests in the background are started without the one, tests under nohup without the other
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def write_half(**_):
    with whole_file(Path(sys.argv[1])) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(60)

main.app.cli = write_half
sys.exit(main.main())
"""
    output = tmp_path / "output.npy"
    output.write_text("as it was")
    done = subprocess.run([sys.executable, "-c", script, output, str(int(number))], check=False, timeout=60)
    assert done.returncode == 128 + number
    assert [path.read_text() for path in tmp_path.iterdir()] == ["as it was"]


@pytest.mark.parametrize("arguments", [["--help"], ["inspect"], ["inspect", "--json"]])
def test_an_output_that_cannot_be_written(checkpoint: Path, arguments: list[str]) -> None:
    if arguments[0] == "inspect":
        arguments = [*arguments, str(checkpoint)]
    reader, writer = os.pipe()
    os.close(reader)
    closed = Program(arguments, stdout=writer)
    os.close(writer)
    assert (closed.wait(), closed.said()) == (141, "")
    if not Path("/dev/full").exists():
        return
    with open("/dev/full", "w") as full:
        done = Program(arguments, stdout=full.fileno())
    said = "error: cannot write to the standard output: No space left on device\n"
    assert (done.wait(), done.said()) == (2, said)


def test_every_flag_the_readmes_name_exists(capsys: pytest.CaptureFixture) -> None:
    """The READMEs' flags, against the help of the commands."""
    import re

    helps = ""
    for command in (["train-jepa"], ["evaluate"], ["bench", "layer"], ["bench", "data"], ["bench", "parity"],
                    *(["prepare", name] for name in ("easy-vqa", "vqav2", "coco-captions", "llava", "parquet")),
                    ["train-decoder"], ["train-agent"], ["export"], ["ask"], ["agent"], ["embed"],
                    ["memory", "add"], ["memory", "remove"],
                    ["search"], ["classify"], ["inspect"], ["bench", "cache"], ["bench", "decode"], ["bench", "index"],
                    ["bench", "rust"], ["bench", "step"], ["cache", "list"], ["cache", "clean"]):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert not ended.value.code
        helps += capsys.readouterr().out
    root = Path(__file__).parents[2]
    other_programs = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--num_processes",
                      "--signals-to-handle", "--signal", "--shm-size", "--index-url", "--release",
                      "--weights"}  # fmt: skip
    for readme in (root / "README.md", root / "training" / "README.md"):
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", readme.read_text())) - other_programs
        missing = sorted(flag for flag in flags if not re.search(rf"{flag}\b", helps))
        assert missing == [], readme


def test_evaluate_holds_out_what_training_held_out(tmp_path: Path) -> None:
    """Another share would mix training samples into the measurement."""
    data, run, output = tmp_path / "data", tmp_path / "run", tmp_path / "numbers.json"
    data.mkdir()
    records = [{"image": None, "query": f"What is {i}?", "answer": str(i % 5)} for i in range(60)]
    (data / "manifest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--tiny", "--data-dir", str(data), "--val-fraction", "0.3", "--max-steps", "1", "--batch-size", "4"]
    assert main(["train-jepa", *arguments, "--output-dir", str(run)]) == 0
    best = run / "phase1_best.pt"
    assert main(["evaluate", "--checkpoint", str(best), "--data-dir", str(data), "--output", str(output)]) == 0
    held_out = load_checkpoint(best).data.val_samples
    assert held_out is not None
    assert 10 < held_out < 30
    assert json.loads(output.read_text())["test/samples"] == held_out
