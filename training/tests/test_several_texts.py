"""Several captions of one image, several answers to one question: what is trained on, and what is carried on."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_model

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import preset
from mamba3_jepa.data.content import content_of
from mamba3_jepa.data.files import ManifestSource
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.sample import Sample, source_texts
from mamba3_jepa.data.shards import ShardSource
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.training.epoch_targets import EpochTargets
from mamba3_jepa.training.frozen import frozen_outputs
from mamba3_jepa.training.phase1 import Phase1Objective
from mamba3_jepa.training.phase2 import Phase2Objective

WAYS = ["picture {}", "this is number {}", "a view of {} and of nothing else", "{}", "{}, once more"]


def captions(i: int) -> list[str]:
    """Of different lengths, and of some images none, or one."""
    return [way.format(i) for way in WAYS[: (i * 3) % 7]]


def write(root: Path, *records: dict[str, Any]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i, record in enumerate(records):
        Image.new("RGB", (20, 16), (i * 9, 90, 200)).save(root / record["image"])
    (root / "manifest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with zero to five captions each; one without has a text or a question with answers instead."""
    records: list[dict[str, Any]] = []
    for i in range(28):
        record: dict[str, Any] = {"image": f"{i}.png"}
        if found := captions(i):
            record["captions"] = found
        elif i % 2:
            record |= {"question": "Which?", "answers": [f"the {i}", f"the {i}", "none"]}
        else:
            record["text"] = f"just {i}"
        records.append(record)
    return write(tmp_path_factory.mktemp("data") / "data", *records)


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> TextTokenizer:
    source = ManifestSource(data)
    return TextTokenizer.train(source_texts(source, range(len(source))), 300)


@pytest.mark.parametrize(
    ("fields", "target"),
    [
        ({"answers": ["no", "yes", " yes "]}, "yes"),
        ({"answers": ["b", "a", "a", "b"]}, "b"),
        ({"answers": ["only"]}, "only"),
        ({"answers": ["", " ", "", "a", "b", "b"]}, "b"),  # people who said nothing
        ({"answers": ["no", "no", "yes"], "answer": "yes"}, "yes"),
    ],
)
def test_the_answer_or_the_most_frequent_is_trained_on_and_all_are_carried_on(
    tmp_path: Path, fields: dict[str, Any], target: str
) -> None:
    write(tmp_path, {"image": "a.png", "question": "Is it?", **fields})
    source = ManifestSource(tmp_path)
    sample = source.sample(0)
    assert sample.target == target
    assert sample.answers == tuple(answer.strip() for answer in fields["answers"])
    assert (sample.question, sample.captions) == ("Is it?", ())
    assert sample.target_in(5, index=0, seed=1) == target
    assert source.indices("question").tolist() == source.indices("target").tolist() == [0]


def test_captions_are_texts_of_one_image(data: Path) -> None:
    source = ManifestSource(data)
    several = [i for i in range(28) if len(captions(i)) > 1]
    assert source.indices("captions").tolist() == several
    assert set(several) < set(source.indices("caption").tolist())
    for i in several:
        sample = source.sample(i)
        assert sample.captions == tuple(captions(i))
        assert (sample.target, sample.question, sample.answers) == (captions(i)[0], None, ())


def test_a_caption_is_never_a_path(tmp_path: Path) -> None:
    write(tmp_path, {"image": "a.png", "captions": [" read me.txt", "b"]})
    assert ManifestSource(tmp_path).sample(0).captions == ("read me.txt", "b")


def test_each_caption_has_its_turn() -> None:
    sample = Sample(image=None, target="a", captions=("a", "b", "c", "d", "e"))
    drawn = Counter(sample.target_in(epoch, index=index, seed=0) for epoch in range(40) for index in range(50))
    assert all(330 < drawn[caption] < 470 for caption in sample.captions), "400 each, with a deviation of 18"
    rows = [[sample.target_in(epoch, index=index, seed=seed) for epoch in range(20)] for index, seed in
            ((0, 0), (1, 0), (0, 1))]  # fmt: skip
    assert rows[0] != rows[1] != rows[2] != rows[0]
    assert "".join(map(str, rows[0][:8])) == "baaddeee", "the same on every machine"


