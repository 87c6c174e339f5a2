"""The Mamba-3 layer against the reference's numbers, and its three forms against each other."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from mamba3_jepa.config import BackboneConfig, Mamba3Config, preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.chunked import chunked_scan
from mamba3_jepa.models.mamba3 import Mamba3, Mamba3Backbone, Mamba3State, RMSNorm
from mamba3_jepa.models.scan import ScanInputs, sequential_scan

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("mamba3_*.safetensors"))
KINDS = {
    "siso": {},
    "groups": {"ngroups": 2, "rope_fraction": 1.0},
    "mimo": {"is_mimo": True, "mimo_rank": 3},
    "mimo_groups_norm": {
        "is_mimo": True,
        "mimo_rank": 2,
        "ngroups": 2,
        "rope_fraction": 1.0,
        "is_outproj_norm": True,
    },
    "softplus_norm": {"a_activation": "softplus", "is_outproj_norm": True},
}


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; the floor is for gradients that are zero by construction."""
    return ((found - expected).norm() / expected.norm().clamp(min=1e-4)).item()


def layer_of(kind: str, dtype: torch.dtype = torch.float64, **changes: object) -> Mamba3:
    """A small layer whose every parameter is away from its (often uniform) initial value."""
    torch.manual_seed(0)
    arguments = {"d_model": 24, "d_state": 8, "headdim": 6, **KINDS[kind], **changes}
    layer = Mamba3(**arguments).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        layer.dt_bias += 2  # large steps: decays and angles that matter within a chunk
    return layer


