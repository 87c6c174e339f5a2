"""Weights, gradients and optimizer state shared out among the processes (FSDP2), and put together for what needs them
whole: validation and checkpoints, which are those of a run that shares nothing.

Each Mamba-3 layer is gathered when it computes and let go of again; what is outside of these layers is gathered once a
step. Frozen weights stay whole everywhere.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mamba3_jepa.errors import UserError
from mamba3_jepa.models.mamba3 import Mamba3
from mamba3_jepa.settings.training import Phase1Settings
from mamba3_jepa.training.distributed import rank, world_size

_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")


def demand_sharing(settings: Phase1Settings) -> None:
    """Refuse what cannot be done with weights that are shared out.

    Raises:
        UserError: names the setting.
    """
    if world_size() == 1:
        raise UserError("`fsdp` shares the weights out among several processes, and there is one: start with torchrun")
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UserError("`fsdp` needs torch 2.7 or newer")
    reasons = {
        "contrast_batch": (settings.contrast_batch is not None, "its first pass goes around the shared layers"),
        "compile": (settings.compile, "compiled layers are not gathered"),
        "precision": (settings.precision == "fp16", "fp16 scales the gradients of each process by itself; use bf16"),
        "on_bad_sample": (
            settings.on_bad_sample == "skip",
            "a process without samples would not take part where layers are gathered; make a manifest without them",
        ),
    }
    for name, (is_given, reason) in reasons.items():
        if is_given:
            value = getattr(settings, name)
            shown = f"`{name}`" if value is True else f"`{name}` {value}"
            raise UserError(f"`fsdp` cannot be combined with {shown}: {reason}")


class SharedOut:
    """An objective of which each process keeps a part of the trainable weights, of their gradients and of what the
    optimizer knows of them."""

    def __init__(self, objective: nn.Module, device: torch.device) -> None:
        """Shares `objective` out, in place. All ranks have the same one."""
        mesh = init_device_mesh(device.type, (world_size(),))
        frozen = {parameter for parameter in objective.parameters() if not parameter.requires_grad}
        scalars = [
            (module, name)
            for module in objective.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and parameter.ndim == 0
        ]
        for module, name in scalars:  # only rows can be shared out
            setattr(module, name, nn.Parameter(module.get_parameter(name).detach().reshape(1)))
        for module in objective.modules():
            if isinstance(module, Mamba3):
                fully_shard(module, mesh=mesh, ignored_params=frozen)
        fully_shard(objective, mesh=mesh, ignored_params=frozen)
        self._objective = objective
        self._scalars = [module.get_parameter(name) for module, name in scalars]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The objective's modules with all their weights, as if nothing were shared out, for use without gradients.

        All ranks enter together; what they do inside need not be the same.
        """
        parts: list[tuple[nn.Module, str, nn.Parameter]] = []
        hooks: list[tuple[nn.Module, dict[str, Any]]] = []
        for module in self._objective.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    parts.append((module, name, parameter))
                    module._parameters[name] = nn.Parameter(self._whole(parameter, parameter))
            if isinstance(module, FSDPModule):  # which would gather it once more
                hooks.append((module, {name: getattr(module, name) for name in _HOOKS}))
                for name in _HOOKS:
                    setattr(module, name, OrderedDict())
        try:
            yield
        finally:
            for module, name, parameter in parts:
                module._parameters[name] = parameter
            for module, own in hooks:
                for name, value in own.items():
                    setattr(module, name, value)

    def _whole(self, part: DTensor, parameter: Tensor) -> Tensor:
        """All of what is shared out as `parameter` is, in the shape that this had."""
        full = whole_value(part.detach())
        return full.reshape(()) if any(parameter is scalar for scalar in self._scalars) else full

    def whole_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Its `state_dict` on rank 0, as if nothing were shared out, on the CPU; all ranks call it together."""

        def on_rank_0(value: DTensor, parameter: Tensor) -> Tensor | None:
            whole = self._whole(value, parameter)
            return whole.cpu() if rank() == 0 else None

        return self._each_value(optimizer, optimizer.state_dict(), on_rank_0)

    def load_whole_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take over what `whole_state` gave, or the `state_dict` of an optimizer that shares nothing."""

        def part(value: Tensor, parameter: DTensor) -> Tensor:
            whole = value.to(parameter.device).reshape(parameter.shape)
            return distribute_tensor(whole, parameter.device_mesh, parameter.placements)

        optimizer.load_state_dict(self._each_value(optimizer, state, part))

    def _each_value(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any], change: Callable[[Any, Any], Any]
    ) -> dict[str, Any]:
        """`state` with what it holds of each element of a parameter changed, but not the count of its steps."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        values = {
            number: {
                name: value if name == "step" else change(value, parameters[number]) for name, value in of_one.items()
            }
            for number, of_one in state["state"].items()
        }
        return state | {"state": values}


def whole_value(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out; all ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
