"""mamba-ssm's real kernels against the token-by-token reference; runs only where a GPU and mamba-ssm are."""

from __future__ import annotations

import copy

import pytest
import torch
from test_mamba3 import layer_of, relative, scan_inputs
from torch import Tensor

from mamba3_jepa.models import kernel_check, kernel_tuning, kernels, mamba3
from mamba3_jepa.models.fused import Fused
from mamba3_jepa.models.mamba3 import Mamba3
from mamba3_jepa.models.scan import Mamba3State, ScanInputs, sequential_scan

VALUE_ERROR, GRADIENT_ERROR = 2e-2, 4e-2  # the kernels compute in bfloat16, 8 bits of mantissa

CUDA = torch.cuda.is_available()
SISO = pytest.mark.skipif(not (CUDA and kernels.siso_kernel()), reason="needs a GPU and mamba-ssm's Triton kernels")
MIMO = pytest.mark.skipif(not (CUDA and kernels.mimo_kernel()), reason="needs a GPU and mamba-ssm's TileLang kernels")
KINDS = [pytest.param("siso", marks=SISO), pytest.param("groups", marks=SISO), pytest.param("mimo", marks=MIMO)]
SIZES = {"d_model": 64, "d_state": 64, "headdim": 64}


def layer_on_gpu(kind: str) -> Mamba3:
    sizes = SIZES | ({"mimo_rank": 4} if kind == "mimo" else {})
    layer = layer_of(kind, torch.float32, **sizes)
    with torch.no_grad():
        layer.dt_bias -= 5  # step sizes of training, so that bfloat16 angles stay meaningful
    return layer.cuda()


def on_gpu(layer: Mamba3, length: int) -> ScanInputs:
    """What the kernel would be given, already rounded to bfloat16 where it rounds."""
    inputs = scan_inputs(layer.cpu(), length)
    layer.cuda()
    rounded = {name: getattr(inputs, name).bfloat16().float() for name in ("q", "k", "v", "trap")}
    return ScanInputs(
        *(x.detach().cuda().requires_grad_() if isinstance(x, Tensor) else x for x in inputs._replace(**rounded))
    )


def gradients(y: Tensor, inputs: ScanInputs) -> dict[str, Tensor]:
    torch.manual_seed(3)
    leaves = {name: x for name, x in inputs._asdict().items() if isinstance(x, Tensor)}
    weight = torch.randn(y.shape).to(y.device)
    return dict(zip(leaves, torch.autograd.grad((y.float() * weight).sum(), list(leaves.values())), strict=True))


def run(inputs: ScanInputs, state: Mamba3State | None, return_state: bool) -> tuple[Tensor, Mamba3State | None]:
    narrow = inputs._replace(v=inputs.v.bfloat16())
    assert kernels.unfit(narrow, state, return_state) is None
    return kernels.fused_scan(narrow, state, None, return_state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 17, 64, 65, 257])
def test_values_and_gradients(kind: str, length: int) -> None:
    inputs = on_gpu(layer_on_gpu(kind), length)
    expected, _ = sequential_scan(inputs)
    found, _ = run(inputs, None, return_state=False)
    assert relative(found.float(), expected) < VALUE_ERROR
    wanted = gradients(expected, inputs)
    for name, gradient in gradients(found, inputs).items():
        assert relative(gradient, wanted[name]) < GRADIENT_ERROR, name


@pytest.mark.parametrize("kind", KINDS)
def test_state_out(kind: str) -> None:
    inputs = on_gpu(layer_on_gpu(kind), 129)
    _, expected = sequential_scan(inputs)
    with torch.no_grad():
        _, found = run(inputs, None, return_state=True)
    assert found is not None
    assert relative(found.h, expected.h) < VALUE_ERROR
    assert relative(found.k.float(), expected.k) < VALUE_ERROR
    assert relative(found.v.float(), expected.v) < VALUE_ERROR
    turned = torch.stack([(found.theta - expected.theta).cos(), (found.theta - expected.theta).sin()])
    assert relative(turned, torch.stack([torch.ones_like(turned[0]), torch.zeros_like(turned[1])])) < VALUE_ERROR


@SISO
def test_state_in_continues_a_sequence() -> None:
    layer = layer_on_gpu("siso")
    u = torch.randn(2, 100, layer.d_model, device="cuda")
    expected = layer(u)
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        first, state = layer(u[:, :37], return_state=True)
        second = layer(u[:, 37:], state)
    assert relative(torch.cat([first, second], dim=1).float(), expected) < VALUE_ERROR


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_under_autocast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast takes the kernel, and gives what the layer gives in float32, parameter gradients included."""
    layer = layer_on_gpu(kind)
    exact = copy.deepcopy(layer)
    u = torch.randn(2, 130, layer.d_model, device="cuda")
    weight = torch.randn_like(u)
    expected = exact(u)
    (expected * weight).sum().backward()

    choice = Fused("require")
    monkeypatch.setattr(mamba3, "fused", choice)
    with torch.autocast("cuda", torch.bfloat16):
        found = layer(u)
    (found.float() * weight).sum().backward()
    assert list(choice.wrong.values()) == [None]
    assert choice.kept()["wrong"] == []
    assert relative(found.float(), expected) < VALUE_ERROR
    for (name, parameter), reference in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert relative(parameter.grad, reference.grad) < GRADIENT_ERROR, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [3, 48, 64, 65, 325])
def test_the_check_at_first_use_has_room_to_spare(kind: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are right are not switched off: half of what is allowed is enough, with many sequences and heads."""
    for name in ("VALUE_ERROR", "GRADIENT_ERROR"):
        monkeypatch.setattr(kernel_check, name, getattr(kernel_check, name) / 2)
    choice = Fused("require")
    monkeypatch.setattr(mamba3, "fused", choice)
    sizes = {"is_mimo": True, "mimo_rank": 4} if kind == "mimo" else {}
    layer = Mamba3(512, d_state=128, headdim=64, ngroups=2 if kind == "groups" else 1, **sizes).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        layer(torch.randn(16, length, 512, device="cuda")).sum().backward()
    assert list(choice.wrong.values()) == [None]


@SISO
def test_tuning_is_kept_and_the_same_bits_come_of_it() -> None:
    layer, choice = layer_on_gpu("siso"), Fused()
    inputs = on_gpu(layer, 129)
    narrow = inputs._replace(v=inputs.v.bfloat16())
    assert choice.takes(narrow, None, None, False)
    kept = choice.kept()
    assert kept["tuned"]
    before = gradients(choice.scan(narrow, None, None, False)[0], inputs)
    for tuner in kernel_tuning._tuners("mamba_ssm.").values():
        tuner.cache.clear()
    again = Fused()
    again.begin("auto", kept)
    assert again.takes(narrow, None, None, False)
    assert again.kept() == kept
    after = gradients(again.scan(narrow, None, None, False)[0], inputs)
    assert all(torch.equal(after[name], before[name]) for name in before)
