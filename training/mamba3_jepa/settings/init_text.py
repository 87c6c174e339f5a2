"""Settings of text towers that start from a language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from mamba3_jepa.config import AActivation
from mamba3_jepa.errors import UserError

Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Activation = Annotated[AActivation | None, tyro.conf.arg(metavar="{heavy_tail,softplus}")]

# VL-JEPA (arXiv 2512.10942) gives its text encoder this share: it has read already, and the rest has to come to it.
PRETRAINED_LR_SCALE = 0.05


def demand_consistent(part: str, folder: Path | None, a_activation: AActivation | None, model: Sequence[str]) -> None:
    """Refuse what contradicts a part that starts from the language model in `folder`, or is of one where there is none.

    Args:
        part: y_encoder or y_decoder.
        model: KEY=VALUE each, the changes to the model's configuration.

    Raises:
        UserError: names both settings.
    """
    if folder is None and a_activation is not None:
        raise UserError(f"`a_activation` is of the language model of `init_{part}`; there is none")
    if folder is not None and any(each.startswith(f"{part}.") for each in model):
        raise UserError(f"`model` {part}.* is for new weights; the language model of `init_{part}` has its own sizes")
