"""Texts that are wrong for a sample: what manifests, shards and scenes say, which of them an epoch takes, and what
becomes of them on the way to a checkpoint."""

from __future__ import annotations

import io
import json
import logging
import signal
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_continue import stop_after
from test_scenes import _read_caption
from tiny import tiny_model

from mamba3_jepa.cli.main import main
from mamba3_jepa.data.content import content_of
from mamba3_jepa.data.hard_negatives import Negative, drawn
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.records import parse_record
from mamba3_jepa.data.scene_world import HELD_OUT_PAIRS
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.shards import ShardSource
from mamba3_jepa.data.sources import ManifestSource
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import load_checkpoint

WORDS = ["cat", "dog", "owl", "fox", "hen"]


def write_manifest(folder: Path, lines: list[dict]) -> Path:
    (folder / "images").mkdir(parents=True)
    for i, line in enumerate(lines):
        Image.new("RGB", (32, 32), (i * 40 % 256, 90, 255 - i * 40 % 256)).save(folder / "images" / f"{i}.png")
        line["image"] = f"images/{i}.png"
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def say(problem: str, **fields: object) -> None:
    with pytest.raises(UserError) as error:
        parse_record(json.dumps({"image": "a.png", **fields}), "manifest.jsonl line 3")
    assert str(error.value).startswith("manifest.jsonl line 3: ")
    assert problem in str(error.value)


def test_a_list_or_a_list_for_each_kind() -> None:
    line = {"image": "a.png", "text": "a cat", "negatives": [" a dog ", "an owl"]}
    assert parse_record(json.dumps(line), "").wrong == [Negative("a dog"), Negative("an owl")]
    line["negatives"] = {"colors": ["a dog"], "places": []}
    assert parse_record(json.dumps(line), "").wrong == [Negative("a dog", "colors")]
    for nothing in ([], {}, None):
        assert parse_record(json.dumps(line | {"negatives": nothing}), "").wrong == []


def test_what_is_no_negative_is_named() -> None:
    expected = 'field "negatives": expected a list of texts, or an object with such a list for each kind, found'
    say(expected, text="a cat", negatives="a dog")
    say(expected, text="a cat", negatives=["a dog", 3])
    say(expected, text="a cat", negatives={"colors": "a dog"})
    say('field "negatives": a text is empty', text="a cat", negatives=["a dog", " "])
    say("field \"negatives\": 'a cat' is right: remove it", text=" a cat", negatives=["a cat "])
    say("'two cats' is right", captions=["a cat", "two cats"], negatives=["a dog", "two cats"])
    say('the kind "all" is what all of them', text="a cat", negatives={"all": ["a dog"]})
    say("'no' is right", question="is it?", answers=["yes", "no "], negatives=["no"])
    say("'yes' is right", question="is it?", answer="yes", negatives={"answer": ["yes"]})
    say("'A  cat' is right", text="a cat", negatives=["A  cat"])
    say("neither a text nor an answer", query="hello", negatives=["a dog"])


def test_the_right_text_in_a_file_is_no_negative_either(tmp_path: Path) -> None:
    data = write_manifest(tmp_path / "data", [{"text": "a.txt", "negatives": ["a dog"]}])
    (data / "a.txt").write_text("a cat\n")
    assert ManifestSource(data).sample(0).negatives == [Negative("a dog")]
    (data / "a.txt").write_text("a dog\n")
    with pytest.raises(BadSampleError, match=r"line 1: .*'a dog' is right"):
        ManifestSource(data).sample(0)


def test_negatives_of_shards_stand_in_the_json(tmp_path: Path) -> None:
    def member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "png")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        given = ({"kind": ["a dog"]}, None, "a dog", ["a cat"], 0, False, "")
        for key, negatives in zip("abcdefg", given, strict=True):
            member(tar, f"{key}.png", png.getvalue())
            member(tar, f"{key}.json", json.dumps({"caption": "a cat", "negatives": negatives}).encode())
    source = ShardSource(tmp_path)
    assert source.sample(0).negatives == [Negative("a dog", "kind")]
    assert source.sample(1).negatives == []
    expected = 'json: field "negatives": expected a list'
    for i, problem in ((2, expected), (3, "'a cat' is right"), (4, expected), (5, expected), (6, expected)):
        with pytest.raises(BadSampleError, match=problem):
            source.sample(i)


