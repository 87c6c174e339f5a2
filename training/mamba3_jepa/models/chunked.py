"""The Mamba-3 scan as matrix products over chunks, for training and prefill.

With a_t the decay from the start of a chunk to its token t, the recurrence of `scan.py` unrolls within the
chunk to

    y_t = a_t Q_t h + sum_{s <= t} M_ts (Q_t . K_s) V_s + D V_t
    h'  = a_C h     + sum_s (a_C / a_s) w_s K_s V_s

with w_s = lambda_s dt_s + (1 - lambda_{s+1}) dt_{s+1}: what token s adds by its own step and, one token
later, by the trapezoid. M_ts is (a_t / a_s) w_s below the diagonal and lambda_t dt_t on it, where the second
share has not arrived yet. So the h between two chunks already holds the next token's share of the last K V.

The chunks follow one another, and only the inputs, the output and the states between chunks are kept: the
backward pass, written by hand, builds each chunk again. On a CPU a chunk's tensors live in the cache from
first to last use.

Shape letters: B batch, L length, H heads, G groups of heads, R ranks, N state size, P head size, S rotated
pairs, C tokens of one chunk; X = C R rows, one per token and rank, tokens outermost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba3_jepa.models.scan import (
    TWO_PI,
    Mamba3State,
    ScanInputs,
    biased_and_rotated,
    rotation_order,
    spread,
    zero_state,
)

# exp(-40) per token and exp(-60) over several are zero beside anything they meet. Without the first bound,
# one token that forgets everything takes the precision of the cumulative sum away from the tokens after it;
# without the second, denormal numbers make a CPU crawl.
MIN_LOG_DECAY = -40.0
MIN_LOG_CHUNK_DECAY = -60.0

MAX_COMPILED_CHUNKS = 8


def chunked_scan(
    inputs: ScanInputs,
    state: Mamba3State | None = None,
    chunk_size: int = 64,
    z: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Mamba3State | None]:
    """`sequential_scan` in chunks of `chunk_size` tokens: any length, time and memory linear in it.

    Args:
        inputs: as for `sequential_scan`.
        state: the state to continue from; zeros if None.
        chunk_size: tokens per chunk; changes speed, not results.
        z: (B, L, H, P), only with R = 1: the output is multiplied by silu(z) while it is in the cache.
        return_state: False leaves out the state's last few operations and returns None for it.

    Returns:
        y (B, L, R, H, P) and the state after the last token.
    """
    B, L, R, _, N = inputs.q.shape
    if L == 0:
        return inputs.v.new_empty(B, 0, R, *inputs.v.shape[2:]), zero_state(inputs) if state is None else state
    log_alpha, dt, trapezoid = (x.transpose(1, 2) for x in (inputs.log_alpha, inputs.dt, inputs.trapezoid))
    now = trapezoid * dt  # (B, H, L)
    later = dt - now
    order = torch.tensor(rotation_order(N, inputs.angle.shape[-1], inputs.interleaved), device=inputs.q.device)
    chunk_size = _even_chunk_size(L, min(chunk_size, _balanced_chunk_size(inputs)))
    theta = h = None
    if state is not None:
        last_kv = torch.einsum("brhp,brhn->bhpn", spread(state.v, inputs.v_spread), state.k)
        theta, h = state.theta, state.h + later[:, :, 0, None, None] * last_kv
    y, theta, h = _apply(
        L // chunk_size,
        chunk_size,
        return_state,
        order,
        theta,
        h,
        inputs.q,
        inputs.k,
        inputs.v,
        None if z is None else z.to(inputs.v.dtype),
        inputs.q_bias,
        inputs.k_bias,
        inputs.v_spread,
        inputs.skip,
        log_alpha.clamp(min=MIN_LOG_DECAY),
        dt,
        now + F.pad(later[..., 1:], (0, 1)),
        now,
        inputs.omega,
    )
    if not return_state:
        return y, None
    k_last = biased_and_rotated(inputs.k[:, -1], inputs.k_bias, theta, inputs.interleaved)
    return y, Mamba3State(theta, h, k_last, inputs.v[:, -1])


def _apply(n_chunks: int, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """torch.compile unrolls the loop over chunks: it gets a few of them, and leaves more alone."""
    if torch.compiler.is_compiling() and n_chunks > MAX_COMPILED_CHUNKS:
        return _apply_uncompiled(*arguments)
    return _ChunkedScan.apply(*arguments)


@torch.compiler.disable
def _apply_uncompiled(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _ChunkedScan.apply(*arguments)


def _balanced_chunk_size(inputs: ScanInputs) -> int:
    """Where a token's work within the chunk, 2 C (N + P), equals its work with the states, 4 N P: beyond it,
    a longer chunk only costs.
    """
    N, P = inputs.q.shape[-1], inputs.v.shape[-1]
    return max(1, 2 * N * P // (N + P))


def _even_chunk_size(length: int, chunk_size: int) -> int:
    """The size at most `chunk_size` that cuts the length into as few chunks, of much the same length."""
    return math.ceil(length / math.ceil(length / chunk_size))


class _Sequence(NamedTuple):
    """The tensors a scan runs over, or their gradients."""

    q: Tensor  # (B, L, R, G, N) in rotation_order
    k: Tensor  # (B, L, R, G, N) in rotation_order
    v: Tensor  # (B, L, H, P)
    z: Tensor | None  # (B, L, H, P)
    q_bias: Tensor  # (H, R, N) in rotation_order
    k_bias: Tensor  # (H, R, N) in rotation_order
    v_spread: Tensor | None  # (H, R, P)
    skip: Tensor  # (H,)
    log_alpha: Tensor  # (B, H, L)
    dt: Tensor  # (B, H, L)
    weight: Tensor  # (B, H, L)
    now: Tensor  # (B, H, L)
    omega: Tensor  # (B, L, S)

    def map(self, function: Callable[[Tensor], Tensor]) -> _Sequence:
        tensors: list[Any] = [None if x is None else function(x) for x in self]
        return _Sequence(*tensors)

    def reordered(self, order: Tensor) -> _Sequence:
        names = ("q", "k", "q_bias", "k_bias")
        return self._replace(**{name: getattr(self, name).index_select(-1, order) for name in names})


class _Chunk(NamedTuple):
    """What one chunk's matrix products are made of."""

    q: Tensor  # (B, H, X, N) biased and rotated
    k: Tensor  # (B, H, X, N) biased and rotated
    v: Tensor  # (B, H, X, P)
    cos: Tensor  # (B, H, C, 1, S)
    sin: Tensor  # (B, H, C, 1, S)
    theta: Tensor  # (B, H, S) after the chunk
    from_start: Tensor  # (B, H, X, 1) a_t
    to_end: Tensor  # (B, H, X, 1) a_C / a_s
    weight: Tensor  # (B, H, X, 1) w_s
    through: Tensor  # (B, H, 1, 1) a_C
    decay: Tensor  # (B, H, C, C) a_t / a_s below the diagonal, else 0
    mask: Tensor  # (B, H, C, C) M
    scores: Tensor  # (B, H, X, X) Q K^T


