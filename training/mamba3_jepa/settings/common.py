"""Settings that many commands have, with their help: where a command computes, and how it says its results."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

from mamba3_jepa.config import KernelUse

# `mamba3_jepa.device` makes a device of it
Device = Annotated[
    str,
    tyro.conf.arg(
        metavar="{auto,cpu,cuda,cuda:N,mps}",
        help="Where to compute; auto: on a CUDA GPU if there is one, else on Apple's (mps), else on the CPU.",
    ),
]

# `mamba3_jepa.models.fused` has what they are
Kernels = Annotated[
    KernelUse,
    tyro.conf.arg(
        help="mamba-ssm's fused kernels, on a CUDA GPU in bfloat16: auto takes those that fit and are right, checked "
        "at first use; off takes none; require stops where one cannot be taken.",
    ),
]

# kinds of confusion that can be made of any data, see `mamba3_jepa.data.confusion`
ConfusionKind = Literal[
    "mismatched", "unanswerable", "corrupted", "imageless", "foreign", "degraded", "shuffled", "tool"
]

# `mamba3_jepa.cli.output.write_out` prints it
Json = Annotated[bool, tyro.conf.arg(help="Print the results as JSON, for other programs to read.")]
