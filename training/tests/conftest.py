"""What all tests share. The tiny model they use is in tiny.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState


@pytest.fixture(scope="session", autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Several runs share a process here: each gets accelerate's global state anew, as a process of its own would."""
    start = Accelerator.__init__

    def afresh(self: Accelerator, *arguments: Any, **options: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        start(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "__init__", afresh)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
