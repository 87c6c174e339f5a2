"""The Mamba-3 scan: a selective state space recurrence with complex state and trapezoidal input.

Source: "Mamba-3: Improved Sequence Modeling using State Space Principles" (ICLR 2026, arXiv 2603.15569). Per
head, with K and Q the biased and rotated inputs and V the values, token t does

    h_t = alpha_t h_{t-1} + (1 - lambda_t) dt_t alpha_t K_{t-1} V_{t-1} + lambda_t dt_t K_t V_t
    y_t = Q_t h_t + D V_t

`sequential_scan` is these lines in a loop, and what the tests trust; `scan_step` is one turn of it, for
decoding; `chunked_scan` gives the same numbers from matrix products over chunks, for training and prefill
(`chunked.py`).

Shape letters: B batch, L length, H heads, G groups of heads, R ranks (1 unless MIMO), N state size, P head
size, S rotated pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TWO_PI = 2 * math.pi


class Mamba3State(NamedTuple):
    """What a layer remembers between tokens; its size does not depend on how many tokens it has seen.

    Attributes:
        theta: (B, H, S) rotation angles in radians, in [0, 2 pi).
        h: (B, H, P, N) the recurrent state.
        k: (B, R, H, N) the last token's K, biased and rotated.
        v: (B, H, P) the last token's V, before MIMO spreads it.
    """

    theta: Tensor
    h: Tensor
    k: Tensor
    v: Tensor


class ScanInputs(NamedTuple):
    """What one layer hands to its scan, all of one floating point type (float32 or float64).

    Only the fused kernels take v in bfloat16.

    Attributes:
        q, k: (B, L, R, G, N) the normalised C and B, before bias and rotation.
        v: (B, L, H, P) the values x.
        q_bias, k_bias: (H, R, N).
        log_alpha: (B, L, H) logarithm of the decay, A dt, never positive.
        dt: (B, L, H) step sizes, positive.
        trap: (B, L, H) logit of lambda, the weight of the current token against the previous one.
        angle: (B, L, S) angular velocities before tanh, shared by the heads.
        skip: (H,) D.
        v_spread: (H, R, P) spreads V over the ranks (`mimo_x`), or None with R = 1.
        interleaved: True rotates the pairs (2i, 2i + 1), False the pairs (i, i + N/2), i < S.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor
    k_bias: Tensor
    log_alpha: Tensor
    dt: Tensor
    trap: Tensor
    angle: Tensor
    skip: Tensor
    v_spread: Tensor | None
    interleaved: bool

    @property
    def trapezoid(self) -> Tensor:
        """lambda (B, L, H), in [0, 1]."""
        return self.trap.sigmoid()

    @property
    def omega(self) -> Tensor:
        """Angular velocities (B, L, S) in radians per unit of dt, within pi of zero."""
        return math.pi * self.angle.tanh()


def widened(inputs: ScanInputs) -> ScanInputs:
    """With v in the type of everything else."""
    q, k, v, q_bias, k_bias, log_alpha, dt, trap, angle, skip, v_spread, interleaved = inputs
    # not _replace, which torch.compile cannot trace in every version
    return ScanInputs(q, k, v.to(dt.dtype), q_bias, k_bias, log_alpha, dt, trap, angle, skip, v_spread, interleaved)


def zero_state(inputs: ScanInputs) -> Mamba3State:
    """The state before the first token."""
    B, _, R, _, N = inputs.q.shape
    H, P = inputs.v.shape[-2:]
    zeros = inputs.v.new_zeros
    return Mamba3State(zeros(B, H, inputs.angle.shape[-1]), zeros(B, H, P, N), zeros(B, R, H, N), zeros(B, H, P))


