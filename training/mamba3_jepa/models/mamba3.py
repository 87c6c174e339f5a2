"""The Mamba-3 layer and the residual stack of such layers.

Source: "Mamba-3: Improved Sequence Modeling using State Space Principles" (ICLR 2026, arXiv 2603.15569).
Constructor arguments, parameter names and parameter shapes are those of mamba-ssm's
`mamba_ssm.modules.mamba3.Mamba3`, so a state dict moves either way.

Shape letters: B batch, L length, D model width, H heads, P head size (D_inner = H P), G groups, R ranks (1
unless MIMO), N state size, S rotated pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba3_jepa.config import AActivation, BackboneConfig, Mamba3Config
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.chunked import chunked_scan
from mamba3_jepa.models.fused import fused
from mamba3_jepa.models.gated_mlp import GatedMLP
from mamba3_jepa.models.scan import Mamba3State, ScanInputs, scan_step, widened

__all__ = ["Mamba3", "Mamba3Backbone", "Mamba3State", "RMSNorm"]

BackboneState = list[Mamba3State]
Gate = Callable[[int, Tensor], Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in groups of `group_size` (the whole dimension by
    default).

    Computes in float32 at least and returns the type of x.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = dim if group_size is None else group_size
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        size, weight = (self.group_size,), self.weight.to(wide)
        if self.group_size == x.shape[-1]:
            return F.rms_norm(x.to(wide), size, weight, self.eps).to(x.dtype)
        groups = F.rms_norm(x.to(wide).unflatten(-1, (-1, self.group_size)), size, eps=self.eps)
        return (groups.flatten(-2) * weight).to(x.dtype)


class Mamba3(nn.Module):
    """One Mamba-3 layer: in_proj, scan, gate, out_proj.

    Args:
        d_model: width D of input and output.
        d_state: state size N per head.
        expand: D_inner / D.
        headdim: head size P; D_inner must be a multiple.
        ngroups: groups G of heads that share B and C.
        rope_fraction: share of the state dimensions that rotate, 0.5 or 1.0.
        a_activation: "heavy_tail" as the paper's code has it today, "softplus" as mamba-ssm up to 2.3.2.
        is_mimo: multi-input multi-output form, with `mimo_rank` ranks R.
        is_outproj_norm: grouped RMSNorm of the scan's output, group = head, before the gate.
        chunk_size: tokens per chunk of the fused kernels and the chunked scan.
        dt_min, dt_max, dt_init_floor: range of the initial step sizes.
        A_floor: the decay rate |A| is at least this.

    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        a_activation: AActivation = "heavy_tail",
        is_mimo: bool = False,
        mimo_rank: int = 4,
        is_outproj_norm: bool = False,
        chunk_size: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if a_activation not in ("heavy_tail", "softplus"):
            raise UserError(f"mamba3: a_activation is {a_activation!r}, it must be heavy_tail or softplus")
        if chunk_size < 1:
            raise UserError(f"mamba3: chunk_size is {chunk_size}, it must be at least 1")
        Mamba3Config(
            d_model=d_model, d_state=d_state, expand=expand, headdim=headdim, ngroups=ngroups,
            rope_fraction=rope_fraction, is_mimo=is_mimo,
        ).check("mamba3")  # fmt: skip
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.d_inner = expand * d_model
        self.nheads = self.d_inner // headdim
        self.rope_fraction = rope_fraction
        self.n_angles = int(d_state * rope_fraction) // 2
        self.a_activation, self.A_floor = a_activation, A_floor
        self.is_mimo, self.rank = is_mimo, mimo_rank if is_mimo else 1
        self.is_outproj_norm, self.chunk_size = is_outproj_norm, chunk_size
        H, R, N, P = self.nheads, self.rank, d_state, headdim
        self.split_sizes = [H * P, H * P, R * ngroups * N, R * ngroups * N, H, H, H, self.n_angles]
        self.in_proj = nn.Linear(d_model, sum(self.split_sizes), bias=False, device=device, dtype=dtype)
        self.dt_bias = nn.Parameter(_initial_dt_bias(H, dt_min, dt_max, dt_init_floor, device))
        self.B_bias = nn.Parameter(torch.ones(H, R, N, device=device))
        self.C_bias = nn.Parameter(torch.ones(H, R, N, device=device))
        self.B_norm = RMSNorm(N, device=device, dtype=dtype)
        self.C_norm = RMSNorm(N, device=device, dtype=dtype)
        if is_mimo:
            self.mimo_x = nn.Parameter(torch.full((H, R, P), 1 / R, device=device))
            self.mimo_z = nn.Parameter(torch.ones(H, R, P, device=device))
            self.mimo_o = nn.Parameter(torch.full((H, R, P), 1 / R, device=device))
        self.D = nn.Parameter(torch.ones(H, device=device))
        if is_outproj_norm:
            self.norm = RMSNorm(self.d_inner, group_size=headdim, device=device, dtype=dtype)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, device=device, dtype=dtype)

    def forward(
        self, u: Tensor, state: Mamba3State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Mamba3State]:
        """(B, L, D) -> (B, L, D), continuing from `state`; with `return_state`, also the state after the last
        token.

        Raises:
            UserError: u is not (B, L, d_model), or the state belongs to another batch or layer.
        """
        self._check_input(u, 3, state)
        z, inputs = self._project(u)
        gated_in_scan = not (self.is_mimo or self.is_outproj_norm)
        with torch.autocast(u.device.type, enabled=False):
            z_in_scan = z if gated_in_scan else None
            if fused.may_take(inputs) and fused.takes(inputs, state, z_in_scan, return_state):
                y, state = fused.scan(inputs, state, z_in_scan, return_state)
            else:
                y, state = chunked_scan(widened(inputs), state, self.chunk_size, z_in_scan, return_state)
            y = self._joined(y) if gated_in_scan else self._gate(y, z)
        out = self.out_proj(y)
        return (out, state) if state is not None and return_state else out

    def step(self, u_t: Tensor, state: Mamba3State) -> tuple[Tensor, Mamba3State]:
        """One token: (B, D) -> (B, D) and the next state, in constant time and memory.

        Raises:
            UserError: u_t is not (B, d_model), or the state belongs to another batch or layer.
        """
        self._check_input(u_t, 2, state)
        z, inputs = self._project(u_t.unsqueeze(1))
        with torch.autocast(u_t.device.type, enabled=False):
            y, state = scan_step(widened(inputs), state)
            y = self._gate(y, z)
        return self.out_proj(y).squeeze(1), state

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba3State:
        """The state before the first token: zeros, float32 unless the parameters are wider."""
        device = self.D.device if device is None else device
        dtype = torch.promote_types(self.D.dtype, torch.float32) if dtype is None else dtype
        H, P, N = self.nheads, self.headdim, self.d_state
        shapes = [(H, self.n_angles), (H, P, N), (self.rank, H, N), (H, P)]
        return Mamba3State(*(torch.zeros(batch, *shape, device=device, dtype=dtype) for shape in shapes))

    def _check_input(self, u: Tensor, dims: int, state: Mamba3State | None) -> None:
        if u.dim() != dims or u.shape[-1] != self.d_model:
            expected = "(batch, length, {})" if dims == 3 else "(batch, {})"
            raise UserError(f"mamba3: input has shape {tuple(u.shape)}, expected {expected.format(self.d_model)}")
        expected_h = (u.shape[0], self.nheads, self.headdim, self.d_state)
        if state is not None and state.h.shape != expected_h:
            raise UserError(f"mamba3: state.h has shape {tuple(state.h.shape)}, this layer and batch need {expected_h}")

    def _project(self, u: Tensor) -> tuple[Tensor, ScanInputs]:
        """u (B, L, D) -> z (B, L, H, P) and what the scan needs: x in the type of the projection, which the
        fused kernels want, everything that adds up over time in float32 at least.
        """
        projected = self.in_proj(u)
        wide = torch.promote_types(torch.promote_types(projected.dtype, self.D.dtype), torch.float32)
        with torch.autocast(u.device.type, enabled=False):
            z, x, b, c, dd_dt, dd_a, trap, angle = projected.split(self.split_sizes, dim=-1)
            per_rank = (self.rank, self.ngroups, self.d_state)
            dt = F.softplus(dd_dt.to(wide) + self.dt_bias)
            return z.unflatten(-1, (-1, self.headdim)), ScanInputs(
                q=self.C_norm(c.to(wide).unflatten(-1, per_rank)),
                k=self.B_norm(b.to(wide).unflatten(-1, per_rank)),
                v=x.unflatten(-1, (-1, self.headdim)),
                q_bias=self.C_bias.to(wide),
                k_bias=self.B_bias.to(wide),
                log_alpha=self._decay_rate(dd_a.to(wide)) * dt,
                dt=dt,
                trap=trap.to(wide),
                angle=angle.to(wide),
                skip=self.D.to(wide),
                v_spread=self.mimo_x.to(wide) if self.is_mimo else None,
                interleaved=not self.is_mimo,
            )

    def _decay_rate(self, dd_a: Tensor) -> Tensor:
        """A (B, L, H), at most -A_floor."""
        rate = F.softplus(dd_a) if self.a_activation == "softplus" else (1 + dd_a.relu()) / (1 - dd_a.clamp(max=0))
        return -rate.clamp(min=self.A_floor)

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """y (B, L, R, H, P), z (B, L, H, P) -> (B, L, H P): norm if there is one, gate, ranks gathered."""
        z_brhp = z.to(y.dtype).unsqueeze(2)
        if self.is_mimo:
            z_brhp = z_brhp * self.mimo_z.transpose(0, 1)
        if self.is_outproj_norm:
            y = self.norm(y.flatten(-2)).unflatten(-1, (-1, self.headdim))
        y = y * F.silu(z_brhp)
        if self.is_mimo:
            y = (y * self.mimo_o.transpose(0, 1)).sum(2, keepdim=True)
        return self._joined(y)

    def _joined(self, y: Tensor) -> Tensor:
        """(B, L, 1, H, P) -> (B, L, H P)."""
        return y.squeeze(2).flatten(-2).to(self.out_proj.weight.dtype)