def test_training_draws_and_validation_does_not(data: Path, tokenizer: TextTokenizer) -> None:
    source, config = ManifestSource(data), preset("tiny")
    indices = source.indices("target")

    def shown(epoch: int, draw: bool) -> list[str]:
        loader = build_loader(source, indices, tokenizer, config, 7, shuffle=False, seed=4, epoch=epoch,
                              drop_last=False, draw_captions=draw)  # fmt: skip
        batches = list(loader)
        for batch in batches:
            assert torch.equal(batch.target_ids, tokenizer.encode(batch.targets, config.max_answer_tokens).ids)
        return [text for batch in batches for text in batch.targets]

    first = [source.sample(int(i)).target for i in indices]
    assert shown(0, False) == shown(3, False) == first
    for epoch in (0, 3):
        assert shown(epoch, True) == [source.sample(int(i)).target_in(epoch, index=int(i), seed=4) for i in indices]
    assert shown(0, True) != shown(3, True)


def test_the_tokenizer_learns_every_caption_and_the_answer_that_is_trained_on(data: Path) -> None:
    source = ManifestSource(data)
    texts = set(source_texts(source, range(len(source))))
    assert {caption for i in range(28) for caption in captions(i)} < texts
    assert {"just 0", "the 7", "Which?"} < texts
    assert "none" not in texts


@pytest.mark.parametrize("changed", ["captions", "answers"])
def test_a_changed_entry_is_another_content(tmp_path: Path, changed: str) -> None:
    records: list[dict[str, Any]] = [
        {"image": "a.png", "captions": ["x", "y"]},
        {"image": "b.png", "question": "q", "answers": ["x", "x", "y"]},
    ]
    before = content_of(ManifestSource(write(tmp_path / "a", *records)), [0, 1]).texts
    number = ("captions", "answers").index(changed)
    records[number][changed][-1] = "z"
    after = content_of(ManifestSource(write(tmp_path / "b", *records)), [0, 1]).texts
    assert [bool(one != other) for one, other in zip(before, after, strict=True)] == [number == 0, number == 1]


def test_without_lists_the_content_is_what_older_checkpoints_have(tmp_path: Path) -> None:
    write(tmp_path, {"image": "a.png", "question": "q", "answer": "x"})
    content = content_of(ManifestSource(tmp_path), [0])
    assert content.texts.tolist() == [stable_hash(json.dumps(["q", "x", None, None]))]


