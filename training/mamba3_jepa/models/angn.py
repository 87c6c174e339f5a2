"""Adaptive neural gating network (ANGN): elementwise gates on the predictor's residual stream.

Before layer i the residual stream becomes h * sigmoid(weight_i * h + bias_i). Gates start nearly open
(sigmoid(1.5) = 0.82) and independent of h. How open they are is measured on every pass; in inference a moving
average of it tells when the stream has gone quiet and the context should be reset.

Shape letters: B batch, L length, D model width.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from mamba3_jepa.config import AngnConfig

logger = logging.getLogger(__name__)

INITIAL_BIAS = 1.5


class AngnGate(nn.Module):
    """The gate of one layer: sigmoid(weight * h + bias), `weight` and `bias` of shape (D,)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model))
        self.bias = nn.Parameter(torch.full((d_model,), INITIAL_BIAS))

    def forward(self, h: Tensor) -> Tensor:
        """(..., D) -> gate activations in (0, 1), same shape."""
        return torch.sigmoid(self.weight * h + self.bias)


class Angn(nn.Module):
    """One gate per layer, and the record of how open they are.

    The record is not part of the state dict: it describes the last inputs, not the model.
    """

    _activity: Tensor
    _ema: Tensor

    def __init__(self, n_layers: int, d_model: int, config: AngnConfig) -> None:
        super().__init__()
        self.config = config
        self.gates = nn.ModuleList(AngnGate(d_model) for _ in range(n_layers))
        self.register_buffer("_activity", torch.full((n_layers,), math.nan), persistent=False)
        self.register_buffer("_ema", torch.full((n_layers,), math.nan), persistent=False)
        self._reset_due = False

    def forward(self, layer: int, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gate the residual stream before a layer.

        Args:
            layer: index of the layer, counted from 0.
            h: (B, L, D).
            mask: (B, L) bool, True on the positions that count in the record; None when all do.

        Returns:
            h * gate, (B, L, D).
        """
        gate = self.gates[layer](h)
        self._record(layer, gate.detach(), mask)
        return h * gate

    def sparsity_penalty(self) -> Tensor:
        """Scalar: mean of sigmoid(bias) over all gates, what an input of zero would let through."""
        biases = torch.stack([gate.get_parameter("bias") for gate in self.gates])
        return torch.sigmoid(biases).mean()

    def activity(self) -> Tensor:
        """Mean activation per layer over the last pass's valid positions, (n_layers,); NaN before any."""
        return self._activity.clone()

    def activity_ema(self) -> Tensor:
        """Moving average of `activity` over the passes in eval mode, (n_layers,); NaN before any."""
        return self._ema.clone()

    def context_reset_due(self) -> bool:
        """Whether the moving average, over all layers, is under `context_reset_threshold`."""
        return self._reset_due

    def reset_context(self) -> None:
        """Forget the moving average: the next pass in eval mode starts a new one."""
        self._ema.fill_(math.nan)
        self._reset_due = False

    @torch.no_grad()
    def _record(self, layer: int, gate: Tensor, mask: Tensor | None) -> None:
        per_position = gate.mean(dim=-1, dtype=torch.float32)
        activity = per_position.mean() if mask is None else (per_position * mask).sum() / mask.sum().clamp(min=1)
        self._activity[layer] = activity
        if self.training:
            return
        ema, decay = self._ema[layer], self.config.ema_decay
        self._ema[layer] = torch.where(ema.isnan(), activity, decay * ema + (1 - decay) * activity)
        if layer == len(self.gates) - 1:
            self._signal(self._ema.mean())

    @torch.compiler.disable  # reads a value back to the host, which no graph can hold
    def _signal(self, mean_ema: Tensor) -> None:
        ema, threshold = mean_ema.item(), self.config.context_reset_threshold
        was_due, self._reset_due = self._reset_due, ema < threshold
        if self._reset_due and not was_due:
            logger.warning(
                "gate activity fell to %.3f, under the context reset threshold %.3f: reset the context",
                ema,
                threshold,
            )
