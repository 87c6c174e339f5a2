"""metrics.jsonl: strict JSON, crash-tolerant reading, truncation at resume."""

import json
import math

import numpy as np
import pytest
import torch

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.metrics_log import MetricsLog, read_metrics


@pytest.fixture
def log(tmp_path):
    return MetricsLog(tmp_path / "run" / "metrics.jsonl")


def steps(log):
    return [record["step"] for record in read_metrics(log.path)]


def test_lines_are_strict_json_and_non_finite_is_null(log):
    log.append(1, 0.5, {"train/loss": math.nan, "train/lr": 3e-4, "n": 7, "none": None})
    log.append(2, 1, {"train/loss": torch.tensor(2.5), "a": np.float32(0.5), "b": -math.inf})

    def refuse(name):
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=refuse) for line in log.path.read_text().splitlines()]
    assert lines == read_metrics(log.path)
    assert lines[0]["train/loss"] is None
    assert lines[0]["train/lr"] == 3e-4
    assert (lines[0]["n"], lines[0]["none"], lines[0]["epoch"]) == (7, None, 0.5)
    assert (lines[1]["train/loss"], lines[1]["a"], lines[1]["b"]) == (2.5, 0.5, None)
    assert lines[0]["time"] <= lines[1]["time"]
    with pytest.raises(ValueError, match="step"):
        log.append(3, 1, {"step": 4})


def test_what_an_older_file_says_of_numbers_that_are_not_finite_is_none_and_goes(log):
    log.append(1, 0, {"train/loss": 1.0})
    with log.path.open("a") as file:
        file.write('{"step": 2, "epoch": 0, "train/loss": NaN, "a": [-Infinity]}\n{"step": 3, "x": Infinity}\n')
    assert [record.get("train/loss") for record in read_metrics(log.path)] == [1.0, None, None]
    assert read_metrics(log.path)[1]["a"] == [None]
    log.truncate_after(2)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in log.path.read_text().splitlines()]
    assert lines == read_metrics(log.path)
    assert lines[1] == {"step": 2, "epoch": 0, "train/loss": None, "a": [None]}


def test_truncated_last_line_is_left_out_and_repaired_by_the_next_append(log):
    log.append(1, 0, {"train/loss": 1.0})
    with log.path.open("ab") as file:
        file.write('{"step": 2, "train/loss": 0.5, "text": "é'.encode()[:-1])
    assert steps(log) == [1]
    log.append(2, 0, {"train/loss": 0.25})
    assert steps(log) == [1, 2]
    assert read_metrics(log.path)[1]["train/loss"] == 0.25


def test_last_line_that_only_lacks_its_newline_is_kept(log):
    log.append(1, 0, {})
    log.path.write_bytes(log.path.read_bytes().rstrip(b"\n"))
    assert steps(log) == [1]
    log.append(2, 0, {})
    assert steps(log) == [1, 2]


def test_truncate_after_drops_later_steps(log):
    log.truncate_after(3)  # nothing there yet
    for step in (1, 2, 3, 3, 4, 5):
        log.append(step, 0, {"train/loss": 1 / step})
    before = log.path.read_bytes().splitlines()[:4]
    with log.path.open("ab") as file:
        file.write(b'{"step": 6, "tr')
    log.truncate_after(3)
    assert log.path.read_bytes().splitlines() == before
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]
    log.append(4, 0, {})
    assert steps(log) == [1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    "bad", ["{", "[1]", '{"epoch": 1}', '{"step": 1.5}', '{"step": true}', '{"step": NaN}', '{"step": 1, "x": nan}', ""]
)
def test_malformed_line_names_file_and_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_missing_file_and_unwritable_directory_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot read"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl").append(1, 0, {})


def test_failed_rewrite_keeps_the_old_file(log, monkeypatch):
    for step in (1, 2):
        log.append(step, 0, {})
    before = log.path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        log.truncate_after(1)
    assert log.path.read_bytes() == before
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]
