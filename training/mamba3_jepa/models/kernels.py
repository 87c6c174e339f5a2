"""mamba-ssm's fused CUDA kernels: which there are, what they take, and how they are called. `fused.py` decides where
they take the place of the chunked scan.

Contract, from mamba-ssm's `mamba3_siso_combined` (Triton) and `mamba3_mimo` (TileLang): they take the raw
angles and the raw trapezoid logits (tanh, pi and sigmoid are applied inside), heads before tokens for ADT, DT
and Trap, and they compute in bfloat16; so they are used for bfloat16 activations only, and a float32 model
keeps float32 results.

Shape letters: B batch, L length, H heads, G groups, R ranks, N state size, P head size, S rotated pairs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba3_jepa.models.scan import TWO_PI, Mamba3State, ScanInputs, biased_and_rotated

Kernel = Callable[..., Any]

SISO_CHUNK = 64
MIMO_CHUNK_ROWS = 64  # tokens times ranks of a chunk that fit the shared memory
MIMO_STATES, MIMO_HEADS, MIMO_RANKS = (16, 32, 64, 128, 256), (32, 64, 128), (1, 2, 4, 8)
MIMO_BROKEN = ((16, 32), (256, 128))  # (N, P) that do not compile, by the kernel's own notes


@functools.cache
def siso_kernel() -> Kernel | None:
    """`mamba3_siso_combined`, or None without a mamba-ssm that has it with states in and out."""
    kernel = _imported("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined", "mamba3_siso_combined")
    return kernel if _takes(kernel, "Input_States", "return_final_states") else None


@functools.cache
def mimo_kernel() -> Kernel | None:
    """`mamba3_mimo`, or None without one that sums the angles itself, as older ones do not."""
    kernel = _imported("mamba_ssm.ops.tilelang.mamba3.mamba3_mimo", "mamba3_mimo")
    return kernel if _takes(kernel, "cu_seqlens", "return_state") else None


def _imported(module: str, name: str) -> Kernel | None:
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError, RuntimeError):  # not installed, or built for another torch or CUDA
        return None


def _takes(kernel: Kernel | None, *names: str) -> bool:
    return kernel is not None and set(names) <= inspect.signature(kernel).parameters.keys()


def unfit(inputs: ScanInputs, state: Mamba3State | None, return_state: bool) -> str | None:
    """Why `fused_scan` cannot take these inputs, in a few words; None if it can, as far as sizes tell."""
    if inputs.v_spread is None:
        reason = siso_unfit(inputs)
        return reason or (None if siso_kernel() else missing("SISO"))
    reason = mimo_unfit(inputs, state, return_state)
    return reason or (None if mimo_kernel() else missing("MIMO"))


def missing(kind: str) -> str:
    """Why there is no kernel of a kind, "SISO" or "MIMO"."""
    return f"mamba-ssm is not installed, or has no {kind} kernel that fits"


def siso_unfit(inputs: ScanInputs) -> str | None:
    """Sizes: powers of two of at least 16, an even number of angles; offsets that fit 32 bits."""
    N, P, S = inputs.q.shape[-1], inputs.v.shape[-1], inputs.angle.shape[-1]
    if not all(size >= 16 and size & (size - 1) == 0 for size in (N, P)) or S % 2:
        return f"d_state {N} and headdim {P} must be powers of two from 16 on, and the angles ({S}) even"
    return _too_large(inputs)


def mimo_unfit(inputs: ScanInputs, state: Mamba3State | None, return_state: bool) -> str | None:
    """Sizes the kernel was tested with; no state in, and none out while its gradient may be wanted."""
    R, N, P = inputs.q.shape[2], inputs.q.shape[-1], inputs.v.shape[-1]
    if N not in MIMO_STATES or P not in MIMO_HEADS or R not in MIMO_RANKS or (N, P) in MIMO_BROKEN:
        return f"the MIMO kernel was not made for d_state {N}, headdim {P} and {R} ranks"
    if state is not None or (return_state and torch.is_grad_enabled()):
        return "the MIMO kernel takes no state, and gives none that has a gradient"
    return _too_large(inputs)


def _too_large(inputs: ScanInputs) -> str | None:
    """Beyond 2^31 elements of one tensor the kernels' offsets may overflow."""
    B, L, H, P = inputs.v.shape
    states = B * H * P * inputs.q.shape[-1] * -(-L // SISO_CHUNK)
    return f"a batch of {B} x {L} tokens is too large for it" if max(inputs.v.numel(), states) >= 2**31 else None


def fused_scan(
    inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None, return_state: bool
) -> tuple[Tensor, Mamba3State | None]:
    """As `chunked_scan`, by the fused kernel; call it only when `unfit` has nothing to say."""
    if inputs.v_spread is None:
        kernel = siso_kernel()
        run = run_siso
    else:
        kernel = mimo_kernel()
        run = run_mimo
    if kernel is None:
        raise RuntimeError("fused_scan was called without its kernel; ask unfit() first")
    y, h = run(kernel, inputs, state, z, return_state)
    return y, _final_state(inputs, state, h) if h is not None else None


def run_siso(
    kernel: Kernel, inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """y (B, L, 1, H, P), gated by silu(z) if z is given, and h (B, H, P, N) if asked for."""
    input_states = None
    if state is not None:
        input_states = tuple(x.float().contiguous() for x in (state.theta, state.h, state.k.squeeze(1), state.v))
    out = kernel(
        Q=inputs.q.squeeze(2).bfloat16(),
        K=inputs.k.squeeze(2).bfloat16(),
        V=inputs.v.bfloat16(),
        ADT=_heads_first(inputs.log_alpha),
        DT=_heads_first(inputs.dt),
        Trap=_heads_first(inputs.trap).bfloat16(),
        Q_bias=inputs.q_bias.squeeze(1).float(),
        K_bias=inputs.k_bias.squeeze(1).float(),
        Angles=_angles_of_heads(inputs),
        D=inputs.skip.float(),
        Z=None if z is None else z.bfloat16(),
        Input_States=input_states,
        chunk_size=SISO_CHUNK,
        return_final_states=return_state,
    )
    y, h = (out[0], out[2]) if return_state else (out, None)
    return y.unsqueeze(2), h


def run_mimo(
    kernel: Kernel, inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """y (B, L, R, H, P), neither gated nor gathered, and h (B, H, P, N) if asked for."""
    if state is not None or z is not None or inputs.v_spread is None:
        raise ValueError("the MIMO kernel starts from zeros and is gated outside")
    L, R, N = inputs.q.shape[1], inputs.q.shape[2], inputs.q.shape[-1]
    chunk_size = max(8, MIMO_CHUNK_ROWS // R)
    padded = _padded(inputs, -L % chunk_size)
    spread = inputs.v_spread.float().contiguous()
    out = kernel(
        Q=padded.q.bfloat16(),
        K=padded.k.bfloat16(),
        V=padded.v.bfloat16(),
        ADT=_heads_first(padded.log_alpha),
        DT=_heads_first(padded.dt),
        Trap=_heads_first(padded.trap).bfloat16(),
        Q_bias=inputs.q_bias.float(),
        K_bias=inputs.k_bias.float(),
        MIMO_V=spread,
        MIMO_Z=torch.ones_like(spread),
        MIMO_Out=None,
        Angles=_angles_of_heads(padded),
        D=inputs.skip.float(),
        Z=None,
        chunk_size=chunk_size,
        rotary_dim_divisor=N // inputs.angle.shape[-1],
        dtype=torch.bfloat16,
        return_state=return_state,
    )
    y, h = (out[0], out[2]) if return_state else (out, None)
    return y[:, :L], h


def _heads_first(x: Tensor) -> Tensor:
    """(B, L, H) -> contiguous (B, H, L), float32."""
    return x.float().transpose(1, 2).contiguous()


def _angles_of_heads(inputs: ScanInputs) -> Tensor:
    """(B, L, S) -> (B, L, H, S), float32."""
    return inputs.angle.float().unsqueeze(2).expand(-1, -1, inputs.v.shape[2], -1)


def _padded(inputs: ScanInputs, count: int) -> ScanInputs:
    """`count` more tokens at the end with dt = 0: they neither decay, nor turn, nor write."""
    if count == 0:
        return inputs
    per_token = ("q", "k", "v", "log_alpha", "dt", "trap", "angle")
    longer: dict[str, Any] = {}
    for name in per_token:
        x = getattr(inputs, name)
        longer[name] = F.pad(x, (0, 0) * (x.dim() - 2) + (0, count))
    return inputs._replace(**longer)


def _final_state(inputs: ScanInputs, state: Mamba3State | None, h: Tensor) -> Mamba3State:
    """The kernels round their final angles to bfloat16, so theta and K of the last token are made here."""
    turned = torch.einsum("blh,bls->bhs", inputs.dt, inputs.omega)
    theta = torch.remainder(turned if state is None else turned + state.theta, TWO_PI)
    k_last = biased_and_rotated(inputs.k[:, -1], inputs.k_bias, theta, inputs.interleaved)
    return Mamba3State(theta, h.float(), k_last, inputs.v[:, -1].to(k_last.dtype))