def state_of(layer: Mamba3, batch: int, dtype: torch.dtype = torch.float64) -> Mamba3State:
    torch.manual_seed(1)
    state = layer.initial_state(batch, dtype=dtype)
    return Mamba3State(*(torch.randn_like(x).requires_grad_() for x in state))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_matches_the_reference_implementation(path: Path) -> None:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    layer = Mamba3(**config)
    layer.load_state_dict({n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")})
    u = tensors["input"].requires_grad_()
    y = layer(u)
    y.backward(tensors["grad_output"])
    assert relative(y, tensors["output"]) < 1e-5
    assert relative(u.grad, tensors["grad_input"]) < 1e-5
    for name, parameter in layer.named_parameters():
        assert relative(parameter.grad, tensors[f"grad.{name}"]) < 1e-5, name


def scan_inputs(layer: Mamba3, L: int) -> ScanInputs:
    torch.manual_seed(2)
    with torch.no_grad():
        _, inputs = layer._project(torch.randn(2, L, layer.d_model, dtype=layer.D.dtype))
    return ScanInputs(*(x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in inputs))


def values_and_gradients(scan, inputs: ScanInputs, state: Mamba3State | None) -> list[Tensor]:
    y, after = scan(inputs, state)
    torch.manual_seed(3)
    outputs = [y, after.theta.cos(), after.theta.sin(), after.h, after.k, after.v]
    loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
    leaves = [x for x in (*inputs, *(state or ())) if isinstance(x, Tensor)]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("kind", ["siso", "groups", "mimo"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 257])
def test_chunked_equals_sequential(kind: str, with_state: bool, L: int) -> None:
    layer = layer_of(kind)
    inputs = scan_inputs(layer, L)
    state = state_of(layer, 2) if with_state else None
    expected = values_and_gradients(sequential_scan, inputs, state)
    for chunk_size in (1, 7, 64, 300) if L < 100 else (5, 64):
        found = values_and_gradients(lambda i, s, c=chunk_size: chunked_scan(i, s, c), inputs, state)
        for a, b in zip(found, expected, strict=True):
            assert relative(a, b) < 1e-9


@pytest.mark.parametrize("kind", ["siso", "mimo"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("L", [1, 7, 15])
def test_chunked_without_the_last_state(kind: str, with_state: bool, L: int) -> None:
    """What only the state needs is left out; the output and its gradients stay."""
    layer = layer_of(kind)
    inputs = scan_inputs(layer, L)
    state = state_of(layer, 2) if with_state else None
    leaves = [x for x in (*inputs, *(state or ())) if isinstance(x, Tensor)]

    def output_and_gradients(y: Tensor) -> list[Tensor | None]:
        torch.manual_seed(3)
        return [y.detach(), *torch.autograd.grad((y * torch.randn_like(y)).sum(), leaves, allow_unused=True)]

    expected = output_and_gradients(sequential_scan(inputs, state)[0])
    for chunk_size in (1, 7, 64):
        y, after = chunked_scan(inputs, state, chunk_size, return_state=False)
        assert after is None
        for a, b in zip(output_and_gradients(y), expected, strict=True):
            assert (a is None or not a.any()) if b is None else relative(a, b) < 1e-9


@pytest.mark.parametrize("kind", ["siso", "mimo"])
def test_chunked_equals_sequential_over_a_thousand_tokens(kind: str) -> None:
    # Wide heads, so that the layer keeps the requested 64 tokens a chunk.
    layer = layer_of(kind, d_state=64, headdim=64, d_model=32)
    inputs, state = scan_inputs(layer, 1000), state_of(layer, 2)
    expected = values_and_gradients(sequential_scan, inputs, state)
    for a, b in zip(values_and_gradients(chunked_scan, inputs, state), expected, strict=True):
        assert relative(a, b) < 1e-9


@pytest.mark.parametrize("kind", ["siso", "mimo"])
def test_backward_passes_gradcheck(kind: str) -> None:
    layer = layer_of(kind, d_model=4, d_state=4, headdim=4, mimo_rank=2)
    inputs, state = scan_inputs(layer, 5), state_of(layer, 2)
    z = torch.randn(2, 5, 2, 4, dtype=torch.float64, requires_grad=True) if kind == "siso" else None
    flags = [x for x in inputs if not isinstance(x, Tensor)]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = ScanInputs(*tensors[: len(tensors) - 4], *flags)
        y, after = chunked_scan(given, Mamba3State(*tensors[-4:]), chunk_size=2, z=z)
        return y, after.theta, after.h, after.k

    if kind == "siso":  # v_spread is None there: hand it in its place
        flags = [None, *flags[-1:]]
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    assert torch.autograd.gradcheck(run, (*tensors, *state))


def test_the_gate_inside_the_scan_is_silu_outside() -> None:
    layer = layer_of("siso")
    inputs = scan_inputs(layer, 19)
    z = torch.randn(2, 19, layer.nheads, layer.headdim, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 19, 1, layer.nheads, layer.headdim, dtype=torch.float64)
    leaves = [z, *(x for x in inputs if isinstance(x, Tensor))]
    inside = chunked_scan(inputs, None, 7, z)[0]
    outside = sequential_scan(inputs)[0] * F.silu(z).unsqueeze(2)
    assert relative(inside, outside) < 1e-9
    for a, b in zip(
        torch.autograd.grad((inside * weights).sum(), leaves),
        torch.autograd.grad((outside * weights).sum(), leaves),
        strict=True,
    ):
        assert relative(a, b) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_sequence_continues(kind: str) -> None:
    layer = layer_of(kind)
    u = torch.randn(2, 37, 24, dtype=torch.float64)
    whole, last = layer(u, return_state=True)
    for cut in (0, 1, 18, 36, 37):
        first, state = layer(u[:, :cut], return_state=True)
        second, state = layer(u[:, cut:], state=state, return_state=True)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)
        assert_same_state(state, last)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_forward(kind: str) -> None:
    layer = layer_of(kind)
    u = torch.randn(3, 29, 24, dtype=torch.float64)
    whole, last = layer(u, return_state=True)
    state = layer.initial_state(3, dtype=torch.float64)
    for t in range(29):
        y_t, state = layer.step(u[:, t], state)
        torch.testing.assert_close(y_t, whole[:, t], rtol=1e-10, atol=1e-10)
    assert_same_state(state, last)


def assert_same_state(found: Mamba3State, expected: Mamba3State, tolerance: float = 1e-9) -> None:
    turn = torch.remainder(found.theta - expected.theta + torch.pi, 2 * torch.pi) - torch.pi
    assert turn.abs().max() < tolerance
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_long_decoding_keeps_the_angles_exact() -> None:
    """5,000 tokens in float32: the phase is still right at the end."""
    exact = layer_of("siso", d_model=8, d_state=4, headdim=8, expand=1)
    rough = copy.deepcopy(exact).float()
    u = torch.randn(1, 5000, 8, dtype=torch.float64)
    _, expected = exact(u, return_state=True)
    _, found = rough(u.float(), return_state=True)
    assert found.theta.min() >= 0
    assert found.theta.max() < 2 * torch.pi
    turn = torch.remainder(found.theta - expected.theta + torch.pi, 2 * torch.pi) - torch.pi
    assert turn.abs().max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_is_close(kind: str) -> None:
    torch.manual_seed(0)
    layer = Mamba3(64, d_state=32, headdim=16, **KINDS[kind])
    u = torch.randn(2, 100, 64, requires_grad=True)
    expected = layer(u)
    expected_gradient = torch.autograd.grad(expected.square().sum(), u)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(u, return_state=True)
        y_t, _ = layer.step(u[:, 0], state)
    gradient = torch.autograd.grad(y.float().square().sum(), u)[0]
    assert y.dtype == torch.bfloat16
    assert state.theta.dtype == state.h.dtype == torch.float32
    assert y_t.isfinite().all()
    assert relative(y.float(), expected) < 2e-2
    assert relative(gradient, expected_gradient) < 5e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extreme", ["zeros", "1e3", "1e4", "huge dt", "tiny dt", "forgetting", "fast turns"])
def test_extreme_inputs_have_finite_gradients(kind: str, extreme: str) -> None:
    layer = layer_of(kind, torch.float32)
    u = torch.randn(2, 70, 24)
    names = ["z", "x", "B", "C", "dt", "A", "trap", "angle"]
    rows = dict(zip(names, layer.in_proj.weight.split(layer.split_sizes), strict=True))
    with torch.no_grad():
        match extreme:
            case "zeros":
                u.zero_()
            case "1e3" | "1e4":
                u *= float(extreme)
            case "huge dt":
                layer.dt_bias += 1e4
            case "tiny dt":
                layer.dt_bias -= 1e4
            case "forgetting":
                rows["A"] *= 1e4
            case "fast turns":
                rows["angle"] *= 1e6
    u.requires_grad_()
    y, state = layer(u, return_state=True)
    y.square().mean().backward()
    assert all(x.isfinite().all() for x in (y, *state, u.grad))
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_a_token_that_forgets_everything_leaves_the_others_precise() -> None:
    """One decay of e^-100000 in the middle of a chunk of slow decays, in float32 against float64."""
    layer = layer_of("siso", torch.float32)
    inputs = scan_inputs(layer, 60)
    with torch.no_grad():
        inputs.log_alpha.mul_(0.01)
        inputs.log_alpha[:, 20] = -1e5
    wide = ScanInputs(*(x.double() if isinstance(x, Tensor) else x for x in inputs))
    assert relative(chunked_scan(inputs)[0].double(), sequential_scan(wide)[0]) < 1e-4


def test_the_future_changes_nothing() -> None:
    layer = layer_of("siso")
    u = torch.randn(1, 90, 24, dtype=torch.float64)
    changed = torch.cat([u[:, :40], torch.randn(1, 50, 24, dtype=torch.float64)], 1)
    torch.testing.assert_close(layer(changed)[:, :40], layer(u)[:, :40], rtol=0, atol=1e-12)


def test_empty_batch_and_empty_sequence() -> None:
    layer = layer_of("siso")
    empty = torch.empty(0, 5, 24, dtype=torch.float64)
    assert layer(empty).shape == (0, 5, 24)
    state = state_of(layer, 2)
    y, after = layer(torch.empty(2, 0, 24, dtype=torch.float64), state=state, return_state=True)
    assert y.shape == (2, 0, 24)
    for a, b in zip(after, state, strict=True):
        assert torch.equal(a, b)


def test_runs_without_gradients() -> None:
    layer = layer_of("siso", torch.float32)
    u = torch.randn(2, 33, 24)
    expected = layer(u)
    with torch.no_grad():
        torch.testing.assert_close(layer(u), expected)
    with torch.inference_mode():
        torch.testing.assert_close(layer(u), expected)


@pytest.mark.parametrize("L", [20, 100])
def test_compiles(L: int) -> None:
    """Few chunks are traced, many are left to eager; the compiler itself is not under test."""
    layer = layer_of("siso", torch.float32)
    compiled = torch.compile(layer, backend="aot_eager")
    u = torch.randn(2, L, 24, requires_grad=True)
    expected = torch.autograd.grad(layer(u).square().sum(), [u, *layer.parameters()])
    found = torch.autograd.grad(compiled(u).square().sum(), [u, *layer.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-5


def test_initial_values_follow_the_reference() -> None:
    torch.manual_seed(0)
    layer = Mamba3(512, is_mimo=True, mimo_rank=4)
    dt = F.softplus(layer.dt_bias)
    assert 1e-3 <= dt.min() < 3e-3
    assert 3e-2 < dt.max() <= 1e-1
    for parameter, value in (
        (layer.B_bias, 1),
        (layer.C_bias, 1),
        (layer.D, 1),
        (layer.mimo_x, 0.25),
        (layer.mimo_o, 0.25),
        (layer.mimo_z, 1),
    ):
        assert (parameter == value).all()
    assert layer.in_proj.weight.shape == (2 * 1024 + 2 * 4 * 128 + 3 * 16 + 32, 512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 24, "headdim": 7}, "multiple of headdim 7"),
        ({"d_model": 24, "headdim": 6, "ngroups": 3}, "ngroups 3"),
        ({"d_model": 24, "headdim": 6, "rope_fraction": 0.7}, "0.5 or 1.0"),
        ({"d_model": 24, "headdim": 6, "d_state": 2}, "d_state 2"),
        ({"d_model": 24, "headdim": 6, "d_state": 9, "is_mimo": True}, "even d_state"),
        ({"d_model": 24, "headdim": 6, "a_activation": "relu"}, "heavy_tail or softplus"),
        ({"d_model": 24, "headdim": 6, "chunk_size": 0}, "chunk_size"),
    ],
)
def test_impossible_sizes_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mamba3(**arguments)


def test_wrong_inputs_are_named() -> None:
    layer = layer_of("siso", torch.float32)
    with pytest.raises(UserError, match=r"\(2, 5, 23\), expected \(batch, length, 24\)"):
        layer(torch.zeros(2, 5, 23))
    with pytest.raises(UserError, match=r"expected \(batch, 24\)"):
        layer.step(torch.zeros(2, 5, 24), layer.initial_state(2))
    with pytest.raises(UserError, match=r"state.h has shape \(3, 8, 6, 8\)"):
        layer(torch.zeros(2, 5, 24), state=layer.initial_state(3))


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(6, eps=1e-3, group_size=3)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7.0))
    x = torch.randn(4, 6)
    groups = x.view(4, 2, 3)
    expected = (groups / (groups.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()).view(4, 6) * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def backbone() -> Mamba3Backbone:
    torch.manual_seed(0)
    layer = Mamba3Config(d_model=24, d_state=8, headdim=6)
    return Mamba3Backbone(BackboneConfig(n_layers=3, layer=layer)).double()


def test_backbone_is_a_gated_pre_norm_residual_stack() -> None:
    stack = backbone()
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    h = x
    for i in range(3):
        h = h * (i + 1)
        h = h + stack.layers[i](stack.norms[i](h))
    expected = stack.final_norm(h)
    torch.testing.assert_close(stack(x, gate=lambda i, h: h * (i + 1)), expected)


def test_backbone_continues_and_steps() -> None:
    stack = backbone()
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    gate = lambda i, h: h * torch.sigmoid(h + i)  # noqa: E731
    whole = stack(x, gate=gate)
    first, state = stack(x[:, :7], gate=gate, return_state=True)
    second = stack(x[:, 7:], gate=gate, state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)
    state = stack.initial_state(2)
    for t in range(20):
        y_t, state = stack.step(x[:, t], state, gate=gate)
        torch.testing.assert_close(y_t, whole[:, t], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_checkpointed_activations_keep_less_and_change_no_bit(bidirectional: bool) -> None:
    torch.manual_seed(0)
    backbone = Mamba3Backbone(preset("tiny").predictor, bidirectional)
    x, scale = torch.randn(3, 40, 64), torch.rand(64, requires_grad=True)
    mask = torch.arange(40) < torch.tensor([[40], [25], [1]])
    results, kept = [], []
    for each in (False, True):
        backbone.checkpoint_activations = each
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            y = backbone(x, gate=lambda _, h: h * scale, mask=mask)
        kept.append(sum(sizes))
        backbone.zero_grad()
        scale.grad = None
        y.square().sum().backward()
        results.append([y.detach(), scale.grad, *(parameter.grad for parameter in backbone.parameters())])
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))
    assert kept[1] < kept[0] / 5