def _shard(path: Path, *members: object) -> ShardSource:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(path, "w") as archive:
        for i, member in enumerate(members):
            for name, content in ((f"{i}.png", picture.getvalue()), (f"{i}.json", json.dumps(member).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return ShardSource(path.parent)


def test_captions_in_the_json_of_a_shard(tmp_path: Path) -> None:
    source = _shard(
        tmp_path / "0.tar", {"captions": [" a", "b "]}, {"captions": ["c"], "caption": "not this"},
        {"caption": "d"}, {"caption": "e", "captions": {"en": "f"}}, {"captions": ["g", 3]}, {"captions": []},
        {"captions": ["h", " "]}, [],
    )  # fmt: skip
    assert source.sample(0).captions == ("a", "b")
    assert [source.sample(i).target for i in range(4)] == ["a", "c", "d", "e"]
    assert [source.sample(i).captions for i in range(1, 4)] == [(), (), ()]
    assert 0 in source.indices("captions")
    for i in (4, 5, 7):
        with pytest.raises(BadSampleError, match=f'0.tar: {i}.json: expected .* "caption", or a list of texts "cap'):
            source.sample(i)
    with pytest.raises(BadSampleError, match=r"0\.tar: 6\.json: the text is empty"):
        source.sample(6)


def test_phase_2_has_the_captions_that_phase_1_has(data: Path) -> None:
    source = ManifestSource(data)
    model = tiny_model(1, list(source_texts(source, range(28))))
    outputs = frozen_outputs(model, source, source.indices("target")[::-1], cache_dir=None, batch_size=8)
    limit = model.config.max_answer_tokens
    targets = EpochTargets(outputs, source, model.tokenizer, max_tokens=limit, seed=9)
    for epoch in (0, 1, 7):
        shown = targets.of(epoch)
        texts = [source.sample(i).target_in(epoch, index=i, seed=9) or "" for i in shown.index.tolist()]
        expected = model.tokenizer.encode(texts, limit)
        ids, mask = shown.targets(torch.arange(len(shown)))
        assert torch.equal(mask, expected.mask)
        assert torch.equal(ids[mask], expected.ids[mask])
    assert not torch.equal(targets.of(0).target_ids, targets.of(1).target_ids)


def test_only_a_first_caption_is_said_from_its_own_embedding(data: Path) -> None:
    """That of the others is not kept."""
    source = ManifestSource(data)
    model = tiny_model(1, list(source_texts(source, range(28))))
    outputs = frozen_outputs(model, source, source.indices("target"), cache_dir=None, batch_size=8)
    targets = EpochTargets(outputs, source, model.tokenizer, max_tokens=model.config.max_answer_tokens, seed=9)
    others = 0
    for epoch in range(3):
        samples = [(source.sample(i), i) for i in outputs.index.tolist()]
        is_first = [sample.target_in(epoch, index=i, seed=9) == sample.target for sample, i in samples]
        assert targets.said_from_target(epoch, 1.0).tolist() == is_first
        others += is_first.count(False)
    assert others > 0


def test_without_several_captions_phase_2_keeps_what_it_has(tmp_path: Path) -> None:
    write(tmp_path, *({"image": f"{i}.png", "captions": [f"only {i}"]} for i in range(3)))
    source, model = ManifestSource(tmp_path), tiny_model(1)
    outputs = frozen_outputs(model, source, range(3), cache_dir=None, batch_size=8)
    targets = EpochTargets(outputs, source, model.tokenizer, max_tokens=16, seed=0)
    assert targets.of(3) is outputs


def test_captions_longer_than_the_limit_are_cut_and_said(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, model = ManifestSource(data), tiny_model(1)
    outputs = frozen_outputs(model, source, source.indices("target"), cache_dir=None, batch_size=8)
    EpochTargets(outputs, source, model.tokenizer, max_tokens=9, seed=0)
    assert "captions longer than the token limit were cut" in caplog.text


@pytest.mark.parametrize("phase", [1, 2])
def test_stopped_and_resumed_gives_the_same_bits(
    data: Path, tmp_path: Path, phase: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second of three epochs."""
    shared = ["--tiny", "--cpu", "--workers", "0", "--data-dir", str(data), "--batch-size", "4",
              "--val-fraction", "0.2"]  # fmt: skip
    command = ["train-jepa", *shared, "--epochs", "3"]
    if phase == 2:
        first = tmp_path / "first"
        assert main(["train-jepa", *shared, "--max-steps", "1", "--output-dir", str(first)]) == 0
        command[0] = "train-decoder"
        command += ["--phase1-checkpoint", str(first / "phase1_last.pt"), "--cache-dir", str(tmp_path / "cache")]
    assert main([*command, "--output-dir", str(tmp_path / "whole")]) == 0

    objective = (Phase1Objective, Phase2Objective)[phase - 1]
    forward, seen = objective.forward, []

    def stopping(self: Any, batch: Any) -> Any:
        seen.append(1)
        if len(seen) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(objective, "forward", stopping)
        assert main([*command, "--output-dir", str(tmp_path / "parts")]) == 128 + signal.SIGTERM
    assert main([*command, "--output-dir", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (load_checkpoint(tmp_path / each / f"phase{phase}_last.pt").model for each in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_run_does_not_go_on_with_another_caption(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    shutil.copytree(data, tmp_path / "data")
    command = ["train-jepa", "--tiny", "--cpu", "--workers", "0", "--data-dir", str(tmp_path / "data"),
               "--batch-size", "4", "--val-fraction", "0.2", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    assert main([*command, "--max-steps", "1"]) == 0
    manifest = tmp_path / "data/manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("a view of 9 and", "a view of nine and"))
    assert main([*command, "--max-steps", "2", "--resume"]) == 2
    assert re.search(r"the data has changed since: texts of .*manifest.jsonl line 10", capfd.readouterr().err)
