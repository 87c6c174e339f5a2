"""The benchmark of a whole step: its count of operations, what a share is a share of, and that it is the training
step."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mamba3_jepa.bench import peak as peak_module
from mamba3_jepa.bench import step as step_module
from mamba3_jepa.bench.operations import counted, of_images, of_predictor, of_texts
from mamba3_jepa.bench.peak import Peak, arithmetic, listed
from mamba3_jepa.bench.step import SECTIONS, report_rows, run_step_benchmark
from mamba3_jepa.cli.flags import as_flag
from mamba3_jepa.config import preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.models import mamba3
from mamba3_jepa.models.network import Network
from mamba3_jepa.models.scan import Mamba3State, ScanInputs
from mamba3_jepa.settings.bench import LayerBenchmarkSettings, StepBenchmarkSettings
from mamba3_jepa.settings.export import InspectSettings
from mamba3_jepa.settings.training import Phase1Settings
from mamba3_jepa.training.phase1_objective import Phase1Objective

SETTINGS = StepBenchmarkSettings(preset="tiny", batch_size=8, steps=2, warm_up=1, threads=1, device="cpu", workers=0)


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "_SCENES", 16)


def test_operations_by_hand() -> None:
    """`tiny`: X-Encoder 64 x 2 of 16 tokens in 8 px patches, MLPs of 256; backbones 64 x 2, 8 heads of 16, state 16."""
    model = Network(preset("tiny"))
    x_layer = 4 * 64 * 64 + 2 * 64 * 256 + 2 * 16 * 64  # projections, MLP, attention over 16 tokens
    assert of_images(model.x_encoder, 3) == 2 * 3 * 16 * (3 * 8 * 8 * 64 + 2 * x_layer) == 11_010_048
    in_proj = 64 * (128 + 128 + 16 + 16 + 3 * 8 + 4)  # z, x, B, C, three numbers a head, angles
    token = 2 * (in_proj + 128 * 64 + 2 * 16 * 128)  # two layers: in_proj, out_proj, into the state and out of it
    trained = 21 * token + 5 * 64 * 64 + 21 * 64 + 64 * 32  # backbone, query_proj, pool_score, pred_head
    assert of_predictor(model.predictor, 1, 16, 5) == 2 * (3 * trained + 2 * 16 * 64 * 64) == 8_598_400
    assert of_texts(model.y_encoder, 3, 7) == 3 * 2 * 3 * (7 * token + 64 * 32) == 8_229_888


def without_products(
    inputs: ScanInputs, state: Mamba3State | None, chunk_size: int, z: Tensor | None, return_state: bool
) -> tuple[Tensor, None]:
    """A scan that has gradients by everything, and no matrix product."""
    of_token = torch.stack([x.flatten(2).sum(2) for x in (inputs.q, inputs.k, inputs.dt, inputs.angle)]).sum(0)
    y = inputs.v * of_token[..., None, None]
    return (y if z is None else y * z).unsqueeze(2), None


@pytest.mark.parametrize("changes", [{}, {"order": "visual_question", "pooling": "all", "bidirectional": True}])
def test_operations_are_those_that_torch_counts(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the scan's, which depend on how it is computed."""
    monkeypatch.setattr(mamba3, "chunked_scan", without_products)
    config = preset("tiny")
    predictor = dataclasses.replace(config.predictor, mlp_dim=100, **changes)
    model = Network(config.replace(predictor=predictor))
    has_image, picture = torch.tensor([True, False, True]), torch.tensor([0, 1])
    ids = torch.randint(0, 9, (3, 5))
    texts, mask = torch.randint(0, 9, (4, 7)), torch.ones(4, 7, dtype=torch.bool)

    def run() -> None:
        found = model(torch.rand(2, 3, 32, 32), has_image, ids, torch.ones_like(ids, dtype=torch.bool), picture)
        (found.embedding.sum() + model.y_encoder(texts, mask).sum()).backward()

    # torch counts the products of attention where they are products
    with FlopCounterMode(display=False) as torchs, sdpa_kernel(SDPBackend.MATH):
        run()
    with counted(model) as ours:
        run()
    directions = 2 if changes else 1
    scans = 2 * 3 * 2 * 2 * 16 * 128 * (3 * (16 + 5) * directions + 4 * 7)  # forward and backward, two layers
    assert ours.total() - scans == torchs.get_total_flops()
    assert set(ours) == {"x_encoder", "predictor", "y_encoder"}
    run()
    assert ours.total() - scans == torchs.get_total_flops()  # what comes after the block is not counted