def rotation_order(d_state: int, n_angles: int, interleaved: bool) -> list[int]:
    """The order of the N dimensions that puts the first halves of all rotated pairs first, then their second
    halves, then what is not rotated. A product of Q and K does not care about the order, and slices are
    cheaper than strides.
    """
    if interleaved:
        first, second = range(0, 2 * n_angles, 2), range(1, 2 * n_angles, 2)
    else:
        first, second = range(n_angles), range(d_state // 2, d_state // 2 + n_angles)
    rotated = [*first, *second]
    return rotated + sorted(set(range(d_state)) - set(rotated))


def rotate(x: Tensor, theta: Tensor, interleaved: bool) -> Tensor:
    """Turns the pairs of `x` (..., N) by the angles `theta` (..., S); the other dimensions stay.

    The plain form; `chunked.py` has the one that works in `rotation_order`.
    """
    N, S = x.shape[-1], theta.shape[-1]
    cos, sin = theta.cos(), theta.sin()
    if interleaved:
        pairs = x[..., : 2 * S].unflatten(-1, (S, 2))
        first, second = pairs.unbind(-1)
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
        return torch.cat([turned.flatten(-2), x[..., 2 * S :]], dim=-1)
    half = N // 2
    first, second = x[..., :S], x[..., half : half + S]
    return torch.cat(
        [
            first * cos - second * sin,
            x[..., S:half],
            first * sin + second * cos,
            x[..., half + S :],
        ],
        dim=-1,
    )


def spread(v: Tensor, v_spread: Tensor | None) -> Tensor:
    """V (..., H, P) over the ranks: (..., R, H, P)."""
    if v_spread is None:
        return v.unsqueeze(-3)
    return v.unsqueeze(-3) * v_spread.transpose(0, 1)


def biased_and_rotated(x: Tensor, bias: Tensor, theta: Tensor, interleaved: bool) -> Tensor:
    """One token's K or Q for every head: x (B, R, G, N), bias (H, R, N), theta (B, H, S) -> (B, R, H, N)."""
    heads_per_group = bias.shape[0] // x.shape[-2]
    x_brhn = x.repeat_interleave(heads_per_group, dim=-2) + bias.transpose(0, 1)
    return rotate(x_brhn, theta.unsqueeze(1), interleaved)


def scan_step(inputs: ScanInputs, state: Mamba3State) -> tuple[Tensor, Mamba3State]:
    """One token: `inputs` with L = 1. Returns y (B, 1, R, H, P) and the next state."""
    dt, trapezoid, alpha = inputs.dt[:, 0], inputs.trapezoid[:, 0], inputs.log_alpha[:, 0].exp()  # (B, H)
    theta = torch.remainder(state.theta + dt[..., None] * inputs.omega[:, 0, None], TWO_PI)
    k = biased_and_rotated(inputs.k[:, 0], inputs.k_bias, theta, inputs.interleaved)
    q = biased_and_rotated(inputs.q[:, 0], inputs.q_bias, theta, inputs.interleaved)
    v = spread(inputs.v[:, 0], inputs.v_spread)  # (B, R, H, P)
    before = torch.einsum("brhp,brhn->bhpn", spread(state.v, inputs.v_spread), state.k)
    now = torch.einsum("brhp,brhn->bhpn", v, k)
    h = (
        alpha[..., None, None] * (state.h + ((1 - trapezoid) * dt)[..., None, None] * before)
        + (trapezoid * dt)[..., None, None] * now
    )
    y = torch.einsum("bhpn,brhn->brhp", h, q) + inputs.skip[:, None] * v
    return y.unsqueeze(1), Mamba3State(theta, h, k, inputs.v[:, 0])


def sequential_scan(inputs: ScanInputs, state: Mamba3State | None = None) -> tuple[Tensor, Mamba3State]:
    """The recurrence, one token after the other: slow, and the reference.

    Returns:
        y (B, L, R, H, P) and the state after the last token.
    """
    state = zero_state(inputs) if state is None else state
    B, L, R = inputs.q.shape[:3]
    outputs = [inputs.v.new_empty(B, 0, R, *inputs.v.shape[-2:])]
    for t in range(L):
        y, state = scan_step(_token(inputs, t), state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _token(inputs: ScanInputs, t: int) -> ScanInputs:
    names = ("q", "k", "v", "log_alpha", "dt", "trap", "angle")
    return inputs._replace(**{name: getattr(inputs, name)[:, t : t + 1] for name in names})
