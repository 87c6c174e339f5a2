"""Eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Every module in it in eval mode; afterwards each is back in the mode it was in."""
    in_training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in in_training:
            each.training = True
