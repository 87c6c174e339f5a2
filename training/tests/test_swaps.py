"""Swap accuracy: by hand, through a model, over processes and batches, and on the screen."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from test_hard_negatives import WORDS, write_manifest
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.sources import ManifestSource
from mamba3_jepa.evaluation.swaps import SwapShare, WrongText, swap_accuracy
from mamba3_jepa.evaluation.validate import collect, evaluate, merge

_KEYS = itertools.count()


def wrong(sample: int, kind: str, margin: float, key: int | None = None) -> WrongText:
    """By default another text than all others."""
    return WrongText(sample=sample, kind=kind, key=next(_KEYS) if key is None else key, margin=margin)


def test_a_sample_is_right_where_all_its_wrong_texts_are_farther() -> None:
    found = [wrong(0, "colors", 0.5), wrong(0, "colors", 0.1), wrong(0, "places", -0.2), wrong(1, "colors", 0.3),
             wrong(1, "colors", 1e-8), wrong(2, "colors", 0.1), wrong(3, "answer", 0.4)]  # fmt: skip
    report = swap_accuracy(found, [None, None, None, "which?"])
    assert report is not None
    assert report.by_kind == {
        "colors": SwapShare(right=2 / 3, chance=pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3), samples=3),
        "places": SwapShare(right=0.0, chance=0.5, samples=1),
        "answer": SwapShare(right=1.0, chance=0.5, samples=1),
    }
    assert report.total == SwapShare(right=1 / 3, chance=pytest.approx((1 / 4 + 1 / 3 + 1 / 2) / 3), samples=3)
    assert report.metrics()["swap_accuracy_colors"] == pytest.approx(2 / 3)
    assert list(report.rows()) == ["all", "colors", "places", "answer"]


def test_a_wrong_text_counts_once_however_often_it_is_given() -> None:
    found = [wrong(0, "k", 0.5, key=1), wrong(0, "k", 0.5, key=1), wrong(0, "j", 0.5, key=1), wrong(0, "", 0.2, key=2)]
    report = swap_accuracy(found, [None])
    assert report is not None
    assert report.total == SwapShare(right=1.0, chance=1 / 3, samples=1)
    assert report.by_kind["k"] == report.by_kind["j"] == SwapShare(right=1.0, chance=0.5, samples=1)


def test_questions_count_where_no_caption_has_wrong_texts() -> None:
    report = swap_accuracy([wrong(1, "", 0.4), wrong(2, "", -0.4)], [None, "a?", "b?"])
    assert report is not None
    assert report.total == SwapShare(right=0.5, chance=0.5, samples=2)
    assert report.by_kind == {}, "a kind without a name is none"
    assert swap_accuracy([], [None]) is None


@pytest.mark.parametrize("batch_size", [2, 5])
def test_margins_are_those_of_the_embedded_texts(tmp_path: Path, batch_size: int) -> None:
    """Whatever the batches, over two processes, and with a sample in between that cannot be read."""
    lines = [{"text": word, "negatives": {"other": [w for w in WORDS if w < word]}} for word in WORDS]
    data = write_manifest(tmp_path / "data", lines)
    (data / "images" / "2.png").write_bytes(b"no image")
    model, source = tiny_model(1, WORDS), ManifestSource(data, on_bad_sample="skip")

    def part(rank: int):
        return build_loader(source, range(5), model.tokenizer, model.config, batch_size, shuffle=False, seed=0,
                            rank=rank, world_size=2, drop_last=False, on_bad_sample="skip",
                            hard_negatives=None)  # fmt: skip

    collected = merge([collect(model, part(rank), "cpu") for rank in (0, 1)])
    assert collected.index.tolist() == [i for i in collected.index.tolist() if i != 2]
    expected = []
    for row, i in enumerate(collected.index.tolist()):
        cosines = model.embed_text(WORDS) @ collected.predicted[row]
        expected += [(row, "other", float(cosines[i] - cosines[j])) for j in range(5) if WORDS[j] < WORDS[i]]
    assert [(each.sample, each.kind) for each in collected.wrong] == [each[:2] for each in expected]
    assert [each.margin for each in collected.wrong] == pytest.approx([each[2] for each in expected], abs=1e-5)
    metrics = evaluate(collected).metrics()
    right = [min(m for row, _, m in expected if row == sample) > 0 for sample in {row for row, _, _ in expected}]
    assert metrics["val/swap_accuracy"] == metrics["val/swap_accuracy_other"] == pytest.approx(sum(right) / len(right))
    assert metrics["val/swap_samples"] == 3


def test_a_wrong_text_that_is_cut_to_the_right_one_is_passed_over(tmp_path: Path) -> None:
    long = " ".join(WORDS * 20)
    data = write_manifest(tmp_path / "data", [{"text": f"{long} cat", "negatives": [f"{long} dog", "owl"]}] * 2)
    model = tiny_model(1, WORDS)
    loader = build_loader(ManifestSource(data), range(2), model.tokenizer, model.config, 2, shuffle=False, seed=0,
                          drop_last=False, hard_negatives=None)  # fmt: skip
    assert [each.sample for each in collect(model, loader, "cpu").wrong] == [0, 1]


def test_evaluate_shows_it_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = SceneSource("test", n_scenes=12)
    texts = [source.sample(i).target for i in source.indices("target").tolist()]
    checkpoint = write_checkpoint(tmp_path / "phase1.pt", tiny_model(1, texts), 1)
    command = ["evaluate", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out.json")]
    data = tmp_path / "scenes"
    assert main(["prepare", "scenes", "--output", str(data), "--scenes", "12"]) == 0
    capsys.readouterr()
    assert main([*command, "--data-dir", str(data), "--manifest", "manifest.jsonl"]) == 0
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    kinds = {"all", "colors", "shapes", "sizes", "places", "number", "absent_color", "answer"}
    assert set(written["swaps"]) == kinds
    assert 8 < written["swaps"]["absent_color"]["samples"] <= 12  # a long one may be cut to the right caption
    assert written["swaps"]["all"]["samples"] == 12
    assert written["swaps"]["answer"] == {"samples": 24, "chance": 0.5, "right": written["test/swap_accuracy_answer"]}
    assert 0 < written["swaps"]["all"]["chance"] < 0.5
    assert "swap accuracy" in shown
    for kind in kinds:
        assert kind in shown
    made = tmp_path / "made.json"
    assert main([*command[:-1], str(made)]) == 0
    assert set(json.loads(made.read_text())["swaps"]) == kinds, "scenes that were not written have them too"


def test_no_negatives_no_swap_accuracy(tmp_path: Path) -> None:
    data = write_manifest(tmp_path / "data", [{"text": word} for word in WORDS])
    model = tiny_model(1, WORDS)
    loader = build_loader(ManifestSource(data), range(5), model.tokenizer, model.config, 5, shuffle=False, seed=0,
                          drop_last=False, hard_negatives=None)  # fmt: skip
    report = evaluate(collect(model, loader, torch.device("cpu")))
    assert report.swaps is None
    assert not any("swap" in name for name in report.metrics())
