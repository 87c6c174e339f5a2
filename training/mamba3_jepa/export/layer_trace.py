"""What happens inside a Mamba-3 layer and between the layers of a backbone, made visible for the golden files.

Shape letters as in `models/scan.py`; T tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from mamba3_jepa.models.mamba3 import Mamba3, Mamba3Backbone, Mamba3State
from mamba3_jepa.models.scan import biased_and_rotated, scan_step

_SPLIT = ("z", "x", "B", "C", "dd_dt", "dd_A", "trap", "angle")

Described = dict[str, tuple[Tensor, str]]


@contextmanager
def captured(backbone: Mamba3Backbone) -> Iterator[dict[str, Tensor]]:
    """Within the context, a forward pass leaves `layers.{i}.input` (the residual stream the layer's norm sees),
    `layers.{i}.mixer_output`, with MLPs `layers.{i}.mlp_output`, and `hidden` (after the final norm) in the dictionary.
    """
    found: dict[str, Tensor] = {}

    def keep_input(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _, arguments, __: found.__setitem__(name, arguments[0]))

    def keep_output(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _, __, output: found.__setitem__(name, output))

    handles = [keep_output("hidden", backbone.final_norm)]
    for i, (norm, layer) in enumerate(zip(backbone.norms, backbone.layers, strict=True)):
        handles += [keep_input(f"layers.{i}.input", norm), keep_output(f"layers.{i}.mixer_output", layer)]
    handles += [keep_output(f"layers.{i}.mlp_output", mlp) for i, mlp in enumerate(backbone.mlps)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def trace_layer(layer: Mamba3, u_td: Tensor) -> Described:
    """One layer on T tokens (T, D) from the zero state, one at a time, with every intermediate of the recurrence."""
    u = u_td.unsqueeze(0)
    split = layer.in_proj(u).split(layer.split_sizes, dim=-1)
    traced: Described = {"u": (u_td, "(T, D) input of the layer, after its norm")}
    for name, part in zip(_SPLIT, split, strict=True):
        traced[f"in_proj.{name}"] = (part[0], f"(T, {part.shape[-1]}) {name}, a slice of in_proj(u)")
    state = layer.initial_state(1)
    rows: dict[str, list[Tensor]] = {}
    for t in range(len(u_td)):
        _, inputs = layer._project(u[:, t : t + 1])
        y, next_state = scan_step(inputs, state)
        query = biased_and_rotated(inputs.q[:, 0], inputs.q_bias, next_state.theta, inputs.interleaved)
        out, stepped = layer.step(u[:, t], state)
        found = {
            "dt": inputs.dt[:, 0], "alpha": inputs.log_alpha[:, 0].exp(), "lambda": inputs.trapezoid[:, 0],
            **{f"state.{name}": value for name, value in stepped._asdict().items()},
            "Q": query, "y": y[:, 0], "out": out,
        }  # fmt: skip
        for name, value in found.items():
            rows.setdefault(name, []).append(value[0])
        state = stepped
    return traced | {name: (torch.stack(values), _MEANING[name]) for name, values in rows.items()}


_MEANING = {
    "dt": "(T, H) softplus(dd_dt + dt_bias)",
    "alpha": "(T, H) exp(A dt)",
    "lambda": "(T, H) sigmoid(trap)",
    "state.theta": "(T, H, S) rotation angles modulo 2 pi, after each token",
    "state.h": "(T, H, P, N) the recurrent state, after each token",
    "state.k": "(T, R, H, N) K of each token: normed, biased, rotated B",
    "state.v": "(T, H, P) V of each token: x",
    "Q": "(T, R, H, N) normed, biased, rotated C",
    "y": "(T, R, H, P) Q h + D V, before the gate silu(z)",
    "out": "(T, D) output of the layer",
}


def trace_steps(backbone: Mamba3Backbone, x_ld: Tensor) -> tuple[dict[str, Tensor], list[Mamba3State]]:
    """A backbone on L embedded tokens (L, D), one at a time from the zero state, without gates.

    Returns:
        `layers.{i}` (L, D), the residual stream after the layer and its MLP, and `hidden` (L, D); the states after the
        last token.
    """
    layers = [cast(Mamba3, layer) for layer in backbone.layers]
    states = [layer.initial_state(1) for layer in layers]
    rows: dict[str, list[Tensor]] = {}
    for x in x_ld.unsqueeze(1):
        for i, (norm, layer) in enumerate(zip(backbone.norms, layers, strict=True)):
            y, states[i] = layer.step(norm(x), states[i])
            x = backbone.add_mlp(i, x + y)
            rows.setdefault(f"layers.{i}", []).append(x[0])
        rows.setdefault("hidden", []).append(backbone.final_norm(x)[0])
    return {name: torch.stack(values) for name, values in rows.items()}, states
