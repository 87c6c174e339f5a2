"""The assembled model: its formula, padding, gradients, `embed`, and the way out of a checkpoint."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import GATES, tiny_model
from torch import Tensor

from mamba3_jepa.config import AngnConfig, preset
from mamba3_jepa.data.images import normalize, to_pixels
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint, save_checkpoint
from mamba3_jepa.models import vljepa
from mamba3_jepa.models.pooling import l2_normalize, masked_mean
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vljepa import Mamba3Jepa

TEXTS = ["a red circle left of a blue square", "What colour is the circle?", "red"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: TextTokenizer) -> Mamba3Jepa:
    model = tiny_model(2, tokenizer, angn=GATES)
    assert model.predictor.pool_score is not None
    torch.nn.init.normal_(model.predictor.pool_score.weight)  # it starts at zero, where all weights are the same
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three images of different sizes and shapes."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i, (height, width) in enumerate([(32, 32), (40, 90), (70, 33)]):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        paths.append(folder / f"{i}.png")
    return paths


# --- the formula ---


def test_prediction_written_out_step_by_step(model: Mamba3Jepa, images: list[Path]) -> None:
    assert model.angn is not None
    predictor = model.predictor
    with torch.no_grad():
        pixels = normalize(to_pixels(Image.open(images[1]), 32)[None])
        ids = model.tokenizer.encode([TEXTS[1]], 32).ids
        h = torch.cat(
            [
                predictor.query_proj(model.y_encoder.embedding(ids)),
                predictor.vision_proj(model.x_encoder(pixels)),
            ],
            dim=1,
        )
        assert h.shape == (1, 16 + ids.shape[1], 64)
        for gate, norm, layer in zip(
            model.angn.gates, predictor.backbone.norms, predictor.backbone.layers, strict=True
        ):
            h = h / (1 + torch.exp(-(gate.weight * h + gate.bias)))
            normed = h / torch.sqrt((h * h).mean(dim=-1, keepdim=True) + 1e-5) * norm.weight
            h = h + layer(normed)
        h = h / torch.sqrt((h * h).mean(dim=-1, keepdim=True) + 1e-5) * predictor.backbone.final_norm.weight
        weight = torch.exp(h[0] @ predictor.pool_score.weight[0])
        embedding = predictor.pred_head((h[0] * weight[:, None]).sum(dim=0) / weight.sum())
        expected = embedding / embedding.square().sum().sqrt()
    actual = model.embed([images[1]], [TEXTS[1]])
    torch.testing.assert_close(actual[0], expected, atol=1e-5, rtol=0)


def test_pooling() -> None:
    h = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 5.0], [7.0, 7.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(h, mask).tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_normalisation_is_safe_at_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-20, 0.0]], requires_grad=True)
    y = l2_normalize(x)
    torch.testing.assert_close(y[:2], torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_initial_values(tokenizer: TextTokenizer) -> None:
    model = Mamba3Jepa(preset("mini").replace(vocab_size=tokenizer.vocab_size), tokenizer, with_decoder=True)
    assert model.y_decoder is not None
    for embedding, std in ((model.y_encoder.embedding, 1.0), (model.y_decoder.embedding, 0.02)):
        assert embedding.weight.std().item() == pytest.approx(std, rel=0.05)
    layers = model.config.predictor.n_layers
    for layer in model.predictor.backbone.layers:
        bound = 1 / math.sqrt(layer.out_proj.in_features * layers)  # uniform, then scaled by 1/sqrt(layers)
        largest = layer.out_proj.weight.abs().max().item()
        assert 0.95 * bound < largest <= bound


# --- one sample and many ---


def test_a_sample_alone_is_the_sample_in_any_batch(model: Mamba3Jepa, images: list[Path]) -> None:
    pictures = [images[0], None, images[1], None, images[2], images[0]]
    questions = [TEXTS[1], TEXTS[0], None, "red", "?", "a red circle left of a blue square, is it not?"]
    together = model.embed(pictures, questions)
    assert together.shape == (6, 32)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(6))
    alone = torch.cat([model.embed([image], [text]) for image, text in zip(pictures, questions, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.embed(pictures, questions, batch_size=4), alone, atol=1e-5, rtol=0)
    distances = torch.cdist(together, together) + 10 * torch.eye(6)
    assert distances.min() > 1e-3  # the inputs do make a difference


def test_text_embeddings_do_not_depend_on_the_batch(model: Mamba3Jepa) -> None:
    together = model.embed_text(TEXTS)
    alone = torch.cat([model.embed_text([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.embed_text(TEXTS, batch_size=2), alone, atol=1e-5, rtol=0)


def test_what_stands_in_padding_does_not_matter(model: Mamba3Jepa) -> None:
    tokens = torch.randn(2, 16, 64)
    has_image = torch.tensor([True, False])
    ids, mask, _ = model.tokenizer.encode([TEXTS[0], "red"], 32)
    other_ids = torch.where(mask, ids, 7)
    other_tokens = tokens.clone()
    other_tokens[1] = 1e3
    with torch.no_grad():
        first = model.predict(tokens, has_image, ids, mask)
        second = model.predict(other_tokens, has_image, other_ids, mask)
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
        torch.testing.assert_close(model.y_encoder(ids, mask), model.y_encoder(other_ids, mask))
    assert first.pooled.shape == (2, 64)


def test_gate_activity_ignores_padding(model: Mamba3Jepa, images: list[Path]) -> None:
    assert model.angn is not None
    model.embed([images[0], None], [TEXTS[0], "red"])
    together = model.angn.activity()
    lengths = [
        16 + len(model.tokenizer.encode([TEXTS[0]], 32).ids[0]),
        len(model.tokenizer.encode(["red"], 32).ids[0]),
    ]
    alone = []
    for image, text in [(images[0], TEXTS[0]), (None, "red")]:
        model.embed([image], [text])
        alone.append(model.angn.activity())
    expected = (lengths[0] * alone[0] + lengths[1] * alone[1]) / sum(lengths)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=0)


def test_images_are_encoded_once_and_put_in_their_rows(model: Mamba3Jepa) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    seen = []
    hook = model.x_encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    tokens = model.encode_images(pixels, torch.tensor([False, True, False, True]))
    hook.remove()
    assert seen == [(2, 3, 32, 32)]
    assert tokens.shape == (4, 16, 64)
    assert tokens[[0, 2]].abs().max() == 0
    torch.testing.assert_close(tokens[[1, 3]], model.x_encoder(pixels))
    assert model.encode_images(pixels[:0], torch.zeros(3, dtype=torch.bool)).shape == (3, 0, 64)
    with pytest.raises(ValueError, match="2 images for 1 samples"):
        model.encode_images(pixels, torch.tensor([False, True, False]))


def test_clips(model: Mamba3Jepa) -> None:
    clip = torch.randn(2, 4, 3, 32, 48)
    has_image = torch.tensor([True, True])
    tokens = model.encode_images(clip, has_image)
    assert tokens.shape == (2, 2 * 4 * 6, 64)
    ids, mask, _ = model.tokenizer.encode(["red", "blue"], 32)
    assert model.predict(tokens, has_image, ids, mask).embedding.shape == (2, 32)


# --- training ---


@pytest.mark.parametrize("rows", [[True, True], [False, False], [False, True]])
@pytest.mark.parametrize("angn", [True, False])
def test_every_parameter_has_a_gradient_in_every_batch(tokenizer: TextTokenizer, rows: list[bool], angn: bool) -> None:
    model = tiny_model(1, tokenizer, moved=False, angn=AngnConfig(enabled=angn)).train()
    has_image = torch.tensor(rows)
    frozen = {name: tensor.clone() for name, tensor in model.x_encoder.state_dict().items()}
    query, target = tokenizer.encode(["red", TEXTS[1]], 32), tokenizer.encode(["blue", "red"], 32)
    tokens = model.encode_images(torch.randn(sum(rows), 3, 32, 32), has_image)
    predicted = model.predict(tokens, has_image, query.ids, query.mask).embedding
    F.cross_entropy(predicted @ model.y_encoder(target.ids, target.mask).T / 0.07, torch.arange(2)).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("x_encoder."):
            assert not parameter.requires_grad
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        unused = name.startswith("predictor.vision_proj.") and not any(rows)
        assert (parameter.grad.abs().sum() == 0).item() == unused, name
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.x_encoder.state_dict().items())


def test_autocast_keeps_the_residual_stream_in_float32(model: Mamba3Jepa) -> None:
    ids, mask, _ = model.tokenizer.encode(TEXTS, 32)
    has_image = torch.ones(3, dtype=torch.bool)
    pixels = torch.randn(3, 3, 32, 32)

    def predict() -> Tensor:
        return model.predict(model.encode_images(pixels, has_image), has_image, ids, mask).embedding

    seen = []
    hook = model.predictor.backbone.final_norm.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].dtype)
    )
    with torch.no_grad():
        exact = predict()
        with torch.autocast("cpu", torch.bfloat16):
            low = predict()
    hook.remove()
    assert seen == [torch.float32, torch.float32]
    torch.testing.assert_close(low.norm(dim=1), torch.ones(3))
    assert (low - exact).norm() / exact.norm() < 5e-2


# --- embed ---


def test_embed_takes_paths_and_images(model: Mamba3Jepa, images: list[Path]) -> None:
    kinds: list[Any] = [images[1], str(images[1]), Image.open(images[1])]
    embeddings = model.embed(kinds, [None, "Describe the image.", model.config.query_prompt])
    torch.testing.assert_close(embeddings[1:], embeddings[:1].expand(2, -1), atol=1e-5, rtol=0)
    assert embeddings.dtype == torch.float32
    grey = Image.open(images[1]).convert("L")
    assert model.embed([grey], [None]).isfinite().all()


def test_a_picture_asked_several_questions_is_decoded_and_encoded_once(
    model: Mamba3Jepa, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in each batch, told by its file or by the object it is."""
    opened = Image.open(images[2])
    asked: list[Any] = [images[0], None, str(images[0]), opened, images[1], opened, images[0]]
    questions = ["red", "red", "blue", "red", "red", "blue", None]
    alone = torch.cat([model.embed([image], [question]) for image, question in zip(asked, questions, strict=True)])
    decoded: list[Any] = []
    decode = vljepa.to_pixels
    monkeypatch.setattr(vljepa, "to_pixels", lambda image, size: (decoded.append(image), decode(image, size))[1])
    encoded: list[int] = []
    with model.x_encoder.register_forward_hook(lambda _, inputs, output: encoded.append(len(inputs[0]))):
        for batch_size, sizes in ((7, [3]), (4, [2, 3])):
            together = model.observe(asked, questions, batch_size).embedding
            assert encoded == sizes
            assert len(decoded) == sum(sizes)
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
            encoded.clear()
            decoded.clear()


