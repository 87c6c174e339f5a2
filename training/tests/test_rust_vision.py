"""The Rust X-Encoder against this one, on every kind of file it reads.

`make test` builds the crate's example `vision_tokens`, in the folder `examples` beside the command that it names in
KORE_VLJEPA; without that these tests are skipped.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from mamba3_jepa.config import VisionConfig, VisionKind, preset
from mamba3_jepa.export.writer import write_component
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import DtypeName

FIXTURES = Path(__file__).parent / "fixtures"

pytestmark = pytest.mark.skipif("KORE_VLJEPA" not in os.environ, reason="the Rust half is not built: make test")


def run(model: Path, pixels: Path, tokens: Path) -> subprocess.CompletedProcess[str]:
    command = Path(os.environ["KORE_VLJEPA"]).parent / "examples" / "vision_tokens"
    return subprocess.run([command, model, pixels, tokens], capture_output=True, text=True)


def assert_equal(model: Path, pixels: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    """The tokens of Rust's encoder of `model` for each of `pixels`."""
    save_file({name: tensor.contiguous() for name, tensor in pixels.items()}, folder / "pixels.safetensors")
    result = run(model, folder / "pixels.safetensors", folder / "tokens.safetensors")
    assert result.returncode == 0, result.stderr
    found = load_file(folder / "tokens.safetensors")
    assert found.keys() == expected.keys()
    for name, tokens in found.items():
        difference = (tokens - expected[name]).norm() / expected[name].norm()
        assert difference < 5e-6, f"{name}: {difference:.1e}"


def save_transformers(encoder: VisionEncoder, folder: Path, dtype: torch.dtype, shard_size: str = "1GB") -> None:
    """As `transformers` writes it, V-JEPA 2's own predictor included."""
    config = encoder.config
    model = VJEPA2Model(
        VJEPA2Config(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            patch_size=config.patch_size,
            tubelet_size=config.tubelet_size,
            crop_size=config.image_size,
            frames_per_clip=config.frames,
            pred_num_hidden_layers=1,
        )
    )
    model.encoder.load_state_dict(encoder.encoder.state_dict())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)


def random_pixels(patch: int) -> dict[str, Tensor]:
    """An image of one patch, images that are not square, clips."""
    torch.manual_seed(1)
    shapes = {
        "one patch": (3, patch, patch),
        "wide": (3, 3 * patch, 5 * patch),
        "tall": (3, 20 * patch, patch),
        "many": (3, 18 * patch, 17 * patch),
        "clip": (6, 3, 2 * patch, 3 * patch),
        "clip of a tubelet": (2, 3, patch, 4 * patch),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def encoded(encoder: VisionEncoder, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: encoder(tensor[None])[0] for name, tensor in pixels.items()}


def reference_cases(name: str, cases: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pixels and tokens of a fixture, one by one."""
    reference = load_file(FIXTURES / name)
    pixels: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for case in cases:
        inputs = reference[f"{case}.input"]
        if case.endswith("video"):
            inputs = inputs.transpose(1, 2)  # the reference takes (B, 3, T, H, W)
        pixels |= {f"{case}.{i}": tensor for i, tensor in enumerate(inputs)}
        expected |= {f"{case}.{i}": tensor for i, tensor in enumerate(reference[f"{case}.output"])}
    return pixels, expected


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_the_reference_implementation(tmp_path: Path, shard_size: str) -> None:
    save_transformers(
        VisionEncoder.from_checkpoint(FIXTURES / "vjepa2_tiny.pt", 64), tmp_path / "model", torch.float32, shard_size
    )
    pixels, expected = reference_cases("vjepa2_tiny.safetensors", ("0.image", "1.video", "2.image"))
    assert_equal(tmp_path / "model", pixels, expected, tmp_path)


@pytest.mark.parametrize(("hidden_size", "heads"), [(60, 3), (96, 4), (21, 3), (80, 1), (16, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_transformers_folder(tmp_path: Path, hidden_size: int, heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = VisionConfig(hidden_size=hidden_size, heads=heads, depth=2, image_size=32, patch_size=8, mlp_ratio=3)
    encoder = VisionEncoder(config)
    for parameter in encoder.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
        parameter.copy_(parameter.to(dtype))
    save_transformers(encoder, tmp_path / "model", dtype)
    pixels = random_pixels(8)
    assert_equal(tmp_path / "model", pixels, encoded(encoder, pixels), tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["vjepa2", "vjepa2.1"])
def test_an_exported_file(tmp_path: Path, dtype: DtypeName, kind: VisionKind) -> None:
    model = tiny_model(phase=1, vision=dataclasses.replace(preset("tiny").vision, kind=kind))
    tensors = write_component(model, "x_encoder", tmp_path / "x_encoder.safetensors", phase=1, dtype=dtype)
    rounded = {key.removeprefix("x_encoder."): tensor.float() for key, tensor in tensors.items()}
    model.x_encoder.load_state_dict(rounded)
    pixels = random_pixels(model.config.vision.patch_size)
    assert_equal(tmp_path / "x_encoder.safetensors", pixels, encoded(model.x_encoder, pixels), tmp_path)


def test_the_reference_implementation_of_v_jepa_2_1(tmp_path: Path) -> None:
    encoder = VisionEncoder.from_checkpoint(FIXTURES / "vjepa21_tiny.pt", 64)
    config = preset("tiny").replace(vision=encoder.config, vocab_size=tiny_model().config.vocab_size)
    model = Mamba3Jepa(config, tiny_model().tokenizer, x_encoder=encoder)
    write_component(model, "x_encoder", tmp_path / "x_encoder.safetensors", phase=1)
    pixels, expected = reference_cases("vjepa21_tiny.safetensors", ("0.image", "1.image", "2.video"))
    assert_equal(tmp_path / "x_encoder.safetensors", pixels, expected, tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_transformers(
        VisionEncoder.from_checkpoint(FIXTURES / "vjepa2_tiny.pt"), tmp_path / "model", torch.float32, "100KB"
    )
    shard = max((tmp_path / "model").glob("model-*.safetensors"))
    shard.unlink()
    save_file(random_pixels(16), tmp_path / "pixels.safetensors")
    result = run(tmp_path / "model", tmp_path / "pixels.safetensors", tmp_path / "tokens.safetensors")
    assert result.returncode == 1
    assert shard.name in result.stderr
