"""V-JEPA 2.1: the reference's values, its two branches, and a model that has it from training to export."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from meta_checkpoint import to_meta_state_dict
from numpy_reader import visual_tokens
from safetensors.torch import load_file
from torch import Tensor

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import ModelConfig, VisionConfig, preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.export.reader import load_exported
from mamba3_jepa.models.vision_parts import rotary_table
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vljepa import Mamba3Jepa

FIXTURES = Path(__file__).parent / "fixtures"
META_FILE = FIXTURES / "vjepa21_tiny.pt"


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return VisionEncoder.from_checkpoint(META_FILE, image_size=64)


def moved(**sizes: Any) -> VisionEncoder:
    """A small one of which no weight is as it starts: modality vectors are zero there."""
    torch.manual_seed(0)
    encoder = VisionEncoder(VisionConfig(kind="vjepa2.1", depth=2, **sizes))
    for parameter in encoder.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


@pytest.mark.parametrize("case", ["0.image", "1.image", "2.video"])
def test_matches_the_reference_implementation(encoder: VisionEncoder, case: str) -> None:
    reference = load_file(FIXTURES / "vjepa21_tiny.safetensors")
    pixels = reference[f"{case}.input"]
    if case.endswith("video"):
        pixels = pixels.transpose(1, 2)  # the reference takes (B, 3, T, H, W)
    torch.testing.assert_close(encoder(pixels), reference[f"{case}.output"], atol=1e-5, rtol=0)


def test_the_other_encoder_of_the_file_is_not_read(encoder: VisionEncoder, tmp_path: Path) -> None:
    values = torch.load(META_FILE, weights_only=True)
    del values["ema_encoder"]
    torch.save(values, tmp_path / "decoy.pt")
    decoy = VisionEncoder.from_checkpoint(tmp_path / "decoy.pt", image_size=64)
    pixels = torch.randn(1, 3, 32, 32)
    assert (decoy(pixels) - encoder(pixels)).abs().max() > 0.1


def test_sizes_come_from_the_shapes(encoder: VisionEncoder) -> None:
    assert encoder.config == VisionConfig(
        kind="vjepa2.1", hidden_size=64, depth=12, heads=1, image_size=64, pretrained=True
    )


@pytest.mark.parametrize(
    ("hidden_size", "heads", "patch_size", "shape"),
    [
        (64, 1, 8, (1, 3, 8, 8)),  # one patch
        (60, 3, 4, (2, 3, 12, 20)),
        (21, 3, 4, (1, 3, 4, 28)),  # a single row, heads of odd size
        (16, 4, 4, (1, 3, 20, 4)),  # a single column, heads too small to be turned
        (60, 3, 300, (1, 3, 600, 300)),  # patches larger than the picture of 256 pixels
        (21, 1, 14, (1, 6, 3, 28, 42)),
        (60, 3, 4, (1, 1, 3, 12, 20)),  # a clip of one frame
    ],
)
def test_equals_a_plain_float64_form(hidden_size: int, heads: int, patch_size: int, shape: tuple[int, ...]) -> None:
    encoder = moved(hidden_size=hidden_size, heads=heads, patch_size=patch_size, image_size=patch_size).double()
    weights = {f"x_encoder.{name}": tensor.numpy() for name, tensor in encoder.state_dict().items()}
    pixels = torch.randn(shape, dtype=torch.float64)
    expected = [visual_tokens(weights, dataclasses.asdict(encoder.config), 1e-6, one.numpy()) for one in pixels]
    np.testing.assert_allclose(encoder(pixels).numpy(), np.stack(expected), atol=5e-6, rtol=0)  # angles are float32


def test_the_two_of_a_pair_turn_alike_and_places_are_stretched() -> None:
    grid, head_size = (2, 3, 5), 22
    cos, sin, partner = rotary_table(grid, head_size, torch.device("cpu"), pretrained_grid=16)
    assert cos.shape == sin.shape == (30, 22)
    assert partner.tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14, 17, 16, 18, 19, 20, 21]
    assert bool((cos[:, 18:] == 1).all())
    assert bool((sin[:, 18:] == 0).all())
    for token, (time, row, column) in enumerate(np.ndindex(grid)):
        for j in range(18):
            place = (time, row * 15 / 2, column * 15 / 4)[j // 6]
            angle = place * 10_000 ** (-(j % 6 // 2) / 3)
            assert math.isclose(cos[token, j], math.cos(angle), abs_tol=1e-6)
            assert math.isclose(sin[token, j], math.sin(angle) * (-1 if j % 2 == 0 else 1), abs_tol=1e-6)


def test_an_image_costs_one_frame_of_the_image_branch(encoder: VisionEncoder) -> None:
    calls: list[tuple[str, torch.Size]] = []
    embeddings = encoder.encoder.embeddings
    hooks = [
        part.register_forward_hook(lambda module, inputs, output, name=name: calls.append((name, output.shape)))
        for name, part in (
            ("image", embeddings.patch_embeddings_img), ("clip", embeddings.patch_embeddings),
            ("layer", encoder.encoder.layer[0].mlp),
        )
    ]  # fmt: skip
    encoder(torch.randn(2, 3, 48, 80))
    for hook in hooks:
        hook.remove()
    assert calls == [("image", (2, 15, 64)), ("layer", (2, 15, 64))]


def test_an_image_is_a_clip_of_one_frame_and_not_of_two(encoder: VisionEncoder) -> None:
    image = torch.randn(2, 3, 48, 80)
    assert torch.equal(encoder(image), encoder(image[:, None]))
    assert (encoder(image) - encoder(torch.stack([image, image], dim=1))).abs().max() > 0.1


@pytest.mark.parametrize("frames", [0, 3])
def test_clips_of_half_a_tubelet(encoder: VisionEncoder, frames: int) -> None:
    with pytest.raises(UserError, match="frames must be a multiple of 2"):
        encoder(torch.zeros(1, frames, 3, 32, 32))


def test_inner_norms_are_not_read(tmp_path: Path, encoder: VisionEncoder) -> None:
    torch.save({"target_encoder": to_meta_state_dict(encoder)}, tmp_path / "file.pt")  # NaN in the inner ones
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(VisionEncoder.from_checkpoint(tmp_path / "file.pt")(pixels), encoder(pixels))


@pytest.mark.parametrize(
    "gone", ["patch_embed_img.proj.bias", "img_mod_embed", "blocks.3.attn.proj.weight", "norms_block.3.weight"]
)
def test_what_is_missing_is_named(tmp_path: Path, encoder: VisionEncoder, gone: str) -> None:
    weights = to_meta_state_dict(encoder)
    del weights[f"module.backbone.{gone}"]
    torch.save({"ema_encoder": weights}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=f"missing: {gone}"):
        VisionEncoder.from_checkpoint(tmp_path / "file.pt")


def test_a_norm_of_v_jepa_2_has_no_place(tmp_path: Path, encoder: VisionEncoder) -> None:
    weights = to_meta_state_dict(encoder) | {"norm.weight": torch.ones(64)}
    torch.save({"ema_encoder": weights}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=r"found norm\.weight"):
        VisionEncoder.from_checkpoint(tmp_path / "file.pt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_precision(encoder: VisionEncoder, dtype: torch.dtype) -> None:
    pixels = torch.randn(2, 3, 48, 80)
    exact = encoder(pixels)
    with torch.autocast("cpu", dtype):
        mixed = encoder(pixels)
    half = VisionEncoder.from_checkpoint(META_FILE).to(dtype)(pixels.to(dtype))
    assert half.dtype == dtype
    for tokens in (mixed, half):
        assert (tokens.float() - exact).norm() / exact.norm() < 3e-2


def test_a_configuration_from_before_there_was_a_choice() -> None:
    values = preset("tiny").to_dict()
    assert values["vision"].pop("kind") == "vjepa2"
    assert ModelConfig.from_dict(values) == preset("tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training run that started from the file."""
    folder = tmp_path_factory.mktemp("run")
    short = ["--tiny", "--cpu", "--synthetic-scenes", "8", "--val-samples", "12", "--batch-size", "8", "--epochs", "1"]
    vision = ["--vit-checkpoint", str(META_FILE), "--image-size", "32"]
    assert main(["train-jepa", *short, *vision, "--output-dir", str(folder)]) == 0
    return folder


