"""Published encoders on disk: every file format, what their names say, and every kind of wrong file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from meta_checkpoint import save_meta_checkpoint, to_meta_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from mamba3_jepa.config import VisionConfig
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.published_weights import read_torch_file
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vit_checkpoint import _BLOCK_PARTS, _OUTER, read_vision_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
META_FILE = FIXTURES / "vjepa2_tiny.pt"


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return VisionEncoder.from_checkpoint(META_FILE, image_size=64)


def assert_same(actual: VisionEncoder, expected: VisionEncoder) -> None:
    """Equal weights, under equal names."""
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name


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


def test_reads_sizes_from_the_shapes(encoder: VisionEncoder) -> None:
    assert encoder.config == VisionConfig(
        pretrained=True, hidden_size=64, depth=2, heads=1, image_size=64, patch_size=16, tubelet_size=2
    )
    assert VisionEncoder.from_checkpoint(META_FILE).config.image_size == 256


@pytest.mark.parametrize(
    ("beside", "taken"),
    [
        (("target_encoder", "ema_encoder", "encoder"), "target_encoder"),
        (("encoder", "ema_encoder"), "ema_encoder"),
        (("encoder",), "encoder"),
    ],
)
def test_the_best_encoder_of_a_file_is_taken(tmp_path: Path, beside: tuple[str, ...], taken: str) -> None:
    fixture = torch.load(META_FILE, weights_only=True)
    right, wrong = fixture["target_encoder"], fixture["encoder"]
    torch.save({name: right if name == taken else wrong for name in beside} | {"epoch": 3}, tmp_path / "file.pt")
    norm = VisionEncoder.from_checkpoint(tmp_path / "file.pt").encoder.layer[0].mlp.fc1.weight
    assert torch.equal(norm, right["module.backbone.blocks.0.mlp.fc1.weight"])
    assert not torch.equal(norm, wrong["module.backbone.blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "_orig_mod.", "module._orig_mod.backbone."])
@pytest.mark.parametrize("bare", [True, False])
def test_what_wraps_the_names_does_not_matter(encoder: VisionEncoder, tmp_path: Path, prefix: str, bare: bool) -> None:
    weights: dict[str, Any] = to_meta_state_dict(encoder, prefix)
    torch.save(weights | {"epoch": 3} if bare else {"target_encoder": weights}, tmp_path / "file.pt")
    assert_same(VisionEncoder.from_checkpoint(tmp_path / "file.pt"), encoder)


def test_a_name_that_is_there_twice(encoder: VisionEncoder, tmp_path: Path) -> None:
    torch.save(to_meta_state_dict(encoder, "module.") | to_meta_state_dict(encoder, ""), tmp_path / "file.pt")
    with pytest.raises(UserError, match=r"file.pt has \S+ twice, once as"):
        VisionEncoder.from_checkpoint(tmp_path / "file.pt")


def test_a_table_of_positions_is_left_out_and_said(
    encoder: VisionEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(change(pos_embed=torch.zeros(1, 16, 64)), tmp_path / "file.pt")
    with caplog.at_level(logging.INFO):
        assert_same(VisionEncoder.from_checkpoint(tmp_path / "file.pt"), encoder)
    assert "pos_embed is left out" in caplog.text


NUMBERS = {
    "loss": np.float64(0.5), "lr": np.float32(1e-4), "epoch": np.int64(3), "done": np.bool_(True),
    "history": [np.arange(3), np.zeros((2, 2), np.float16)],
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_do_no_harm(encoder: VisionEncoder, tmp_path: Path, zipped: bool) -> None:
    values = NUMBERS | {"target_encoder": to_meta_state_dict(encoder)}
    torch.save(values, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    assert_same(VisionEncoder.from_checkpoint(tmp_path / "file.pt"), encoder)


@pytest.mark.parametrize("around", [lambda weights: {"target_encoder": weights}, dict], ids=["encoder", "bare"])
def test_what_is_no_weight_does_no_harm_among_them(
    encoder: VisionEncoder, tmp_path: Path, around: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    beside = {"epoch": torch.tensor(3), "loss": np.float64(0.5), "pos_embed": None, "note": "of a run"}
    torch.save(around(to_meta_state_dict(encoder) | beside), tmp_path / "file.pt")
    assert_same(VisionEncoder.from_checkpoint(tmp_path / "file.pt"), encoder)


@pytest.mark.parametrize(("written", "read"), [(b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")])
def test_numbers_of_an_older_and_a_newer_numpy(
    encoder: VisionEncoder, tmp_path: Path, written: bytes, read: bytes
) -> None:
    values = NUMBERS | {"target_encoder": to_meta_state_dict(encoder)}
    torch.save(values, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "file.pt").write_bytes((tmp_path / "file.pt").read_bytes().replace(written, read))
    assert_same(VisionEncoder.from_checkpoint(tmp_path / "file.pt"), encoder)


def test_numpy_is_not_called_with_what_a_file_says(tmp_path: Path) -> None:
    class Forged:
        def __reduce__(self) -> tuple[Any, ...]:
            return (np.dtype, ("no such type",))

    torch.save({"forged": Forged(), **NUMBERS}, tmp_path / "file.pt")
    values = read_torch_file(tmp_path / "file.pt", "")
    assert not any(isinstance(value, np.generic | np.ndarray | np.dtype) for value in values.values())
    assert values.keys() == {"forged", *NUMBERS}


def test_mlp_ratio_that_is_not_a_round_number(tmp_path: Path) -> None:
    config = VisionConfig(hidden_size=64, depth=1, heads=1, mlp_ratio=6144 / 1408, image_size=32)
    save_meta_checkpoint(VisionEncoder(config), tmp_path / "g.pt")
    assert VisionEncoder.from_checkpoint(tmp_path / "g.pt").encoder.layer[0].mlp.fc1.out_features == 279


def save_transformers_folder(encoder: VisionEncoder, folder: Path, shard_size: str = "1GB") -> None:
    """As `VJEPA2Model.save_pretrained` writes it, V-JEPA 2's own predictor included."""
    config = VJEPA2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, crop_size=64, pred_num_hidden_layers=1
    )
    model = VJEPA2Model(config)
    model.encoder.load_state_dict(encoder.encoder.state_dict())
    model.save_pretrained(folder, max_shard_size=shard_size)


