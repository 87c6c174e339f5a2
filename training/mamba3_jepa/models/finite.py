"""Numbers that a model gives out are finite, or there is an error that says where they stop being so."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mamba3_jepa.errors import UserError, shorten
from mamba3_jepa.models.vljepa import Mamba3Jepa


def demand_finite(values: Tensor, model: Mamba3Jepa, what: str, names: Sequence[object]) -> Tensor:
    """What `model` computed, (N,) or (N, width), if all of it is finite.

    Args:
        what, names: what the rows are and whose, for the message, such as "the embedding of" and N files.

    Raises:
        UserError: names the first row that is not finite, the model's file, and its weights that are to blame.
    """
    finite = values.isfinite()
    rows = finite if finite.ndim == 1 else finite.all(dim=1)
    if not rows.all():
        raise UserError(f"{what} {names[int(rows.logical_not().nonzero()[0])]!r} is not finite: {_reason(model)}")
    return values


def _reason(model: Mamba3Jepa) -> str:
    damaged = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if damaged:
        return f"weights of {model.source} hold NaN or infinity: {shorten(damaged)}"
    return f"the weights of {model.source} are, but they or what they are given are too large"
