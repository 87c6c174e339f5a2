"""The X-Encoder: the reference's values, every file format, every kind of wrong file and input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from meta_checkpoint import save_meta_checkpoint, to_meta_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from mamba3_jepa.config import VisionConfig, preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vit_checkpoint import read_vision_checkpoint

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


def test_reads_sizes_from_the_shapes(encoder: VisionEncoder) -> None:
    assert encoder.config == VisionConfig(
        pretrained=True, hidden_size=64, depth=2, heads=1, image_size=64, patch_size=16, tubelet_size=2
    )
    assert VisionEncoder.from_checkpoint(META_FILE).config.image_size == 256


def test_falls_back_to_encoder_when_there_is_no_target_encoder(tmp_path: Path) -> None:
    values = torch.load(META_FILE, weights_only=True)
    target = VisionEncoder.from_checkpoint(META_FILE)
    del values["target_encoder"]
    torch.save(values, tmp_path / "online.pt")
    online = VisionEncoder.from_checkpoint(tmp_path / "online.pt")
    expected = values["encoder"]["module.backbone.norm.weight"]
    torch.testing.assert_close(online.encoder.layernorm.weight.data, expected, atol=0, rtol=0)
    assert not torch.equal(online.encoder.layer[0].mlp.fc1.weight, target.encoder.layer[0].mlp.fc1.weight)


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
    torch.testing.assert_close(tokens, encoder(torch.stack([image, image], dim=1)), atol=0, rtol=0)


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


def test_mlp_ratio_that_is_not_a_round_number(tmp_path: Path) -> None:
    config = VisionConfig(hidden_size=64, depth=1, heads=1, mlp_ratio=6144 / 1408, image_size=32)
    save_meta_checkpoint(VisionEncoder(config), tmp_path / "g.pt")
    assert VisionEncoder.from_checkpoint(tmp_path / "g.pt").encoder.layer[0].mlp.fc1.out_features == 279


def save_transformers_folder(encoder: VisionEncoder, folder: Path) -> None:
    """As `VJEPA2Model.save_pretrained` writes it, V-JEPA 2's own predictor included."""
    config = VJEPA2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, crop_size=64, pred_num_hidden_layers=1
    )
    model = VJEPA2Model(config)
    model.encoder.load_state_dict(encoder.encoder.state_dict())
    model.save_pretrained(folder)


def save_safetensors(encoder: VisionEncoder, path: Path) -> None:
    save_file(encoder.state_dict(), path, metadata={"config": json.dumps({"image_size": 64, "heads": 1})})


def save_meta_safetensors(encoder: VisionEncoder, path: Path) -> None:
    save_file(to_meta_state_dict(encoder), path, metadata={"config": '{"image_size": 64, "patch": 16}'})


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_transformers_folder, "folder"),
        (save_safetensors, "a.safetensors"),
        (save_meta_safetensors, "b.safetensors"),
        (save_meta_checkpoint, "c.pth"),
    ],
)
def test_every_format_holds_the_same_encoder(
    encoder: VisionEncoder, tmp_path: Path, save: Callable[[VisionEncoder, Path], None], name: str
) -> None:
    save(encoder, tmp_path / name)
    loaded = VisionEncoder.from_checkpoint(tmp_path / name)
    assert loaded.config.image_size == (256 if name == "c.pth" else 64)
    assert VisionEncoder.from_checkpoint(tmp_path / name, image_size=32).config.image_size == 32
    for key, tensor in encoder.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], tensor, atol=0, rtol=0)


def test_writes_the_names_meta_uses(encoder: VisionEncoder) -> None:
    theirs = torch.load(META_FILE, weights_only=True)["target_encoder"]
    ours = to_meta_state_dict(encoder)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("hidden_size", "depth", "heads"), [(1024, 24, 16), (1280, 32, 16), (1408, 40, 22), (192, 2, 3)]
)
def test_heads_follow_from_the_size(tmp_path: Path, hidden_size: int, depth: int, heads: int) -> None:
    """Only the names and the two leading shapes decide; the rest of such a large file is left empty."""
    weights = {f"module.backbone.blocks.{i}.norm1.weight": torch.zeros(1) for i in range(depth)}
    weights["module.backbone.patch_embed.proj.weight"] = torch.zeros(hidden_size, 3, 2, 1, 1)
    weights["module.backbone.blocks.0.mlp.fc1.weight"] = torch.zeros(hidden_size * 4, 1)
    torch.save({"target_encoder": weights}, tmp_path / "sizes.pt")
    config, _ = read_vision_checkpoint(tmp_path / "sizes.pt")
    assert (config.hidden_size, config.depth, config.heads) == (hidden_size, depth, heads)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must not run",))