def test_transformers_goes_by_the_crop_size(encoder: VisionEncoder, tmp_path: Path) -> None:
    save_transformers_folder(encoder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"crop_size": 64} | config | {"image_size": 256}))
    assert VisionEncoder.from_checkpoint(tmp_path).config.image_size == 64


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
    assert_same(loaded, encoder)


def test_writes_the_names_meta_uses(encoder: VisionEncoder) -> None:
    theirs = torch.load(META_FILE, weights_only=True)["target_encoder"]
    ours = to_meta_state_dict(encoder)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("hidden_size", "depth", "heads"),
    [(768, 12, 12), (1024, 24, 16), (1280, 32, 16), (1408, 40, 22), (1664, 48, 26), (192, 2, 3)],
)
def test_heads_follow_from_the_size(tmp_path: Path, hidden_size: int, depth: int, heads: int) -> None:
    """Only the names and the two leading shapes decide; the rest of such a large file is left empty."""
    parts = [f"{part}.{end}" for part in ("attn.qkv", *_BLOCK_PARTS) for end in ("weight", "bias")]
    names = [*_OUTER["vjepa2"], *(f"blocks.{i}.{part}" for i in range(depth) for part in parts)]
    weights = {f"module.backbone.{name}": torch.zeros(1) for name in names}
    weights["module.backbone.patch_embed.proj.weight"] = torch.zeros(hidden_size, 3, 2, 1, 1)
    weights["module.backbone.blocks.0.mlp.fc1.weight"] = torch.zeros(hidden_size * 4, 1)
    torch.save({"target_encoder": weights}, tmp_path / "sizes.pt")
    config, _ = read_vision_checkpoint(tmp_path / "sizes.pt")
    assert (config.hidden_size, config.depth, config.heads) == (hidden_size, depth, heads)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            lambda: {"model": {}, "epoch": 3},
            "no 'target_encoder', 'ema_encoder' or 'encoder', and no tensors; found model, epoch",
        ),
        (
            lambda: {"classifiers": [{}], "opt": [], "epoch": 3},
            "no tensors; found classifiers",
        ),
        (lambda: {}, "no tensors; found nothing"),
        (lambda: [1, 2], "holds a list"),
        (lambda: {"encoder": {}}, "found no encoder weights"),
        (lambda: {"encoder": {"layer1.weight": torch.zeros(2)}}, "found layer1.weight"),
        (lambda: {"encoder": {"norm.weight": 3}}, "found no encoder weights"),
        (
            lambda: change(norm__bias=torch.ones(64, dtype=torch.int8)),
            r"norm\.bias has whole numbers, of type torch\.int8",
        ),
        (lambda: change(norm__bias=torch.full((64,), torch.nan)), r"norm\.bias has values that are no finite numbers"),
        (lambda: change(cls_token=torch.zeros(1, 1, 64)), "found cls_token"),
        (lambda: change(norm__bias=None), r"the encoder is not whole: missing: norm\.bias"),
        (lambda: change(blocks__1__attn__qkv__bias=None), r"missing: blocks\.1\.attn\.qkv\.bias"),
        (lambda: change(blocks__1__mlp__fc2__bias=torch.zeros(65)), r"expected shape \(64,\), found \(65,\)"),
        (lambda: change(blocks__1__attn__qkv__weight=torch.zeros(191, 64)), "expected shape"),
        (lambda: change(patch_embed__proj__weight=torch.zeros(64, 1, 2, 16, 16)), r"\(64, 1, 2, 16, 16\)"),
        (lambda: change(patch_embed__proj__weight=torch.zeros(64, 768)), r"\(64, 768\)"),
        (lambda: change(patch_embed__proj__weight=torch.zeros(64, 3, 2, 0, 0)), r"\(64, 3, 2, 0, 0\)"),
        (lambda: {"encoder": Code()}, "more than tensors, numbers and texts, of which none was run"),
        (lambda: change() | {"hook": Code()}, "more than tensors, numbers and texts, of which none was run"),
    ],
)
def test_a_file_of_something_else(tmp_path: Path, values: Callable[[], Any], message: str) -> None:
    path = tmp_path / "wrong.pt"
    torch.save(values(), path)
    with pytest.raises(UserError, match=message) as caught:
        VisionEncoder.from_checkpoint(path)
    assert str(path) in str(caught.value)


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