def _build_chunk(seq: _Sequence, s: slice, theta: Tensor) -> _Chunk:
    """The chunk of tokens `s` that starts from the angles theta (B, H, S)."""
    R = seq.q.shape[2]
    turns = seq.dt[:, :, s, None] * seq.omega[:, None, s]
    turns[:, :, 0] += theta
    angles = turns.cumsum(2)
    cos, sin = angles.cos().unsqueeze(3), angles.sin().unsqueeze(3)
    q = _rotate_(_for_heads(seq.q[:, s], seq.q_bias), cos, sin).flatten(2, 3)
    k = _rotate_(_for_heads(seq.k[:, s], seq.k_bias), cos, sin).flatten(2, 3)
    a = seq.log_alpha[..., s].cumsum(-1)
    decay = (a.unsqueeze(-1) - a.unsqueeze(-2)).clamp_(MIN_LOG_CHUNK_DECAY, 0).exp_().tril_(-1)
    mask = decay * seq.weight[:, :, None, s]
    mask.diagonal(dim1=-2, dim2=-1).copy_(seq.now[..., s])
    a_end = a[..., -1:]
    return _Chunk(
        q=q,
        k=k,
        v=_values(seq, s),
        cos=cos,
        sin=sin,
        theta=torch.remainder(angles[:, :, -1], TWO_PI),
        from_start=_per_row(a.clamp(min=MIN_LOG_CHUNK_DECAY).exp_(), R),
        to_end=_per_row((a_end - a).clamp_(min=MIN_LOG_CHUNK_DECAY).exp_(), R),
        weight=_per_row(seq.weight[..., s], R),
        through=a_end.unsqueeze(-1).clamp(min=MIN_LOG_CHUNK_DECAY).exp_(),
        decay=decay,
        mask=mask,
        scores=q @ k.mT,
    )