def change(**changes: Tensor | None) -> dict[str, dict[str, Tensor]]:
    """Meta's fixture with some tensors replaced, added or (None) left out."""
    weights = dict(torch.load(META_FILE, weights_only=True)["target_encoder"])
    for name, tensor in changes.items():
        key = "module.backbone." + name.replace("__", ".")
        weights.pop(key, None)
        if tensor is not None:
            weights[key] = tensor
    return {"target_encoder": weights}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda: {"model": {}, "epoch": 3}, r"neither 'target_encoder' nor 'encoder'; found model, epoch"),
        (lambda: [1, 2], "holds a list"),
        (lambda: {"encoder": {}}, "found no encoder weights"),
        (lambda: {"encoder": {"layer1.weight": torch.zeros(2)}}, "found layer1.weight"),
        (lambda: {"encoder": {"norm.weight": 3}}, "norm.weight is not a floating-point tensor"),
        (lambda: change(norms_block__0__weight=torch.zeros(64)), "norms_block.0.weight"),
        (
            lambda: {"classifiers": [{}], "opt": [], "epoch": 3},
            r"neither 'target_encoder' nor 'encoder'; found classifiers",
        ),
        (lambda: change(norm__bias=None), "missing: encoder.layernorm.bias"),
        (lambda: change(blocks__1__attn__qkv__bias=None), "missing: encoder.layer.1.attention.query.bias"),
        (lambda: change(blocks__1__mlp__fc2__bias=torch.zeros(65)), r"expected shape \(64,\), found \(65,\)"),
        (lambda: change(blocks__1__attn__qkv__weight=torch.zeros(191, 64)), "expected shape"),
        (lambda: change(patch_embed__proj__weight=torch.zeros(64, 1, 2, 16, 16)), r"\(64, 1, 2, 16, 16\)"),
        (lambda: change(patch_embed__proj__weight=torch.zeros(64, 768)), r"\(64, 768\)"),
        (lambda: {"encoder": Code()}, "cannot be read"),
    ],
)
def test_a_file_of_something_else(tmp_path: Path, values: Callable[[], Any], message: str) -> None:
    path = tmp_path / "wrong.pt"
    torch.save(values(), path)
    with pytest.raises(UserError, match=message) as caught:
        VisionEncoder.from_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "backbone.", "module.backbone.", "_orig_mod.module.backbone.", "module._orig_mod.backbone."],
)
@pytest.mark.parametrize("bare", [False, True])
def test_what_wrappers_put_before_names_is_left_out(
    tmp_path: Path, encoder: VisionEncoder, prefix: str, bare: bool
) -> None:
    """Those of data-parallel training, the authors and torch.compile; with or without a dictionary around it."""
    weights = {name.replace("module.backbone.", prefix): tensor for name, tensor in change()["target_encoder"].items()}
    torch.save(weights if bare else {"target_encoder": weights, "epoch": 3}, tmp_path / "a.pt")
    loaded = VisionEncoder.from_checkpoint(tmp_path / "a.pt", image_size=64).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_table_of_positions_is_left_out(tmp_path: Path, encoder: VisionEncoder) -> None:
    torch.save(change(pos_embed=torch.zeros(1, 16, 64)), tmp_path / "a.pt")
    loaded = VisionEncoder.from_checkpoint(tmp_path / "a.pt", image_size=64).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder.state_dict().items())


def test_the_moving_average_of_version_2_1_is_taken(tmp_path: Path, encoder: VisionEncoder) -> None:
    online = change(norm__weight=torch.full((64,), 7.0))["target_encoder"]
    torch.save({"encoder": online, "ema_encoder": change()["target_encoder"]}, tmp_path / "a.pt")
    loaded = VisionEncoder.from_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded.encoder.layernorm.weight, encoder.encoder.layernorm.weight)


def test_numbers_of_numpy_beside_the_weights_do_no_harm(tmp_path: Path, encoder: VisionEncoder) -> None:
    numbers = {"loss": np.float64(0.5), "epoch": np.int64(3), "lr": np.float32(1e-3), "done": np.bool_(True)}
    torch.save(change() | numbers, tmp_path / "a.pt")
    loaded = VisionEncoder.from_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded.encoder.layernorm.weight, encoder.encoder.layernorm.weight)
    torch.save(change() | {"hook": Code()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="more than tensors, numbers and texts, of which none was run"):
        VisionEncoder.from_checkpoint(tmp_path / "a.pt")


def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = META_FILE.read_bytes()
    contents = {
        "text.pt": b"epoch,loss\n1,0.5\n",
        "empty.pt": b"",
        "cut.pt": whole[: len(whole) // 2],
        "text.safetensors": b"epoch,loss\n1,0.5\n",
        "cut.safetensors": (FIXTURES / "vjepa2_tiny.safetensors").read_bytes()[:5000],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            VisionEncoder.from_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match="no vision checkpoint at"):
        VisionEncoder.from_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="V-JEPA 2 encoder"):
        VisionEncoder.from_checkpoint(FIXTURES / "mamba3_siso.safetensors")
    assert capsys.readouterr().out == ""


def test_wrong_folders(tmp_path: Path, encoder: VisionEncoder) -> None:
    with pytest.raises(UserError, match="found nothing"):
        VisionEncoder.from_checkpoint(tmp_path)
    save_transformers_folder(encoder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wrong = [
        ("model_type", "vit", "model_type"),
        ("hidden_size", 128, "configuration says hidden_size 128"),
        ("hidden_size", "64", "configuration says hidden_size '64'"),
        ("num_attention_heads", 0, "heads: "),
    ]
    for key, value, message in wrong:
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=message):
            VisionEncoder.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        VisionEncoder.from_checkpoint(tmp_path)
    with pytest.raises(UserError, match="not a multiple of patch_size"):
        VisionEncoder.from_checkpoint(META_FILE, image_size=100)


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
