"""The X-Encoder: the reference's values, and every kind of wrong input. Its files are in test_vit_files.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from mamba3_jepa.config import preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.vit import VisionEncoder

FIXTURES = Path(__file__).parent / "fixtures"
META_FILE = FIXTURES / "vjepa2_tiny.pt"


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(FIXTURES / "vjepa2_tiny.safetensors")


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return VisionEncoder.from_checkpoint(META_FILE, image_size=64)


@pytest.mark.parametrize("case", ["0.image", "1.video", "2.image"])
def test_matches_the_reference_implementation(encoder: VisionEncoder, reference: dict[str, Tensor], case: str) -> None:
    pixels = reference[f"{case}.input"]
    if case.endswith("video"):
        pixels = pixels.transpose(1, 2)  # the reference takes (B, 3, T, H, W)
    torch.testing.assert_close(encoder(pixels), reference[f"{case}.output"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("frames", "size"), [(2, 64), (4, 96), (6, 32)])
def test_equals_transformers_at_any_square_size(encoder: VisionEncoder, frames: int, size: int) -> None:
    """transformers takes its positions from crop_size, so each size gets a model of its own there."""
    config = VJEPA2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, crop_size=size, pred_num_hidden_layers=1
    )
    theirs = VJEPA2Model(config).eval()
    theirs.encoder.load_state_dict(encoder.encoder.state_dict())
    pixels = torch.randn(2, frames, 3, size, size)
    with torch.no_grad():
        expected = theirs(pixels, skip_predictor=True).last_hidden_state
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=0)


def test_an_image_is_a_clip_of_equal_frames(encoder: VisionEncoder) -> None:
    image = torch.randn(2, 3, 48, 80)
    tokens = encoder(image)
    assert tokens.shape == (2, 3 * 5, 64)
    torch.testing.assert_close(tokens, encoder(torch.stack([image, image], dim=1)), atol=1e-5, rtol=0)


def test_frozen(encoder: VisionEncoder) -> None:
    assert not encoder.train().training
    assert not any(module.training for module in encoder.train(True).modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not encoder(pixels).requires_grad


def test_has_no_predictor_and_uses_sdpa() -> None:
    config = preset("mini").vision
    encoder = VisionEncoder(config)
    D, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    block = 2 * 2 * D + 4 * (D * D + D) + (D * hidden + hidden) + (hidden * D + D)
    patches = D * 3 * config.tubelet_size * config.patch_size**2 + D
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count == config.depth * block + patches + 2 * D
    assert encoder.encoder.config._attn_implementation == "sdpa"


def test_respects_autocast(encoder: VisionEncoder) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    seen: list[torch.dtype] = []
    linear = encoder.encoder.layer[0].mlp.fc1
    hook = linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(pixels)
    hook.remove()
    exact = encoder(pixels)
    assert seen == [torch.bfloat16]
    assert (low.float() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), "expected pixels"),
        ((1, 1, 64, 64), r"found \(1, 1, 64, 64\)"),
        ((1, 3, 4, 64, 64), r"found \(1, 3, 4, 64, 64\)"),  # channels before frames
        ((1, 3, 60, 64), "multiples of the patch 16"),
        ((1, 3, 0, 64), "multiples of the patch 16"),
        ((1, 3, 3, 64, 64), "frames must be a multiple of 2"),
        ((1, 0, 3, 64, 64), "frames must be a multiple of 2"),
    ],
)
def test_input_of_the_wrong_shape(encoder: VisionEncoder, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder(torch.zeros(shape))


def test_raw_bytes_are_refused(encoder: VisionEncoder) -> None:
    with pytest.raises(UserError, match=r"uint8"):
        encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