def shard(folder: Path) -> list[Path]:
    """A folder of this encoder in several files of at most 100 kB."""
    save_transformers_folder(VisionEncoder.from_checkpoint(META_FILE), folder, "100KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_a_folder_in_shards(encoder: VisionEncoder, tmp_path: Path) -> None:
    assert len(shard(tmp_path)) > 2
    assert_same(VisionEncoder.from_checkpoint(tmp_path), encoder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    missing = shard(tmp_path)[1]
    missing.unlink()
    with pytest.raises(UserError, match=rf"{missing} is missing: model.safetensors.index.json names it"):
        VisionEncoder.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not JSON"),
        ("{}", '"weight_map" must give the file of every tensor'),
        ('{"weight_map": {"a": 1}}', '"weight_map" must give the file of every tensor'),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"'../model.safetensors' is not the name of a file"),
    ],
)
def test_a_wrong_index(tmp_path: Path, index: str, message: str) -> None:
    shard(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        VisionEncoder.from_checkpoint(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_with_pytorch_model_bin(encoder: VisionEncoder, tmp_path: Path, shards: int) -> None:
    save_transformers_folder(encoder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = list(encoder.state_dict().items())
    names = ["pytorch_model.bin"] if shards == 1 else ["pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin"]
    for i, name in enumerate(names):
        torch.save(dict(weights[i::shards]), tmp_path / name)
    if shards > 1:
        places = {key: names[i % shards] for i, (key, _) in enumerate(weights)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(VisionEncoder.from_checkpoint(tmp_path), encoder)


def save_21(path: Path) -> None:
    config = VisionConfig(kind="vjepa2.1", hidden_size=12, heads=1, depth=1, patch_size=16, image_size=32)
    torch.save({"ema_encoder": to_meta_state_dict(VisionEncoder(config))}, path)


def save_table(places: int) -> Callable[[Path], None]:
    return lambda path: torch.save(change(pos_embed=torch.zeros(1, places, 64)), path)


@pytest.mark.parametrize(
    ("name", "save", "size", "said"),
    [
        ("vitl.pt", save_table(0), 256, True),
        ("vitg-384.pt", save_table(0), 384, False),
        ("vjepa2_1_vitb_dist_vitG_384.pt", save_21, 384, False),
        ("vjepa2-vitl-256-384.pth", save_table(0), 384, False),
        ("vjepa2-vitg-fpc64-384/original/model.pth", save_table(0), 384, False),
        ("models--facebook--vjepa2-vitg-fpc64-384/snapshots/1/model.pth", save_table(0), 384, False),
        ("vjepa2-384/model.pth", save_table(0), 256, True),
        ("5384.pt", save_table(0), 256, True),
        ("a384b.pt", save_table(0), 256, True),
        ("table.pt", save_table(32 * 24**2), 384, False),
        ("table.pt", save_table(24**2), 384, False),
        ("table.pt", save_table(8 * 16**2), 256, False),
        ("table.pt", save_table(3 * 16**2), 256, True),
        ("vit-table-384.pt", save_table(16**2), 384, False),
        ("step-384.pt", save_table(16**2), 256, False),
        ("checkpoint-384.pt", save_table(0), 256, True),
        ("unsaid.pt", save_21, 384, True),
    ],
)
def test_how_large_the_images_are(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    save: Callable[[Path], None],
    size: int,
    said: bool,
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    save(tmp_path / name)
    with caplog.at_level(logging.INFO):
        assert VisionEncoder.from_checkpoint(tmp_path / name).config.image_size == size
    assert ("does not say how large its images were" in caplog.text) == said
    assert VisionEncoder.from_checkpoint(tmp_path / name, image_size=48).config.image_size == 48


def test_settings_come_before_the_name(encoder: VisionEncoder, tmp_path: Path) -> None:
    save_transformers_folder(encoder, tmp_path / "vitg-384")
    assert VisionEncoder.from_checkpoint(tmp_path / "vitg-384").config.image_size == 64
