"""Whether a fused kernel gives what the chunked scan gives, in value and gradient.

The inputs are made up, of the shape that is asked about and the sizes that training has, and always the same: what is
found depends on device, shape and software alone, neither on the data nor on the weights. The whole batch goes through
the kernel, so that it tunes itself for what it will be given; up to four of its sequences are compared.

Shape letters as in `scan.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor

from mamba3_jepa.models.chunked import chunked_scan
from mamba3_jepa.models.scan import Mamba3State, ScanInputs

Scan = Callable[[ScanInputs, Mamba3State | None, Tensor | None, bool], tuple[Tensor, Mamba3State | None]]

# Relative Frobenius errors. On an H200 the kernels, which compute in bfloat16, stay below half of these
# (tests/test_kernels_cuda.py); of a sequence of 500 tokens one that is altogether wrong is an error of 0.045.
VALUE_ERROR, GRADIENT_ERROR = 4e-2, 8e-2
COMPARED = 4  # sequences


def found_wrong(
    scan: Scan, inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None, return_state: bool, learns: bool
) -> str | None:
    """What is wrong with `scan` for inputs like these, in a few words; None if nothing is.

    It leaves the caller's surroundings alone: it runs in a thread of its own, which has neither the caller's autocast,
    inference mode and gradient mode nor the hooks by which activations are checkpointed; random numbers come from a
    generator of its own.

    Args:
        learns: whether to compare gradients, too.

    Raises:
        torch.OutOfMemoryError: says nothing about the kernel.
    """
    device = inputs.v.device

    def compare() -> str | None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return _found_wrong(scan, inputs, state, z, return_state, learns)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compare).result()


def _found_wrong(
    scan: Scan, inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None, return_state: bool, learns: bool
) -> str | None:
    device = inputs.v.device
    generator = torch.Generator(device).manual_seed(0)
    inputs, state, z = _made_up(inputs, state, z, generator)
    rows = torch.linspace(0, len(inputs.v) - 1, COMPARED, device=device).round().long().unique()
    with torch.set_grad_enabled(learns):
        leaves = _leaves(inputs, state, z) if learns else {}
        for leaf in leaves.values():
            leaf.requires_grad_()
        expected, their_state = chunked_scan(*_of_rows(rows, inputs, state, z), return_state=return_state)
        try:
            y, own_state = scan(inputs._replace(v=inputs.v.bfloat16()), state, z, return_state)
            found = {"output": y.float()[rows]}
            if return_state:
                found["final state"] = _h(own_state).float()[rows]
            wanted = {"output": expected} | ({"final state": _h(their_state)} if return_state else {})
            weights = [torch.randn(x.shape, generator=generator, device=device) for x in wanted.values()]
            for name, value in found.items():
                if (error := _error(value, wanted[name])) > VALUE_ERROR:
                    return _said(f"its {name}", error, VALUE_ERROR)
            own = _gradients(found, weights, leaves)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # what failed says so no later than here
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            return f"it failed: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        theirs = _gradients(wanted, weights, leaves)
    for name, gradient in own.items():
        if (error := _error(gradient, theirs[name])) > GRADIENT_ERROR and name not in _zero(inputs, state):
            return _said(f"the gradient by {name}", error, GRADIENT_ERROR)
    return None


def _made_up(
    inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None, generator: torch.Generator
) -> tuple[ScanInputs, Mamba3State | None, Tensor | None]:
    """Inputs of the same shapes, in float32; rounded to bfloat16 where the kernels round them."""

    def normal(like: Tensor, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        return mean + scale * torch.randn(like.shape, generator=generator, device=like.device)

    def rounded(like: Tensor) -> Tensor:
        return normal(like).bfloat16().float()

    dt = 10 ** (2 * torch.rand(inputs.dt.shape, generator=generator, device=inputs.dt.device) - 3)  # 0.001 to 0.1
    made = ScanInputs(
        q=rounded(inputs.q),
        k=rounded(inputs.k),
        v=rounded(inputs.v),
        q_bias=normal(inputs.q_bias, 1.0, 0.1),
        k_bias=normal(inputs.k_bias, 1.0, 0.1),
        log_alpha=-dt * normal(dt).exp(),
        dt=dt,
        trap=rounded(inputs.trap),
        angle=normal(inputs.angle),
        skip=normal(inputs.skip, 1.0, 0.1),
        v_spread=None if inputs.v_spread is None else normal(inputs.v_spread, 1 / inputs.q.shape[2], 0.1),
        interleaved=inputs.interleaved,
    )
    before = None if state is None else Mamba3State(*map(rounded, state))
    return made, before, None if z is None else rounded(z)


def _leaves(inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None) -> dict[str, Tensor]:
    """What there are gradients by, under the names to say."""
    named = {**inputs._asdict(), "z": z}
    if state is not None:
        named |= {f"state.{name}": x for name, x in state._asdict().items()}
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}


def _of_rows(
    rows: Tensor, inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None
) -> tuple[ScanInputs, Mamba3State | None, int, Tensor | None]:
    """The arguments of `chunked_scan` for some of the sequences."""
    of_tokens = ("q", "k", "v", "log_alpha", "dt", "trap", "angle")
    some = inputs._replace(**{name: getattr(inputs, name)[rows] for name in of_tokens})
    before = None if state is None else Mamba3State(*(x[rows] for x in state))
    return some, before, 64, None if z is None else z[rows]


def _gradients(outputs: dict[str, Tensor], weights: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a random weighting of the outputs, by each leaf; none without leaves."""
    if not leaves:
        return {}
    total = torch.stack([(x * weight).sum() for x, weight in zip(outputs.values(), weights, strict=True)]).sum()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def _h(state: Mamba3State | None) -> Tensor:
    if state is None:
        raise ValueError("the kernel gave no final state")
    return state.h


def _error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm; infinite if anything is not finite."""
    found, expected = found.detach().float(), expected.detach()
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-6))
    return error if error < float("inf") else float("inf")


def _zero(inputs: ScanInputs, state: Mamba3State | None) -> tuple[str, ...]:
    """Names of gradients that are zero by construction, but for rounding: a lone token meets no other."""
    return ("log_alpha", "angle") if inputs.v.shape[1] == 1 and state is None else ()


def _said(what: str, error: float, allowed: float) -> str:
    return f"{what} is off by {error:.2g} of its size ({allowed:g} is rounding)"
