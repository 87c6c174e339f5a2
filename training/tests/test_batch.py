"""What a batch holds: pictures, questions and targets of its samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from mamba3_jepa.config import ModelConfig, preset
from mamba3_jepa.data import batch as data_batch
from mamba3_jepa.data.batch import Batch, target_hash, target_keys
from mamba3_jepa.data.files import ManifestSource
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.sample import Source
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.evaluation.validate import collect, evaluate

CONFIG = preset("tiny")


def batch_of(
    source: Source, tokenizer: TextTokenizer, indices: Sequence[int], config: ModelConfig = CONFIG, image_shift: int = 0
) -> Batch:
    """The one batch of these samples, in this order."""
    (batch,) = build_loader(
        source, indices, tokenizer, config, len(indices),
        shuffle=False, seed=3, drop_last=False, image_shift=image_shift,
    )  # fmt: skip
    return batch


def asked(batch: Batch) -> list[str]:
    """What is encoded: the query prompt where a sample has no question."""
    return [CONFIG.query_prompt if question is None else question for question in batch.questions]


def test_a_batch_holds_its_samples(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    batch = batch_of(scenes, tokenizer, [0, 1, 8])
    assert len(batch) == 3
    assert batch.index.tolist() == [0, 1, 8]
    samples = [scenes.sample(i) for i in (0, 1, 8)]
    assert batch.questions == [None, samples[1].question, samples[2].question]
    assert batch.targets == [s.target for s in samples]
    assert batch.pixels.dtype == torch.uint8
    assert batch.picture.tolist() == [0, 0, 1], "samples 0 and 1 ask of one scene"
    for pixels, sample in zip(batch.pixels[batch.picture], samples, strict=True):
        assert sample.image is not None
        assert np.array_equal(pixels.numpy(), np.asarray(sample.image()).transpose(2, 0, 1))
    assert batch.has_image.tolist() == [True] * 3
    queries = tokenizer.encode(asked(batch), CONFIG.max_query_tokens)
    targets = tokenizer.encode(batch.targets, CONFIG.max_answer_tokens)
    assert torch.equal(batch.query_ids, queries.ids)
    assert torch.equal(batch.query_mask, queries.mask)
    assert torch.equal(batch.target_ids, targets.ids)
    assert torch.equal(batch.target_mask, targets.mask)
    assert batch.target_hash.tolist() == [target_hash(s.target or "") for s in samples]
    assert batch.bad == []
    for name, value in vars(batch.to("cpu")).items():
        expected = getattr(batch, name)
        assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected, name


def manifest(folder: Path, *lines: dict[str, object]) -> ManifestSource:
    """A data directory with the two pictures a.png and b.png."""
    noise = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ManifestSource(folder)


@pytest.fixture
def asked_often(tmp_path: Path) -> ManifestSource:
    """Two pictures, asked three times and once, and a question of none in between."""
    return manifest(
        tmp_path,
        {"image": "a.png", "question": "What is it?", "answer": "red"},
        {"image": None, "query": "Is it?", "answer": "yes"},
        {"image": "b.png", "text": "a picture"},
        {"image": "a.png", "text": "another picture"},
        {"image": "a.png", "question": "Is it red?", "answer": "no"},
    )


def test_a_picture_asked_several_questions_is_decoded_once(
    asked_often: ManifestSource, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Image.Image] = []
    decode = data_batch.to_pixels
    monkeypatch.setattr(data_batch, "to_pixels", lambda image, size: (decoded.append(image), decode(image, size))[1])
    batch = batch_of(asked_often, tokenizer, range(5))
    assert len(decoded) == len(batch.pixels) == 2
    assert batch.has_image.tolist() == [True, False, True, True, True]
    assert batch.picture.tolist() == [0, 1, 0, 0]
    for pixels, i in zip(batch.pixels[batch.picture], (0, 2, 3, 4), strict=True):
        assert torch.equal(pixels, batch_of(asked_often, tokenizer, [i]).pixels[0])


def test_a_picture_asked_several_questions_is_encoded_once(
    asked_often: ManifestSource, tokenizer: TextTokenizer
) -> None:
    model = tiny_model(1, tokenizer)
    batch = batch_of(asked_often, tokenizer, range(5))
    seen: list[int] = []
    with torch.no_grad(), model.x_encoder.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0]))):
        together = model(*batch.inputs()).embedding
        assert seen == [2]
        for i, row in enumerate(together):
            alone = batch_of(asked_often, tokenizer, [i])
            torch.testing.assert_close(model(*alone.inputs()).embedding[0], row, atol=1e-5, rtol=0)


def test_shifted_images_are_each_samples_own(asked_often: ManifestSource, tokenizer: TextTokenizer) -> None:
    """Also where one picture is asked several questions, and as the sample would be shifted alone."""
    batch = batch_of(asked_often, tokenizer, range(5), image_shift=8)
    assert batch.picture.tolist() == [0, 1, 2, 3]
    assert len(batch.pixels) == 4
    first, _, again, last = batch.pixels
    assert not torch.equal(first, again)
    assert not torch.equal(first, last)
    for pixels, i in zip(batch.pixels, (0, 2, 3, 4), strict=True):
        assert torch.equal(pixels, batch_of(asked_often, tokenizer, [i], image_shift=8).pixels[0])


def test_a_question_like_the_query_prompt_is_a_question(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    source = manifest(
        tmp_path,
        {"image": "a.png", "question": CONFIG.query_prompt, "answer": "red"},
        {"image": "a.png", "text": "a red circle"},
        {"image": "b.png", "text": "a blue square"},
    )
    batch = batch_of(source, tokenizer, range(3))
    assert batch.questions == [CONFIG.query_prompt, None, None]
    assert torch.equal(batch.query_ids[0], batch.query_ids[1]), "the model is asked the same"
    metrics = evaluate(collect(tiny_model(1, tokenizer), [batch], "cpu")).metrics()
    assert metrics["val/samples"] == 3
    assert metrics["val/questions"] == 1
    assert metrics["val/gallery_texts"] == metrics["val/gallery_images"] == 2, "the captions alone"


def test_the_query_never_contains_the_target(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    batch = batch_of(scenes, tokenizer, range(len(scenes)))
    for question, target in zip(asked(batch), batch.targets, strict=True):
        assert target not in ("", question)
        assert len(target.split()) < 3 or target not in question


def test_texts_that_are_cut_to_the_same_tokens_are_the_same_text(tokenizer: TextTokenizer) -> None:
    start = "a small red circle above a blue square, " * 4
    texts = [start + "and a star", start + "and a moon", start.strip(), "red"]
    cut = tokenizer.encode(texts, 12)
    assert cut.n_truncated == 3
    same = target_keys(tokenizer, cut)
    assert same[0] == same[1] == same[2] != same[3] == target_hash("red")
    whole = target_keys(tokenizer, tokenizer.encode(texts, 1000))
    assert whole == [target_hash(text) for text in texts], "a key of a whole text is that of its letters"


def test_target_hash_is_stable_and_non_negative() -> None:
    assert target_hash("blue") == target_hash("blue") != target_hash("Blue")
    assert all(0 <= target_hash(str(i)) < 2**63 for i in range(1000))
    assert target_hash("blue") == 5277910663773635565, "`printf blue | b2sum -l 64`, halved"


def test_long_texts_are_truncated_and_counted(scenes: SceneSource, tokenizer: TextTokenizer) -> None:
    config = CONFIG.replace(max_query_tokens=4, max_answer_tokens=5)
    batch = batch_of(scenes, tokenizer, range(39), config)
    expected = sum(
        int(tokenizer.encode([text], 1000).ids.shape[1] > limit)
        for texts, limit in ((asked(batch), 4), (batch.targets, 5))
        for text in texts
    )
    assert batch.n_truncated == expected > 0
    assert batch.query_ids.shape[1] == 4
    assert batch.target_ids.shape[1] == 5
