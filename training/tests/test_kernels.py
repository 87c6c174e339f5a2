"""The way into mamba-ssm's fused kernels, with stand-ins that keep the kernels' documented contract."""

from __future__ import annotations

import pytest
import torch
from test_mamba3 import assert_same_state, layer_of, relative, scan_inputs, state_of
from torch import Tensor

from mamba3_jepa.models import kernels, mamba3
from mamba3_jepa.models.fused import Fused
from mamba3_jepa.models.scan import Mamba3State, ScanInputs, sequential_scan

BFLOAT16_ERROR = 3e-2


def reference(**changes: object) -> ScanInputs:
    """`ScanInputs` of a kernel's arguments, in float64."""
    return ScanInputs(**{n: x.double() if isinstance(x, Tensor) else x for n, x in changes.items()})


def fake_siso(
    Q,
    K,
    V,
    ADT,
    DT,
    Trap,
    Q_bias,
    K_bias,
    Angles,
    D=None,
    Z=None,
    Input_States=None,
    chunk_size=64,
    return_final_states=False,
    cu_seqlens=None,
):
    """Raw angles and logits in; ADT, DT, Trap heads first; (out, theta, h, k, v) out."""
    B, L, G, N = Q.shape
    H, P = V.shape[2:]
    S = Angles.shape[-1]
    assert K.shape == Q.shape
    assert ADT.shape == DT.shape == Trap.shape == (B, H, L)
    assert Q_bias.shape == K_bias.shape == (H, N)
    assert Angles.shape == (B, L, H, S)
    assert {x.dtype for x in (Q, K, V, Trap)} == {torch.bfloat16}
    assert {x.dtype for x in (ADT, DT, Q_bias, K_bias, D)} == {torch.float32}
    assert chunk_size == 64
    assert H % G == 0
    inputs = reference(
        q=Q.unsqueeze(2),
        k=K.unsqueeze(2),
        v=V,
        q_bias=Q_bias.unsqueeze(1),
        k_bias=K_bias.unsqueeze(1),
        log_alpha=ADT.transpose(1, 2),
        dt=DT.transpose(1, 2),
        trap=Trap.transpose(1, 2),
        angle=Angles[:, :, 0],
        skip=D,
        v_spread=None,
        interleaved=True,
    )
    state = None
    if Input_States is not None:
        theta, h, k, v = (x.double() for x in Input_States)
        assert (theta.shape, h.shape) == ((B, H, S), (B, H, P, N))
        assert (k.shape, v.shape) == ((B, H, N), (B, H, P))
        state = Mamba3State(theta, h, k.unsqueeze(1), v)
    y, after = sequential_scan(inputs, state)
    y = y.squeeze(2)
    if Z is not None:
        assert Z.dtype == torch.bfloat16
        y = y * torch.nn.functional.silu(Z.double())
    y = y.bfloat16()
    if not return_final_states:
        return y
    return y, after.theta.bfloat16(), after.h.float(), after.k.squeeze(1).float(), after.v.bfloat16()


def fake_mimo(
    Q,
    K,
    V,
    ADT,
    DT,
    Trap,
    Q_bias,
    K_bias,
    MIMO_V,
    MIMO_Z,
    MIMO_Out,
    Angles,
    D,
    Z,
    chunk_size,
    rotary_dim_divisor,
    dtype,
    return_state=False,
    cu_seqlens=None,
):
    _, L, R, _, N = Q.shape
    H, P = V.shape[2:]
    assert L % chunk_size == 0
    assert chunk_size * R <= 64
    assert N // rotary_dim_divisor == Angles.shape[-1]
    assert MIMO_V.shape == MIMO_Z.shape == (H, R, P)
    assert (MIMO_Out, Z, dtype) == (None, None, torch.bfloat16)
    inputs = reference(
        q=Q,
        k=K,
        v=V,
        q_bias=Q_bias,
        k_bias=K_bias,
        log_alpha=ADT.transpose(1, 2),
        dt=DT.transpose(1, 2),
        trap=Trap.transpose(1, 2),
        angle=Angles[:, :, 0],
        skip=D,
        v_spread=MIMO_V,
        interleaved=False,
    )
    y, after = sequential_scan(inputs)
    y = y.bfloat16()
    return (y, after.theta, after.h.float(), after.k.float(), after.v.float()) if return_state else y


def tame(inputs: ScanInputs) -> ScanInputs:
    """Step sizes of training, so that bfloat16 angles stay meaningful."""
    return inputs._replace(
        dt=inputs.dt.detach() * 0.05,
        log_alpha=inputs.log_alpha.detach() * 0.05,
        **{n: getattr(inputs, n).detach() for n in ("q", "k", "v", "trap", "angle")},
    )