def test_an_epoch_draws_others_and_the_same_each_time() -> None:
    negatives = [Negative(word) for word in WORDS] + [Negative("cat", "again")]
    assert drawn(negatives, None) == negatives
    assert drawn(negatives, 0) == []
    assert drawn(negatives, 9) == [Negative("cat", "again"), *negatives[1:5]]  # each text once
    counts: Counter[str] = Counter()
    for epoch in range(400):
        chosen = drawn(negatives, 2, 7, epoch, 3)
        texts = [each.text for each in chosen]
        assert texts == [each.text for each in drawn(negatives[::-1], 2, 7, epoch, 3)]
        assert len(set(texts)) == 2
        counts.update(texts)
    assert all(120 < counts[word] < 200 for word in WORDS)  # 160 expected


def test_a_batch_holds_the_negatives_of_the_samples_that_can_be_read(tmp_path: Path) -> None:
    lines = [{"text": word, "negatives": {"other": [w for w in WORDS if w != word]}} for word in WORDS[:4]]
    lines.append({"text": WORDS[4]})
    data = write_manifest(tmp_path / "data", lines)
    (data / "images" / "1.png").write_bytes(b"no image")
    model = tiny_model(1, WORDS)

    def batch(n: int | None):
        loader = build_loader(ManifestSource(data, on_bad_sample="skip"), range(5), model.tokenizer, model.config, 5,
                              shuffle=False, seed=0, drop_last=False, on_bad_sample="skip",
                              hard_negatives=n)  # fmt: skip
        return next(iter(loader))

    two, every, none = batch(2), batch(None), batch(0)
    assert len(two) == 4
    assert two.negative_of.tolist() == [0, 0, 1, 1, 2, 2]  # the rows that are left; the last sample has none
    assert every.negative_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert every.negative_kinds == ["other"] * 12
    for row in range(3):
        known = every.negative_hash[every.negative_of == row].tolist()
        assert set(two.negative_hash[two.negative_of == row].tolist()) <= set(known)
        assert two.target_hash[row] not in known
    assert len(none.negative_ids) == len(none.negative_of) == 0
    for name in ("target_ids", "target_mask", "query_ids", "pixels"):
        assert torch.equal(getattr(two, name), getattr(none, name)), name
    ids, mask, keys = two.texts()
    alone = model.y_encoder(two.negative_ids, two.negative_mask)
    together = model.y_encoder.forward_distinct(ids, mask, keys)
    torch.testing.assert_close(together[4:], alone, atol=1e-5, rtol=0)


def test_data_with_other_negatives_is_other_data(tmp_path: Path) -> None:
    lines = [{"text": "cat"}, {"text": "dog", "negatives": ["owl"]}, {"text": "fox", "negatives": {"kind": ["hen"]}}]
    first = content_of(ManifestSource(write_manifest(tmp_path / "a", lines)), range(3)).texts
    lines[1]["negatives"], lines[2]["negatives"] = ["hen"], ["hen"]
    other = content_of(ManifestSource(write_manifest(tmp_path / "b", lines)), range(3)).texts
    assert (first == other).tolist() == [True, False, True]  # what a kind is called teaches nothing


N_SCENES = 3000


@pytest.fixture(scope="module")
def scenes() -> SceneSource:
    return SceneSource("train", n_scenes=N_SCENES, seed=5)


def test_wrong_captions_of_scenes_are_wrong_in_what_their_kind_says(scenes: SceneSource) -> None:
    """Read from the words of both captions alone, over thousands of scenes."""
    counts: Counter[str] = Counter()
    for i in scenes.indices("caption").tolist():
        sample = scenes.sample(i)
        right = {place: (size, color, shape) for size, color, shape, place in _read_caption(sample.target)}
        kinds = [kind for _, kind in sample.negatives]
        assert len(set(kinds)) == len(kinds)
        counts.update(kinds)
        for text, kind in sample.negatives:
            said = {place: tuple(rest) for *rest, place in _read_caption(text)}
            assert said != right
            changed = [place for place in said if said[place] != right.get(place)]
            if kind == "number":
                assert len(said) == len(right) + 1 <= 3
                assert len(changed) == 1
                continue
            assert said.keys() == right.keys()
            if kind == "absent_color":
                (place,) = changed
                assert said[place][1] not in {color for _, color, _ in right.values()}
                assert (said[place][0], said[place][2]) == (right[place][0], right[place][2])
                continue
            first, second = changed
            parts = {"colors": [1], "shapes": [2], "sizes": [0], "places": [0, 1, 2]}[kind]
            for part in range(3):
                ours, theirs = (first, second) if part not in parts else (second, first)
                assert (said[first][part], said[second][part]) == (right[ours][part], right[theirs][part])
    assert counts["absent_color"] == N_SCENES
    assert min(counts[kind] for kind in ("colors", "shapes", "sizes", "places", "number")) > N_SCENES / 5


