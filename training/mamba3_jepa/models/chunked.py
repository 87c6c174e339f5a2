"""The Mamba-3 scan as matrix products over chunks, for training and prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba3_jepa.models.scan import (
    TWO_PI,
    Mamba3State,
    ScanInputs,
    biased_and_rotated,
    rotate,
    spread,
    zero_state,
)

MIN_LOG_DECAY = -40.0


def chunked_scan(
    inputs: ScanInputs, state: Mamba3State | None = None, chunk_size: int = 64
) -> tuple[Tensor, Mamba3State]:
    """The same as `sequential_scan`, from matrix products over chunks of `chunk_size` tokens."""
    state = zero_state(inputs) if state is None else state
    L = inputs.q.shape[1]
    if L == 0:
        return inputs.v.new_empty(inputs.v.shape[0], 0, inputs.q.shape[2], *inputs.v.shape[-2:]), state
    now = inputs.trapezoid * inputs.dt
    carry = inputs.dt - now  # (1 - lambda) dt
    weight = torch.cat([now[:, :-1] + carry[:, 1:], now[:, -1:]], dim=1)
    before = torch.einsum("brhp,brhn->bhpn", spread(state.v, inputs.v_spread), state.k)
    h = state.h + carry[:, 0, :, None, None] * before
    theta = state.theta
    outputs = []
    per_group = inputs.q_bias.shape[0] // inputs.q.shape[3]
    R = inputs.q.shape[2]
    for start in range(0, L, chunk_size):
        s = slice(start, min(start + chunk_size, L))
        dt = inputs.dt[:, s].transpose(1, 2)
        angle = theta.unsqueeze(2) + torch.cumsum(
            dt[..., None] * inputs.omega[:, None, s], dim=2
        )  # (B,H,C,S)
        theta = torch.remainder(angle[:, :, -1], TWO_PI)
        C = angle.shape[2]

        def rows(x: Tensor, bias: Tensor, s: slice = s, angle: Tensor = angle) -> Tensor:
            x_bhcrn = x[:, s].permute(0, 3, 1, 2, 4).repeat_interleave(per_group, dim=1) + bias[:, None]
            return rotate(x_bhcrn, angle.unsqueeze(3), inputs.interleaved).flatten(2, 3)

        q, k = rows(inputs.q, inputs.q_bias), rows(inputs.k, inputs.k_bias)
        v = spread(inputs.v[:, s], inputs.v_spread).permute(0, 3, 1, 2, 4).flatten(2, 3)
        la = inputs.log_alpha[:, s].clamp(min=MIN_LOG_DECAY).transpose(1, 2).cumsum(-1)
        w, g = weight[:, s].transpose(1, 2), now[:, s].transpose(1, 2)
        lower = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1)
        mask = (la[..., :, None] - la[..., None, :]).masked_fill(~lower, -torch.inf).exp() * w[..., None, :]
        mask = mask + torch.diag_embed(g)
        mask = mask.repeat_interleave(R, -1).repeat_interleave(R, -2)
        y = (q @ k.mT * mask) @ v + la.exp().repeat_interleave(R, -1)[..., None] * (q @ h.mT)
        y = y + inputs.skip[:, None, None] * v
        outputs.append(y.unflatten(2, (C, R)).permute(0, 2, 3, 1, 4))
        rest = ((la[..., -1:] - la).exp() * w).repeat_interleave(R, -1)
        h = la[..., -1, None, None].exp() * h + v.mT @ (rest[..., None] * k)
    k_last = biased_and_rotated(inputs.k[:, -1], inputs.k_bias, theta, inputs.interleaved)
    return torch.cat(outputs, 1), Mamba3State(theta, h, k_last, inputs.v[:, -1])