def test_peaks_are_those_of_the_card_that_is_there() -> None:
    assert listed("NVIDIA H200", "bfloat16") == 989e12
    assert listed("NVIDIA H100 80GB HBM3", "TF32") == 494e12
    assert listed("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert listed("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert listed("NVIDIA A100 80GB PCIe", "bfloat16") == listed("NVIDIA A100-PCIE-40GB", "bfloat16") == 312e12
    for other in (
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H20",
    ):
        assert listed(other, "bfloat16") is None


def test_a_peak_that_is_not_known_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(peak_module, "_SIDE", {"cpu": 64})
    peak = Peak(cpu, "bfloat16")
    assert peak.source.startswith("measured here, beside the steps: the median product of two matrices of 64 x 64")
    times = iter([0.0, 2.0, 0.0, 1.0, 0.0, 4.0])
    monkeypatch.setattr(peak_module.time, "perf_counter", lambda: next(times))
    for _ in range(3):
        peak.measure()
    assert peak.rate == 2 * 64**3 / 2.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    known = Peak(torch.device("cuda"), "bfloat16")
    known.measure()
    assert (known.rate, known.source) == (989e12, "data sheet of NVIDIA H200, dense bfloat16")
    assert [arithmetic(cpu, True), arithmetic(cpu, False)] == ["bfloat16", "float32"]
    assert arithmetic(torch.device("cuda"), False) == "float32"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert arithmetic(torch.device("cuda"), False) == "TF32"


def test_it_measures_and_the_sections_are_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_module, "_SIDE", {"cpu": 64})
    result = run_step_benchmark(SETTINGS)
    assert [each.section for each in result.sections] == list(SECTIONS)
    assert all(each.seconds > 0 for each in result.sections)
    assert sum(each.share for each in result.sections) == pytest.approx(1)
    assert sum(each.seconds for each in result.sections) == pytest.approx(result.step_seconds)
    assert result.samples_per_second == pytest.approx(8 / result.step_seconds)
    assert sum(each.operations or 0 for each in result.sections) == pytest.approx(result.operations)
    assert result.utilisation == pytest.approx(result.operations / result.step_seconds / result.peak)
    assert [each.operations is None for each in result.sections] == [True, False, False, False, True, True]
    assert result.kernels.startswith("none taken")
    rows = report_rows(result)
    assert [row[0] for row in rows] == [*SECTIONS, "the whole step"]


def test_a_step_is_that_of_training() -> None:
    """The cut backward pass gives the gradients of the whole one."""
    model, loader = step_module._model_and_data(SETTINGS)
    batch = next(step_module.epochs(loader))
    objective = Phase1Objective(model)
    objective(batch).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    step = step_module._Step(model, SETTINGS)
    step._max_norm = float("inf")
    assert step(iter([batch]), step_module._Marks(torch.device("cpu"))) == 8
    assert norm > 0
    for name, parameter in model.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_kept_tokens_are_those_that_the_x_encoder_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []
    encode = Network.encode_images

    def remembered(self: Network, *arguments: Tensor) -> Tensor:
        tokens = encode(self, *arguments)
        seen[-1].append(tokens)
        return tokens

    monkeypatch.setattr(Network, "encode_images", remembered)
    for kept in (False, True):
        seen.append([])
        result = run_step_benchmark(dataclasses.replace(SETTINGS, kept_tokens=kept))
        of_images = next(each for each in result.sections if each.section == "X-Encoder").operations
        assert (of_images is None) == kept
    assert len(seen[0]) == len(seen[1]) == 3
    for computed, given in zip(*seen, strict=True):
        torch.testing.assert_close(given, computed)


def test_impossible_settings(tmp_path: Path) -> None:
    for changes, message in (
        ({"kernels": "require"}, "`kernels` require: the kernels are for CUDA GPUs, and this computes on cpu"),
        ({"steps": 0}, "`steps` 0: must be at least 1"),
        ({"batch_size": 50_000}, "`batch_size` 50000 is more than its"),
        ({"manifest": tmp_path / "x"}, "`manifest`"),
        ({"device": "cuda:7"}, "`device` cuda:7: not available here"),
    ):
        with pytest.raises(UserError, match=message):
            run_step_benchmark(dataclasses.replace(SETTINGS, **changes))


def test_the_check_of_a_gpu_says_that_there_is_none(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "gpu_check.sh"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    run = subprocess.run(["sh", script, tmp_path], env=hidden, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "gpu_check: torch finds no CUDA GPU on this machine: nothing was checked\n"


def test_the_check_of_a_gpu_calls_what_there_is() -> None:
    text = (Path(__file__).parents[2] / "examples" / "gpu_check.sh").read_text(encoding="utf-8")
    for name in re.findall(r"tests/test_\w+\.py", text):
        assert (Path(__file__).parents[1] / name).is_file()
    flags = set(re.findall(r" (--[a-z0-9-]+)", text)) - {"--device"}
    settings = (StepBenchmarkSettings, LayerBenchmarkSettings, Phase1Settings, InspectSettings)
    known = {as_flag(field.name) for each in settings for field in dataclasses.fields(each)}
    assert {flag.replace("--no-", "--") for flag in flags} <= known
