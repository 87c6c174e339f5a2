"""Weights shared out among processes (`--fsdp`): the same numbers, and the same checkpoints, as without."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_continue import assert_close, last, stop_after, train_lines
from torch.distributed.fsdp import fully_shard

from mamba3_jepa.cli.main import main
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.files.metrics_log import read_metrics
from mamba3_jepa.settings.training import Phase1Settings
from mamba3_jepa.training import sharing

TRAIN = [
    "train-jepa", "--tiny", "--cpu", "--workers", "0", "--log-every", "1", "--epochs", "1", "--synthetic-scenes", "16",
    "--val-samples", "12", "--angn-enabled", "--max-grad-norm", "0.5", "--eval-every", "4",
]  # fmt: skip
LEFT_AFTER = 3

pytestmark = pytest.mark.skipif(
    "ignored_params" not in inspect.signature(fully_shard).parameters, reason="torch 2.6 cannot share weights out"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, and two that share: each alone from its beginning, and continuing what the other has left."""
    folder = tmp_path_factory.mktemp("runs")
    alone = [*TRAIN, "--batch-size", "8", "--output-dir"]
    shared = [*TRAIN, "--batch-size", "4", "--fsdp", "--output-dir"]
    assert main([*alone, str(folder / "plain")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(LEFT_AFTER, patch)
        assert main([*alone, str(folder / "plain_then_shared")]) == 143
    commands = [
        (LEFT_AFTER, [*shared, str(folder / "shared_then_plain")]),
        (0, [*shared, str(folder / "plain_then_shared"), "--resume", "--checkpoint-activations"]),
    ]
    ran = subprocess.run(
        [sys.executable, __file__], input=json.dumps(commands), capture_output=True, text=True, timeout=300
    )
    assert json.loads(ran.stdout.splitlines()[-1]) == [[143, 143], [0, 0]], ran.stdout + ran.stderr
    (folder / "left.pt").write_bytes((folder / "shared_then_plain" / "phase1_last.pt").read_bytes())
    assert main([*alone, str(folder / "shared_then_plain"), "--resume"]) == 0
    return folder


@pytest.mark.parametrize("name", ["plain_then_shared", "shared_then_plain"])
def test_losses_norms_and_weights_are_those_of_one_process(runs: Path, name: str) -> None:
    ours, theirs = train_lines(runs / name), train_lines(runs / "plain")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for key in ("train/loss", "train/grad_norm", "train/temperature"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-3), key
    assert min(line["train/grad_norm"] for line in theirs) > 0.5, "each step was clipped"
    ours, theirs = (
        [line["val/loss"] for line in read_metrics(runs / each / "metrics.jsonl") if "val/loss" in line]
        for each in (name, "plain")
    )
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert_close(last(runs / name), last(runs / "plain"))


def test_a_checkpoint_does_not_show_that_weights_were_shared(runs: Path) -> None:
    def shapes(value: object) -> object:
        if isinstance(value, dict):
            return {name: shapes(each) for name, each in value.items()}
        return (type(value), value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)

    ours, theirs = load_checkpoint(runs / "left.pt"), load_checkpoint(runs / "plain" / "phase1_last.pt")
    assert shapes(ours.model) == shapes(theirs.model)
    for part in ("optimizer", "objective"):
        assert shapes(ours.trainer[part]) == shapes(theirs.trainer[part])
    best = load_checkpoint(runs / "plain_then_shared" / "phase1_best.pt")
    assert shapes(best.model) == shapes(theirs.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrast_batch": 64}, "`fsdp` cannot be combined with `contrast_batch` 64: "),
        ({"compile": True}, "`fsdp` cannot be combined with `compile`: "),
        ({"precision": "fp16"}, "`fsdp` cannot be combined with `precision` fp16: .*use bf16"),
        ({"on_bad_sample": "skip"}, "`fsdp` cannot be combined with `on_bad_sample` skip: "),
    ],
)
def test_what_cannot_be_combined_is_refused(
    changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "world_size", lambda: 2)
    sharing.demand_sharing(Phase1Settings(fsdp=True))
    with pytest.raises(UserError, match=message):
        sharing.demand_sharing(Phase1Settings(fsdp=True, **changes))


def test_one_process_has_nobody_to_share_with(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main([*TRAIN, "--fsdp", "--output-dir", str(tmp_path / "run")]) == 2
    assert "--fsdp shares the weights out among several processes, and there is one" in capfd.readouterr().err


def _run_all() -> None:
    """Each command of the standard input in two processes, forked when everything is loaded; writes their statuses."""
    import accelerate.state  # noqa: F401
    import transformers.models.vjepa2.modeling_vjepa2  # noqa: F401

    import mamba3_jepa.training.phase1  # noqa: F401
    from mamba3_jepa.training import loop

    step = loop._State.step

    def checked(self: loop._State, read: object) -> dict[str, float]:
        metrics = step(self, read)
        kept = [
            (len(tensor.to_local().flatten()), tensor.numel())
            for parameter in self.objective.parameters()
            if parameter.requires_grad
            for tensor in (parameter, parameter.grad, self.optimizer.state[parameter]["exp_avg"])
        ]
        own, total = map(sum, zip(*kept, strict=True))
        assert own < 0.55 * total, "each of two processes keeps half"
        return metrics

    loop._State.step = checked

    statuses = []
    for stop, command in json.load(sys.stdin):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = [_forked(rank, port, stop, command) for rank in (0, 1)]
        statuses.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    sys.stdout.write(json.dumps(statuses))


def _forked(rank: int, port: int, stop: int, command: list[str]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if stop:
                stop_after(stop, pytest.MonkeyPatch())
            status = main(command)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


if __name__ == "__main__":
    _run_all()