@pytest.mark.parametrize("kind", ["siso", "groups"])
@pytest.mark.parametrize("with_state", [False, True])
def test_siso_arguments(kind: str, with_state: bool) -> None:
    layer = layer_of(kind, torch.float32, d_state=16)
    inputs = tame(scan_inputs(layer, 21))
    state = state_of(layer, 2, torch.float32) if with_state else None
    z = torch.randn(2, 21, layer.nheads, layer.headdim)
    expected, after = sequential_scan(inputs, state)
    y, h = kernels.run_siso(fake_siso, inputs, state, z, return_state=True)
    assert relative(y.float(), expected * torch.nn.functional.silu(z).unsqueeze(2)) < BFLOAT16_ERROR
    assert relative(h, after.h) < BFLOAT16_ERROR
    y, h = kernels.run_siso(fake_siso, inputs, state, None, return_state=False)
    assert h is None
    assert relative(y.float(), expected) < BFLOAT16_ERROR


@pytest.mark.parametrize("kind", ["mimo", "mimo_groups_norm"])
def test_mimo_arguments_and_padding(kind: str) -> None:
    layer = layer_of(kind, torch.float32, d_state=16, mimo_rank=2)
    inputs = tame(scan_inputs(layer, 37))  # not a multiple of the kernel's chunk
    expected, after = sequential_scan(inputs)
    y, h = kernels.run_mimo(fake_mimo, inputs, None, None, return_state=True)
    assert y.shape == expected.shape
    assert relative(y.float(), expected) < BFLOAT16_ERROR
    assert relative(h, after.h) < BFLOAT16_ERROR


@pytest.mark.parametrize("kind", ["siso", "mimo"])
def test_the_layer_is_the_same_with_the_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(kind, torch.float32, d_state=16, mimo_rank=2)
    with torch.no_grad():
        layer.dt_bias -= 5
    u = torch.randn(2, 37, 24)
    with torch.no_grad():
        expected, after = layer(u, return_state=True)
        monkeypatch.setattr(kernels, "siso_kernel", lambda: fake_siso)
        monkeypatch.setattr(kernels, "mimo_kernel", lambda: fake_mimo)
        choice = Fused(unfit=lambda *_: None, device_type="cpu")
        monkeypatch.setattr(choice, "may_take", lambda inputs: True)  # in float32, too
        monkeypatch.setattr(mamba3, "fused", choice)
        y, state = layer(u, return_state=True)
    assert relative(y, expected) < BFLOAT16_ERROR
    assert relative(state.h, after.h) < BFLOAT16_ERROR
    exact_but_for_h = state._replace(h=after.h)
    assert_same_state(
        Mamba3State(*(x.double() for x in exact_but_for_h)), Mamba3State(*(x.double() for x in after)), 1e-4
    )


def test_kernels_stay_away_where_they_do_not_fit() -> None:
    inputs = scan_inputs(layer_of("siso", torch.float32, d_state=16), 5)
    assert not Fused().may_take(inputs._replace(v=inputs.v.bfloat16()))  # on the CPU
    assert not Fused(device_type="cpu").may_take(inputs)  # in float32
    assert Fused(device_type="cpu").may_take(inputs._replace(v=inputs.v.bfloat16()))
    assert "headdim 6 must be" in kernels.siso_unfit(inputs)
    wide = scan_inputs(layer_of("siso", torch.float32, d_state=16, headdim=16), 5)
    assert kernels.siso_unfit(wide) is None
    many = wide._replace(v=wide.v[:1, :1].expand(2**15, 2**12, -1, -1))
    assert "a batch of 32768 x 4096 tokens is too large" in kernels.siso_unfit(many)
    mimo = scan_inputs(layer_of("mimo", d_model=32, d_state=32, headdim=32, mimo_rank=4), 5)
    assert "gives none that has a gradient" in kernels.mimo_unfit(mimo, None, return_state=True)
    assert kernels.mimo_unfit(mimo, None, return_state=False) is None
    with torch.no_grad():
        assert kernels.mimo_unfit(mimo, None, return_state=True) is None
        assert "takes no state" in kernels.mimo_unfit(mimo, state_of(layer_of("mimo"), 2), return_state=False)


def test_an_older_kernel_is_not_called() -> None:
    def without_states(Q, K, V, ADT, DT, Trap):
        raise AssertionError("must not be called")

    assert not kernels._takes(without_states, "Input_States", "return_final_states")
    assert kernels._takes(fake_siso, "Input_States", "return_final_states")
    assert kernels._takes(fake_mimo, "cu_seqlens", "return_state")
    assert not kernels._takes(None, "cu_seqlens")
