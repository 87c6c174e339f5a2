"""Where a command computes, as all that use a model have it; `mamba3_jepa.device` makes a device of it."""

from __future__ import annotations

from typing import Annotated

import tyro

Device = Annotated[
    str,
    tyro.conf.arg(
        metavar="{auto,cpu,cuda,cuda:N,mps}",
        help="Where to compute; auto: on a CUDA GPU if there is one, else on Apple's (mps), else on the CPU.",
    ),
]
