"""Strict loading of a state dict, with an error a person can act on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mamba3_jepa.errors import UserError, shorten


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str, *, assign: bool = False) -> None:
    """Copy `state` into `module`; every key must be there, none may be left over, every shape must agree.

    Args:
        module: the module to fill.
        state: tensors by name, as `module.state_dict()` names them.
        source: where the tensors came from, for the error message.
        assign: make the tensors themselves the module's, which may then be on the meta device, instead of copying.

    Raises:
        UserError: names the missing keys, the keys that have no place, and the shapes that differ.
    """
    expected = module.state_dict()
    problems = [
        f"{tensor_name}: expected shape {tuple(expected[tensor_name].shape)}, found {tuple(tensor.shape)}"
        for tensor_name, tensor in state.items()
        if tensor_name in expected and tensor.shape != expected[tensor_name].shape
    ]
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected or problems:
        parts = []
        if missing:
            parts.append(f"missing: {shorten(missing)}")
        if unexpected:
            parts.append(f"not expected: {shorten(unexpected)}")
        if problems:
            parts.append(shorten(problems, separator="; "))
        raise UserError(f"{source}: the weights do not fit. " + ". ".join(parts))
    module.load_state_dict(state, assign=assign)


def first_changed(state: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor of `state` that `known` has not, or has with other numbers; None if none is."""
    changed = (name for name, tensor in state.items() if name not in known or not tensor.equal(known[name]))
    return next(changed, None)