def test_embed_leaves_the_model_as_it_was(model: Mamba3Jepa) -> None:
    assert model.y_decoder is not None
    model.y_decoder.train()  # as in phase 2: one part trains, the rest is frozen
    before = [module.training for module in model.modules()]
    embedding = model.embed_text(["red"])
    assert [module.training for module in model.modules()] == before
    model.y_decoder.eval()
    weight = torch.randn(32, requires_grad=True)
    (embedding @ weight).sum().backward()  # the result is an ordinary tensor: a probe can be trained on it
    assert weight.grad is not None
    assert not embedding.requires_grad


def test_embed_refuses_what_it_cannot_embed(model: Mamba3Jepa, images: list[Path], tmp_path: Path) -> None:
    wrong: list[tuple[list[Any], list[Any], str]] = [
        ([], [], "at least one"),
        ([None], ["a", "b"], "1 images but 2 questions"),
        ([None, None], ["a", "  "], "question 1 is empty"),
        ([None], [3], "question 0 is empty or not a text"),
        ([tmp_path / "absent.png"], ["a"], "absent.png"),
        ([17], ["a"], "found int"),
    ]
    for pictures, questions, message in wrong:
        with pytest.raises(UserError, match=message):
            model.embed(pictures, questions)
    with pytest.raises(UserError, match="batch_size"):
        model.embed([None], ["a"], batch_size=0)
    with pytest.raises(UserError, match="at least one"):
        model.embed_text([])
    with pytest.raises(UserError, match="text 1 is empty"):
        model.embed_text(["a", ""])
    with pytest.raises(UserError, match="list of texts"):
        model.embed_text("red")


