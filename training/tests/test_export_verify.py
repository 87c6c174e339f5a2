"""`export --verify`: a good export of any model is accepted, and one wrong number anywhere is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_export import build, export, save
from torch import Tensor, nn

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import Mamba3Config, preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.export.reader import load_exported
from mamba3_jepa.export.verify import compare, demand_equal
from mamba3_jepa.models.key_map import COMPONENTS, Component
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import DtypeName

DTYPES: tuple[DtypeName, ...] = ("float32", "float16", "bfloat16")
LAYERS: dict[str, dict[str, Any]] = {
    "siso": {},
    "softplus": {"a_activation": "softplus", "ngroups": 2, "rope_fraction": 1.0},
    "mimo": {"is_mimo": True, "mimo_rank": 3},
    "mimo_outnorm": {"is_mimo": True, "mimo_rank": 2, "is_outproj_norm": True},
}
TRAINED = {
    "tiny": ["--tiny"],
    "gates": ["--tiny", "--angn-enabled"],
    "fine": ["--tiny", "--patch-size", "4"],
    "mini": ["--preset", "mini", "--patch-size", "16"],
}


# --- what is good ---


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("angn", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_models_of_every_kind(tmp_path: Path, layer: str, angn: bool, seed: int) -> None:
    changes: dict[str, Any] = {}
    for name in ("predictor", "y_encoder", "y_decoder"):
        backbone = getattr(preset("tiny"), name)
        kind = Mamba3Config(**(dataclasses.asdict(backbone.layer) | LAYERS[layer]))
        changes[name] = dataclasses.replace(backbone, layer=kind)
    checkpoint = save(build(angn=angn, seed=seed, **changes), tmp_path / "c.pt", 3)
    for dtype in DTYPES:
        report = export(checkpoint, tmp_path / dtype, dtype=dtype, verify=True, x_encoder=seed > 0)
        assert max(difference.largest for difference in report.differences) <= 1e-6


@pytest.mark.parametrize(("kind", "steps"), [*((kind, 2) for kind in TRAINED), ("gates", 30)])
def test_checkpoints_that_a_run_has_left(tmp_path: Path, kind: str, steps: int) -> None:
    """After two steps the gain of the whitening is there and nothing has adapted to it: rounding shows most."""
    small = ["--synthetic-scenes", "48", "--val-samples", "12", "--workers", "0", "--batch-size", "8", "--epochs", "9"]
    run = ["train-jepa", *TRAINED[kind], *small, "--max-steps", str(steps), "--output-dir", str(tmp_path / "run")]
    assert main(run) == 0
    for dtype in DTYPES:
        for x_encoder in (["--x-encoder"], []):
            given = ["--checkpoint", str(tmp_path / "run/phase1_last.pt"), "--output", str(tmp_path / dtype)]
            assert main(["export", *given, "--dtype", dtype, "--verify", *x_encoder]) == 0


def test_what_rounding_does_is_said_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = build()
    checkpoint = save(model, tmp_path / "c.pt", 3)
    report = export(checkpoint, tmp_path / "out", dtype="bfloat16", verify=True, x_encoder=True)
    rounding = {difference.output: difference.rounding for difference in report.differences}
    texts = ["what color is the circle?", "red"]
    rounded = load_exported(tmp_path / "out").embed_text(texts)
    assert 0 < (rounded - model.embed_text(texts)).abs().max().item() < 10 * rounding["text embedding"]
    for dtype, said in (("bfloat16", True), ("float32", False)):
        arguments = ["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--dtype", dtype]
        assert main([*arguments, "--verify"]) == 0
        assert (f"due to {dtype}" in " ".join(capsys.readouterr().out.split())) == said


# --- what is wrong ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build(), tmp_path_factory.mktemp("checkpoint") / "c.pt", 3)


def pair(checkpoint: Path, folder: Path, dtype: DtypeName) -> tuple[Mamba3Jepa, Mamba3Jepa, list[Component]]:
    """The checkpoint's model, that of its export, and what was exported."""
    export(checkpoint, folder, dtype=dtype, x_encoder=True)
    return Mamba3Jepa.from_checkpoint(checkpoint), load_exported(folder), list(COMPONENTS)