def test_wrong_answers_about_scenes_are_wrong(scenes: SceneSource) -> None:
    words: Counter[tuple[str, str]] = Counter()
    for i in scenes.indices("question").tolist():
        sample = scenes.sample(i)
        ((text, kind),) = sample.negatives
        assert kind == "answer"
        assert text != sample.target
        words[sample.target, text] += 1
        there = scenes.scene(sample.meta["scene"]).objects
        if sample.question.startswith("what color") and len({each.color for each in there}) > 1:
            assert text in {each.color for each in there}, "what another object is"
    kinds = [{"yes", "no"}, {"one", "two", "three"}, {"large", "small"}]
    for right, wrong in words:
        assert all((right in kind) == (wrong in kind) for kind in kinds)
    assert words["yes", "no"] > 0 < words["no", "yes"]


def test_negatives_hold_out_of_training_what_scenes_do(scenes: SceneSource) -> None:
    held_out = [" ".join(pair) for pair in HELD_OUT_PAIRS]
    val = SceneSource("val", n_scenes=500, seed=5)
    reserved = {val.sample(i).target for i in val.indices("caption").tolist()}
    for i in scenes.indices("caption").tolist():
        for text, _ in scenes.sample(i).negatives:
            assert text not in reserved
            assert not any(pair in text for pair in held_out)
    other = SceneSource("compositional", n_scenes=200, seed=5)
    texts = [text for i in other.indices("caption").tolist() for text, _ in other.sample(i).negatives]
    assert any(pair in text for text in texts for pair in held_out)


SHORT = ["--tiny", "--cpu", "--synthetic-scenes", "16", "--batch-size", "8", "--epochs", "2", "--log-every", "1",
         "--val-samples", "24"]  # fmt: skip


def train(output: Path, *arguments: str, status: int = 0) -> dict[str, torch.Tensor]:
    assert main(["train-jepa", *SHORT, "--output-dir", str(output), *arguments]) == status
    return load_checkpoint(output / "phase1_last.pt", phase=1).model


def logged(output: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_a_run_with_hard_negatives_continues_bit_for_bit(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "--hard-negatives", "2")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(8, patch)  # in the second epoch, which draws others
        train(tmp_path / "halves", "--hard-negatives", "2", status=128 + signal.SIGTERM)
    assert len(logged(tmp_path / "halves", "train/loss")) == 8
    halves = train(tmp_path / "halves", "--hard-negatives", "2", "--resume")
    without = train(tmp_path / "without", "--hard-negatives", "0")
    assert [name for name in whole if not torch.equal(halves[name], whole[name])] == []
    assert not torch.equal(whole["predictor.pred_head.weight"], without["predictor.pred_head.weight"])
    assert min(logged(tmp_path / "whole", "train/hard_negatives")) >= 1
    assert set(logged(tmp_path / "without", "train/hard_negatives")) == {0}


def test_a_run_from_before_there_were_hard_negatives_goes_on_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    train(output, "--hard-negatives", "0", "--max-steps", "3", "--warmup-steps", "1")
    content = torch.load(output / "phase1_last.pt", weights_only=True)
    del content["run"]["hard_negatives"]
    torch.save(content, output / "phase1_last.pt")
    train(output, "--warmup-steps", "1", "--resume", status=2)
    assert "--hard-negatives 0 -> 2" in capsys.readouterr().err
    train(output, "--hard-negatives", "0", "--warmup-steps", "1", "--resume")
    assert len(logged(output, "train/loss")) == 12


def test_one_text_for_all_teaches_where_there_are_hard_negatives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_manifest(tmp_path / "data", [{"text": "a photo", "negatives": ["a drawing"]} for _ in range(16)])
    given = ["--tiny", "--cpu", "--val-fraction", "0.3", "--epochs", "1", "--data-dir", str(data), "--log-every", "1"]
    for size, n, is_said in (("4", "1", False), ("1", "1", False), ("4", "0", True), ("1", "0", True)):
        caplog.clear()
        output = tmp_path / f"run-{size}-{n}"
        command = ["train-jepa", *given, "--batch-size", size, "--max-steps", "2", "--hard-negatives", n]
        assert main([*command, "--output-dir", str(output)]) == 0
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert any("nothing is learned" in text for text in said) == is_said
        assert (max(logged(output, "train/negatives")) > 0) != is_said
