"""Checkpoints: whole or not there, strict, and clear about what is wrong."""

import dataclasses
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.config import preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint, DataRecord, load_checkpoint, save_checkpoint
from mamba3_jepa.models.vljepa import Mamba3Jepa


def _checkpoint(size: int = 10, phase: int = 1) -> Checkpoint:
    return Checkpoint(
        phase=phase,
        config=preset("tiny"),
        model={"weight": torch.arange(size, dtype=torch.float32)},
        tokenizer="{}",
        data=DataRecord(synthetic=True),
        metrics={"val/loss": 0.5},
        run={"seed": 1},
    )


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "phase1_last.pt"
    saved = _checkpoint()
    saved.trainer = {"position": {"step": 3}, "rng": [torch.get_rng_state()]}
    saved.temperature = 0.05
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path, phase=1)
    assert loaded.config == saved.config
    assert torch.equal(loaded.model["weight"], saved.model["weight"])
    assert (loaded.tokenizer, loaded.data, loaded.metrics, loaded.run, loaded.temperature) == (
        saved.tokenizer, saved.data, saved.metrics, saved.run, 0.05,
    )  # fmt: skip
    assert loaded.trainer is not None
    assert loaded.trainer["position"] == {"step": 3}
    assert [p.name for p in path.parent.iterdir()] == ["phase1_last.pt"]


def test_where_the_data_came_from_survives(tmp_path: Path) -> None:
    record = DataRecord(
        source="scenes",
        synthetic=False,
        train_samples=0,
        fingerprint="abc",
        answers=["red", "größer"],
        confusion={"clear": 3},
        earlier=DataRecord(source="before", synthetic=True, earlier=DataRecord(source="long before")),
    )
    assert DataRecord.from_dict(record.to_dict(), "test") == record
    assert DataRecord.from_dict(json.loads(json.dumps(record.to_dict())), "test") == record
    assert record.to_dict()["synthetic"] is False, "a value that is known, though it is false"
    assert record.to_dict()["train_samples"] == 0
    assert DataRecord().to_dict() == {}
    save_checkpoint(tmp_path / "c.pt", dataclasses.replace(_checkpoint(), data=record))
    assert load_checkpoint(tmp_path / "c.pt").data == record
    assert record.without_answers() == dataclasses.replace(record, answers=[])


def test_the_earlier_phase_by_its_old_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", _checkpoint(phase=3))
    values = torch.load(tmp_path / "c.pt", weights_only=True)
    values["data"] = {"source": "c", "earlier": {"source": "b", "phase1": {"source": "a", "synthetic": True}}}
    torch.save(values, tmp_path / "c.pt")
    first = DataRecord(source="a", synthetic=True)
    assert load_checkpoint(tmp_path / "c.pt").data == DataRecord(
        source="c", earlier=DataRecord(source="b", earlier=first)
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sauce": "scenes"}, "sauce: "),
        ({"answers": "red"}, "answers: "),
        ({"earlier": {"train_samples": "many"}}, r"earlier\.train_samples: "),
        ({"confusion": {"clear": "three"}}, r"confusion\.clear: "),
    ],
)
def test_data_that_is_no_record_names_the_field(tmp_path: Path, data: dict[str, object], message: str) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, _checkpoint())
    torch.save(torch.load(path, weights_only=True) | {"data": data}, path)
    with pytest.raises(UserError, match=rf"c\.pt is damaged: its data: {message}"):
        load_checkpoint(path)


def test_a_temperature_is_known_or_the_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, _checkpoint())
    values = torch.load(path, weights_only=True)
    del values["temperature"]
    torch.save(values, path)
    assert load_checkpoint(path).temperature is None, "of an earlier version"
    for wrong in (0.0, float("nan"), "0.07"):
        torch.save(values | {"temperature": wrong}, path)
        with pytest.raises(UserError, match=r"c\.pt is damaged: its temperature is"):
            load_checkpoint(path)


def test_a_checkpoint_from_before_the_memory_floor(tmp_path: Path) -> None:
    """It loads, and lets every text of a memory through, as it did; a model without recursion gets nothing."""
    for phase in (2, 3):
        model = tiny_model(phase)
        path = write_checkpoint(tmp_path / f"phase{phase}.pt", model, phase)
        values = torch.load(path, weights_only=True)
        values["model"].pop("recursion.memory_floor", None)
        torch.save(values, path)
        loaded = load_checkpoint(path)
        assert set(loaded.model) == set(model.state_dict())
        opened = Mamba3Jepa.from_checkpoint(path)
        assert (opened.recursion is None) == (phase == 2)
        assert opened.recursion is None or float(opened.recursion.memory_floor) == -1


def test_other_phase_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", _checkpoint(phase=2))
    with pytest.raises(UserError, match=r"c\.pt is a phase 2 checkpoint; phase 1 is needed"):
        load_checkpoint(tmp_path / "c.pt", phase=1)
    assert load_checkpoint(tmp_path / "c.pt", phase=(1, 2)).phase == 2


@pytest.mark.parametrize("cut", [0, 10, 1000, -1])
def test_truncated_file(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, _checkpoint(5000))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"c\.pt"):
        load_checkpoint(path)


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, _checkpoint(5000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        load_checkpoint(path)


def test_foreign_files(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="not a Mamba3-JEPA checkpoint"):
        load_checkpoint(tmp_path / "foreign.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")  # would run code when unpickled
    with pytest.raises(UserError, match="none of it was run"):
        load_checkpoint(tmp_path / "module.pt")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="is a directory"):
        load_checkpoint(tmp_path)


def test_unknown_config_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, _checkpoint())
    values = torch.load(path, weights_only=True)
    values["config"]["predictor"]["colour"] = "red"
    torch.save(values, path)
    with pytest.raises(UserError, match=r"c\.pt.*predictor\.colour"):
        load_checkpoint(path)


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk: the write fails midway in both cases."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, _checkpoint(10))
    before = path.read_bytes()
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old_limit[1]))
        with pytest.raises(UserError, match=r"could not write checkpoint .*unchanged"):
            save_checkpoint(path, _checkpoint(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_killed_while_writing_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """Many saves, SIGKILL at an arbitrary moment: what is at the path always loads."""
    path = tmp_path / "c.pt"
    program = (
        "import sys, torch; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from test_checkpoint import _checkpoint\n"
        "from mamba3_jepa.files.checkpoint import save_checkpoint\n"
        "print('ready', flush=True)\n"
        "while True: save_checkpoint(Path(sys.argv[1]), _checkpoint(300_000))\n"
    )
    for wait in (0.05, 0.12):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path), str(Path(__file__).parent)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        while not path.exists():
            pass
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(load_checkpoint(path).model["weight"]) == 300_000