def _for_heads(x: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, R, G, N) for every head, plus bias (H, R, N): a fresh (B, H, C, R, N)."""
    G = x.shape[3]
    return (x.permute(0, 3, 1, 2, 4).unsqueeze(2) + bias.unflatten(0, (G, -1)).unsqueeze(2)).flatten(1, 2)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, direction: int = 1) -> Tensor:
    """Turns x (..., N), in rotation order, in place; back with `direction` -1."""
    S = cos.shape[-1]
    first, second = x[..., :S], x[..., S : 2 * S]
    unturned = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-direction)
    second.mul_(cos).addcmul_(unturned, sin, value=direction)
    return x


def _values(seq: _Sequence, s: slice) -> Tensor:
    """V (B, H, X, P), spread over the ranks."""
    v = seq.v[:, s].transpose(1, 2)
    if seq.v_spread is None:
        return v.contiguous()
    return (v.unsqueeze(3) * seq.v_spread.unsqueeze(1)).flatten(2, 3)


def _per_row(x: Tensor, R: int) -> Tensor:
    """(B, H, C) -> (B, H, X, 1)."""
    return (x if R == 1 else x.repeat_interleave(R, dim=-1)).unsqueeze(-1)


def _per_token(x: Tensor, R: int) -> Tensor:
    """(B, H, X) -> (B, H, C), summed over the ranks."""
    return x if R == 1 else x.unflatten(-1, (-1, R)).sum(-1)


def _masked_(x: Tensor, mask: Tensor, R: int) -> Tensor:
    """x (B, H, X, X) times mask (B, H, C, C), in place."""
    if R == 1:
        return x.mul_(mask)
    x.unflatten(-1, (-1, R)).unflatten(2, (-1, R)).mul_(mask[:, :, :, None, :, None])
    return x


class _ChunkedScan(torch.autograd.Function):
    """(theta, h, sequence) -> (y (B, L, R, H, P), theta (B, H, S), h (B, H, P, N)) after the last token.

    No h to start from is zero, and the last one is computed only if it is wanted (else it is empty): a sequence
    of one chunk then has no products with states at all.

    The backward pass takes the gradient of the log decays from two products that are there anyway: scaling
    a_t up scales y_t's terms from the past, so sum_t' >= t of (dy . y - v . dv) collects it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        chunk_size: int,
        wants_state: bool,
        order: Tensor,
        theta: Tensor | None,
        h: Tensor | None,
        *sequence: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        seq = _Sequence(*sequence).reordered(order)
        B, L, R = seq.q.shape[:3]
        H, P = seq.v.shape[2:]
        ctx.has_state = h is not None
        theta = seq.v.new_zeros(B, H, seq.omega.shape[-1]) if theta is None else theta
        h = None if h is None else h.index_select(-1, order)
        y = seq.v.new_empty(B, L, R, H, P)
        out = y if seq.z is None else torch.empty_like(y)
        before = []
        for start in range(0, L, chunk_size):
            s = slice(start, min(start + chunk_size, L))
            before += [theta, h]
            x = _build_chunk(seq, s, theta)
            theta = x.theta
            y_rows = _masked_(x.scores, x.mask, R) @ x.v
            y_rows.addcmul_(seq.skip[:, None, None], x.v)
            if h is not None:
                y_rows.addcmul_(x.from_start, x.q @ h.mT)
            if wants_state or s.stop < L:
                added = (x.v * x.weight * x.to_end).mT
                h = added @ x.k if h is None else _add_product_(x.through * h, added, x.k)
            y[:, s] = y_rows.unflatten(2, (-1, R)).permute(0, 2, 3, 1, 4)
            if seq.z is not None:
                out[:, s, 0] = F.silu(seq.z[:, s]).mul_(y[:, s, 0])
        ctx.save_for_backward(order, y, h, *before, *seq)
        ctx.chunk_size, ctx.wants_state = chunk_size, wants_state
        if h is None or not wants_state:
            return out, theta, seq.v.new_empty(0)
        return out, theta, h.index_select(-1, order.argsort())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dtheta: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: checkpointed activations are computed for it
        order, y, h, *before = saved[: -len(_Sequence._fields)]
        seq = _Sequence(*saved[-len(_Sequence._fields) :])
        R, L, S = seq.q.shape[2], seq.q.shape[1], seq.omega.shape[-1]
        grad = seq.map(torch.zeros_like)
        dbefore = dh.index_select(-1, order) if ctx.wants_state else None
        for i, start in reversed(list(enumerate(range(0, L, ctx.chunk_size)))):
            s = slice(start, min(start + ctx.chunk_size, L))
            leave, dleave = h, dbefore
            theta, h = before[2 * i : 2 * i + 2]
            x = _build_chunk(seq, s, theta)
            dy = dout[:, s]
            if seq.z is not None and grad.z is not None:
                z = seq.z[:, s]
                grad.z[:, s] = torch.ops.aten.silu_backward(dy[:, :, 0] * y[:, s, 0], z)
                dy = dy * F.silu(z).unsqueeze(2)
            dy = dy.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()
            y_rows = y[:, s].permute(0, 3, 1, 2, 4).flatten(2, 3)

            dy_start = dy * x.from_start
            v_end = x.v * x.to_end
            dattn = dy @ x.v.mT
            dmask = x.scores * dattn
            attn = _masked_(x.scores, x.mask, R)
            dv = attn.mT @ dy
            dv.addcmul_(seq.skip[:, None, None], dy)
            dscores = _masked_(dattn, x.mask, R)
            dq = dscores @ x.k
            dk = dscores.mT @ x.q

            if R > 1:
                dmask = dmask.unflatten(-1, (-1, R)).unflatten(2, (-1, R)).sum((3, 5))
            grad.now[..., s] = dmask.diagonal(dim1=-2, dim2=-1)
            grad.weight[..., s] = dmask.mul_(x.decay).sum(-2)
            if dleave is not None:  # through the state after the chunk
                kh = x.k @ dleave.mT
                dv.addcmul_(x.to_end * x.weight, kh)
                dk = _add_product_(dk, v_end * x.weight, dleave)
                grad.weight[..., s] += _per_token((v_end * kh).sum(-1), R)
            if h is not None:  # through the state before it
                dq = _add_product_(dq, dy_start, h)
                carried = dy_start.mT @ x.q
                dbefore = carried if dleave is None else carried.addcmul_(x.through, dleave)
            grad.skip.add_((dy * x.v).sum((0, 2, 3)))
            da = _per_token((dy * y_rows).sub_(x.v * dv).sum(-1), R)
            if dleave is not None:
                da[..., -1] += (leave * dleave).sum((-1, -2))
            grad.log_alpha[..., s] = _sum_from(da.unsqueeze(-1)).squeeze(-1)

            dangle = (x.q[..., :S] * dq[..., S : 2 * S]).addcmul_(x.q[..., S : 2 * S], dq[..., :S], value=-1)
            dangle.addcmul_(x.k[..., :S], dk[..., S : 2 * S]).addcmul_(x.k[..., S : 2 * S], dk[..., :S], value=-1)
            if R > 1:
                dangle = dangle.unflatten(2, (-1, R)).sum(3)
            dangle[:, :, -1] += dtheta
            dturn = _sum_from(dangle)
            dtheta = dturn[:, :, 0]
            grad.dt[..., s] = (dturn * seq.omega[:, None, s]).sum(-1)
            grad.omega[:, s] = (dturn * seq.dt[:, :, s, None]).sum(1)

            for d, dx, dbias in ((dq, grad.q, grad.q_bias), (dk, grad.k, grad.k_bias)):
                d = _rotate_(d.unflatten(2, (-1, R)), x.cos, x.sin, direction=-1)
                dbias.add_(d.sum((0, 2)))
                dx[:, s] = d.unflatten(1, (dx.shape[3], -1)).sum(2).permute(0, 2, 3, 1, 4)
            dv = dv.unflatten(2, (-1, R))  # (B, H, C, R, P)
            if seq.v_spread is None or grad.v_spread is None:
                grad.v[:, s] = dv.squeeze(3).transpose(1, 2)
            else:
                grad.v[:, s] = (dv * seq.v_spread.unsqueeze(1)).sum(3).transpose(1, 2)
                grad.v_spread.add_((dv * seq.v[:, s].transpose(1, 2).unsqueeze(3)).sum((0, 2)))
        inverse = order.argsort()
        dstate: tuple[Tensor | None, Tensor | None] = (None, None)
        if ctx.has_state and dbefore is not None:
            dstate = (dtheta, dbefore.index_select(-1, inverse))
        return None, None, None, *dstate, *grad.reordered(inverse)


def _add_product_(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x + left @ right in place, over the batch dimensions B and H."""
    x.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))
    return x


def _sum_from(x: Tensor) -> Tensor:
    """x (B, H, C, Y) -> the sums of each token and all after it."""
    C = x.shape[2]
    return torch.ones(C, C, dtype=x.dtype, device=x.device).triu() @ x