def _initial_dt_bias(
    nheads: int, dt_min: float, dt_max: float, floor: float, device: torch.device | str | None
) -> Tensor:
    """softplus^-1 of step sizes drawn log-uniformly from [dt_min, dt_max]."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(low + (high - low) * torch.rand(nheads, device=device)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


class Mamba3Backbone(nn.Module):
    """A pre-norm residual stack: for each layer, gate, RMSNorm, Mamba-3, add, and with `mlp_dim` RMSNorm, gated MLP,
    add; then a final RMSNorm.

    With `bidirectional`, each layer has a second Mamba-3 that reads the same from the right, and both are added. Every
    state then knows the whole sequence, and nothing can go on from the last one.

    Attributes:
        checkpoint_activations: keep only what goes into each layer for the backward pass, and compute the rest again.
    """

    def __init__(self, config: BackboneConfig, bidirectional: bool = False) -> None:
        super().__init__()
        self.checkpoint_activations = False
        arguments = dataclasses.asdict(config.layer)
        layers = [Mamba3(**arguments) for _ in range(config.n_layers)]
        n_mlps = config.n_layers if config.mlp_dim else 0
        mlps = [GatedMLP(config.d_model, config.mlp_width) for _ in range(n_mlps)]
        reverse = [Mamba3(**arguments) for _ in layers] if bidirectional else []
        # As the reference language model starts: the sum of all that is added to the stream has the size of one.
        with torch.no_grad():
            for last in [*(layer.out_proj for layer in layers + reverse), *(mlp.fc2 for mlp in mlps)]:
                last.weight.div_(math.sqrt(len(layers + reverse) + n_mlps))
        self.layers = nn.ModuleList(layers)
        self.reverse_layers = nn.ModuleList(reverse)
        self.norms = nn.ModuleList(RMSNorm(config.d_model) for _ in range(config.n_layers))
        self.mlps = nn.ModuleList(mlps)
        self.mlp_norms = nn.ModuleList(RMSNorm(config.d_model) for _ in range(n_mlps))
        self.final_norm = RMSNorm(config.d_model)

    def forward(
        self,
        x: Tensor,
        gate: Gate | None = None,
        state: BackboneState | None = None,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, BackboneState]:
        """(B, L, D) -> (B, L, D).

        Args:
            x: input, right-padded if at all: the stack is causal, so what comes later changes nothing before
                it.
            gate: called as gate(layer index, residual stream (B, L, D)), returns the new residual stream.
            state: one state per layer to continue from.
            return_state: also return the states after the last token.
            mask: (B, L) bool, the valid positions, which come first; None when all are. Only what reads from the right
                needs it.
        """
        self._demand_causal(state is not None or return_state)
        states: BackboneState = []
        for i, (norm, layer) in self._blocks():
            if return_state:
                x = x if gate is None else gate(i, x)
                y, layer_state = layer(norm(x), None if state is None else state[i], return_state=True)
                states.append(layer_state)
                x = self.add_mlp(i, x + y)
            elif self.checkpoint_activations and torch.is_grad_enabled():
                before = None if state is None else state[i]
                x = cast(Tensor, checkpoint(self._block, i, x, gate, before, mask, use_reentrant=False))
            else:
                x = self._block(i, x, gate, None if state is None else state[i], mask)
        x = self.final_norm(x)
        return (x, states) if return_state else x

    def _block(self, i: int, x: Tensor, gate: Gate | None, state: Mamba3State | None, mask: Tensor | None) -> Tensor:
        """The residual stream (B, L, D) after layer i."""
        norm, layer = cast(RMSNorm, self.norms[i]), cast(Mamba3, self.layers[i])
        x = x if gate is None else gate(i, x)
        y = layer(norm(x), state)
        if self.reverse_layers:
            y = y + _reversed(self.reverse_layers[i], norm(x), mask)
        return self.add_mlp(i, x + y)

    def step(self, x_t: Tensor, state: BackboneState, gate: Gate | None = None) -> tuple[Tensor, BackboneState]:
        """One token: (B, D) -> (B, D) and the next states. `gate` sees (B, 1, D)."""
        self._demand_causal()
        states: BackboneState = []
        for i, (norm, layer) in self._blocks():
            x_t = x_t if gate is None else gate(i, x_t.unsqueeze(1)).squeeze(1)
            y_t, layer_state = layer.step(norm(x_t), state[i])
            x_t = self.add_mlp(i, x_t + y_t)
            states.append(layer_state)
        return self.final_norm(x_t), states

    def add_mlp(self, layer: int, x: Tensor) -> Tensor:
        """The residual stream (..., D) after the MLP behind a layer; the same where there is none."""
        return x + self.mlps[layer](self.mlp_norms[layer](x)) if self.mlps else x

    def _demand_causal(self, streams: bool = True) -> None:
        if streams and self.reverse_layers:
            raise ValueError("a bidirectional backbone reads whole sequences: it has no state to go on from")

    def _blocks(self) -> Iterator[tuple[int, tuple[RMSNorm, Mamba3]]]:
        return enumerate(zip(cast(list[RMSNorm], self.norms), cast(list[Mamba3], self.layers), strict=True))

    def initial_state(self, batch: int) -> BackboneState:
        """The states before the first token, one per layer."""
        return [layer.initial_state(batch) for _, (_, layer) in self._blocks()]


def _reversed(layer: nn.Module, u: Tensor, mask: Tensor | None) -> Tensor:
    """What a layer makes of u (B, L, D) read from the last valid position to the first, each output in its place."""
    position = torch.arange(u.shape[1], device=u.device).expand(u.shape[:2])
    length = u.shape[1] if mask is None else mask.sum(dim=1, keepdim=True)
    mirrored = torch.where(position < length, length - 1 - position, position).unsqueeze(2)
    return layer(u.take_along_dim(mirrored, dim=1)).take_along_dim(mirrored, dim=1)