def same_vision(model: Mamba3Jepa, encoder: VisionEncoder) -> None:
    expected = dataclasses.replace(encoder.config, image_size=32)
    assert model.config.vision == model.x_encoder.config == expected
    state: dict[str, Tensor] = model.x_encoder.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_checkpoint_keeps_the_encoder(run: Path, encoder: VisionEncoder) -> None:
    same_vision(Mamba3Jepa.from_checkpoint(run / "phase1_best.pt"), encoder)


def test_an_export_keeps_the_encoder(run: Path, tmp_path: Path, encoder: VisionEncoder) -> None:
    checkpoint = ["--checkpoint", str(run / "phase1_best.pt"), "--phase", "1"]
    assert main(["export", *checkpoint, "--output", str(tmp_path), "--x-encoder", "--verify", "--golden"]) == 0
    same_vision(load_exported(tmp_path), encoder)
    golden = load_file(tmp_path / "golden" / "x_encoder.safetensors")
    assert golden["visual_tokens"].shape == (1, 4, 64)
    assert golden["clip_visual_tokens"].shape == (1, 30, 64)


def test_an_export_takes_the_file_for_its_encoder(run: Path, tmp_path: Path, encoder: VisionEncoder) -> None:
    assert main(["export", "--checkpoint", str(run / "phase1_best.pt"), "--output", str(tmp_path), "--phase", "1"]) == 0
    same_vision(load_exported(tmp_path, VisionEncoder.from_checkpoint(META_FILE, image_size=32)), encoder)