def test_truncation_is_said_once(model: Mamba3Jepa, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mamba3_jepa.models.vljepa"):
        model.embed_text(["short", "long " * 100, "longer " * 100], batch_size=1)
    assert [record.message for record in caplog.records] == ["2 of 3 texts are longer than 32 tokens and were cut"]


# --- construction and checkpoints ---


def test_parts_that_do_not_fit(model: Mamba3Jepa, tokenizer: TextTokenizer) -> None:
    config = model.config
    with pytest.raises(UserError, match=r"configuration says 301"):
        Mamba3Jepa(config.replace(vocab_size=301), tokenizer)
    with pytest.raises(UserError, match="the X-Encoder is VisionConfig"):
        Mamba3Jepa(config, tokenizer, x_encoder=VisionEncoder(preset("mini").vision))


@pytest.mark.parametrize("with_decoder", [False, True])
def test_from_checkpoint(tokenizer: TextTokenizer, images: list[Path], tmp_path: Path, with_decoder: bool) -> None:
    model = tiny_model(2 if with_decoder else 1, tokenizer, angn=AngnConfig(enabled=with_decoder))
    path = tmp_path / "model.pt"
    checkpoint = Checkpoint(phase=1, config=model.config, model=model.state_dict(), tokenizer=tokenizer.to_json())
    save_checkpoint(path, checkpoint)
    loaded = Mamba3Jepa.from_checkpoint(path)
    assert not loaded.training
    assert (loaded.y_decoder is not None) == with_decoder
    assert torch.equal(loaded.embed([images[0]], [TEXTS[1]]), model.embed([images[0]], [TEXTS[1]]))
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())

    del checkpoint.model["predictor.pred_head.bias"]
    checkpoint.model["predictor.extra"] = torch.zeros(1)
    checkpoint.model["y_encoder.projection.bias"] = torch.zeros(3)
    save_checkpoint(path, checkpoint)
    with pytest.raises(UserError) as caught:
        Mamba3Jepa.from_checkpoint(path)
    for part in (
        str(path),
        "missing: predictor.pred_head.bias",
        "not expected: predictor.extra",
        r"found (3,)",
    ):
        assert part in str(caught.value)