def _scaled(tensor: Tensor) -> Tensor:
    return tensor * 1.01 if tensor.any() else tensor + 1e-3


def _transposed(tensor: Tensor) -> Tensor:
    """The numbers of a matrix read in the other order; a vector backwards; a number with the other sign."""
    if tensor.dim() == 0:
        return -tensor
    return tensor.flip(0) if tensor.dim() == 1 else tensor.flatten(1).t().reshape(tensor.shape)


def _one_number(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.flatten()[-1] += max(1e-3, 0.01 * tensor.abs().max().item())
    return changed


@pytest.mark.parametrize("damage", [_scaled, _transposed, _one_number])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_wrong_tensor_is_named(
    checkpoint: Path, tmp_path: Path, dtype: DtypeName, damage: Callable[[Tensor], Tensor]
) -> None:
    model, exported, components = pair(checkpoint, tmp_path, dtype)
    assert all(difference.ok for difference in compare(model, exported, components, dtype))
    for name, tensor in exported.state_dict().items():
        right = tensor.clone()
        with torch.no_grad():
            tensor.copy_(damage(right))
        if torch.equal(tensor, right):
            assert damage is _transposed, name  # of equal numbers
            continue
        with pytest.raises(UserError, match=rf"differs from the checkpoint in {name}\. Nothing was exported"):
            compare(model, exported, components, dtype)
        with torch.no_grad():
            tensor.copy_(right)


def test_two_tensors_that_changed_places(checkpoint: Path, tmp_path: Path) -> None:
    model, exported, components = pair(checkpoint, tmp_path, "float16")
    layers = exported.predictor.backbone.layers
    with torch.no_grad():
        first, second = (layer.out_proj.weight for layer in layers)  # type: ignore[union-attr]
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
    with pytest.raises(UserError, match=r"layers\.0\.out_proj\.weight, predictor\.backbone\.layers\.1\.out_proj"):
        compare(model, exported, components, "float16")


def _another_activation(model: Mamba3Jepa) -> None:
    for layer in model.y_encoder.backbone.layers:
        layer.a_activation = "softplus"  # type: ignore[assignment]


def _another_eps(model: Mamba3Jepa) -> None:
    for module in (model.predictor.backbone.final_norm, model.predictor.backbone.norms[0]):
        module.eps = 1e-3  # type: ignore[assignment]


def _no_gates(model: Mamba3Jepa) -> None:
    model.angn = None


def _another_order(model: Mamba3Jepa) -> None:
    assert model.y_decoder is not None
    model.y_decoder.backbone.layers = nn.ModuleList(reversed(list(model.y_decoder.backbone.layers)))


@pytest.mark.parametrize(
    ("change", "output"),
    [
        (_another_activation, "text embedding"),
        (_another_eps, "predicted embedding"),
        (_no_gates, "pooled state"),
        (_another_order, "decoder logits"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_tensors_that_are_used_wrongly(
    checkpoint: Path, tmp_path: Path, dtype: DtypeName, change: Callable[[Mamba3Jepa], None], output: str
) -> None:
    """What the outputs show and no tensor does; rounding does not hide it."""
    model, exported, components = pair(checkpoint, tmp_path, dtype)
    change(exported)
    if change in (_no_gates, _another_order):
        components = ["x_encoder"]  # the names are others now, so that only the outputs can tell
    differences = {difference.output: difference for difference in compare(model, exported, components, dtype)}
    assert not differences[output].ok
    with pytest.raises(UserError, match=f"differs from the checkpoint: .*{output} by"):
        demand_equal(list(differences.values()))


def test_an_output_that_is_not_finite_is_no_match(checkpoint: Path, tmp_path: Path) -> None:
    model, exported, _ = pair(checkpoint, tmp_path, "float32")
    with torch.no_grad():
        exported.y_encoder.projection.bias.fill_(torch.nan)
    differences = {difference.output: difference for difference in compare(model, exported, ["angn"], "float32")}
    assert not differences["text embedding"].ok
