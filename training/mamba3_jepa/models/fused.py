"""Where the fused kernels take the place of the chunked scan: where they fit, and have been seen to be right.

The first use of a kernel with a shape compares it with the chunked scan (`kernel_check.py`); if that finds it wrong, or
it fails, then or later, the chunked scan takes its place for that shape, and that is said. Kernels have given wrong
results silently on GPUs that are newer than they are (github.com/state-spaces/mamba, issues 904, 938, 990).

Under torch.compile the choice is made outside the compiled code, which then continues with the kernel or with a chunked
scan that is compiled; where kernels are off, nothing is left of it. Ranks need not agree: each looks at its own
device, and what it takes changes how sums are rounded, not what is learned. On equal devices they find the same.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba3_jepa.config import KernelUse
from mamba3_jepa.errors import UserError
from mamba3_jepa.models import kernel_tuning, kernels
from mamba3_jepa.models.chunked import chunked_scan
from mamba3_jepa.models.kernel_check import Scan, found_wrong
from mamba3_jepa.models.scan import Mamba3State, ScanInputs, widened

logger = logging.getLogger(__name__)

_MOST_CHUNKS = 3  # from so many on, more are only more of the same
_VERSIONS = ("mamba-ssm", "triton", "torch")
Unfit = Callable[[ScanInputs, Mamba3State | None, bool], str | None]


class Shape(NamedTuple):
    """What decides which code of a kernel runs, and so whether it is right: inputs of one `Shape` are checked once.

    The number of sequences is not part of it, as they do not meet in a kernel; of the length it is only how many chunks
    there are (1, 2, or more), and whether the last is whole (0), of a multiple of 16 tokens (1), or of another number
    (2), for which Triton compiles other code. So a batch of texts of all lengths has nine shapes at most.
    """

    device: str
    kind: str
    heads: int
    groups: int
    ranks: int
    d_state: int
    headdim: int
    angles: int
    chunks: int
    rest: int
    gated: bool
    state_in: bool
    state_out: bool
    learns: bool

    @classmethod
    def of(cls, inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None, return_state: bool) -> Shape:
        """The shape of a call."""
        (L, R, G, N), (H, P) = inputs.q.shape[1:], inputs.v.shape[2:]
        tensors = [x for x in (*inputs, z, *(state or ())) if isinstance(x, Tensor)]
        return cls(
            device=_name(inputs.v.device),
            kind="SISO" if inputs.v_spread is None else "MIMO",
            heads=H,
            groups=G,
            ranks=R,
            d_state=N,
            headdim=P,
            angles=inputs.angle.shape[-1],
            chunks=min(_MOST_CHUNKS, -(-L // kernels.SISO_CHUNK)),
            rest=0 if L % kernels.SISO_CHUNK == 0 else 1 if L % 16 == 0 else 2,
            gated=z is not None,
            state_in=state is not None,
            state_out=return_state,
            learns=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        )

    def __str__(self) -> str:
        return (
            f"{self.kind} on {self.device}, {self.heads} heads of {self.headdim}, {self.groups} groups, "
            f"{self.ranks} ranks, d_state {self.d_state}, {self.angles} angles"
        )


class Fused:
    """The choice between kernel and chunked scan.

    Attributes:
        use: "auto" takes the kernels where they fit and are right, "require" refuses to go on where that would be
            without them, "off" calls none.
        wrong: for each shape met, what was found wrong; None if it is right.
    """

    def __init__(
        self,
        use: KernelUse = "auto",
        *,
        scan: Scan = kernels.fused_scan,
        unfit: Unfit = kernels.unfit,
        device_type: str = "cuda",
    ) -> None:
        self.use: KernelUse = use
        self.wrong: dict[Shape, str | None] = {}
        self._scan, self._unfit, self._device_type = scan, unfit, device_type

    def may_take(self, inputs: ScanInputs) -> bool:
        """Whether a kernel comes into question at all: they compute in bfloat16, so a float32 model keeps float32
        results."""
        v = inputs.v
        return self.use != "off" and v.device.type == self._device_type and v.dtype == torch.bfloat16 and v.numel() > 0

    @torch.compiler.disable
    def takes(self, inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None, return_state: bool) -> bool:
        """Whether `scan` is to take these inputs, which `may_take` has let pass.

        Raises:
            UserError: kernels are required, and this one does not fit, is wrong or fails; or the device is unusable
                since.
        """
        reason = self._unfit(inputs, state, return_state)
        if reason is None:
            reason = self._wrong(inputs, state, z, return_state)
        if reason is not None and self.use == "require":
            raise UserError(f"`kernels` require: {reason}; `kernels` auto goes on without")
        return reason is None

    @torch.compiler.disable
    def scan(
        self, inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Mamba3State | None]:
        """As `chunked_scan`, by the kernel; by the chunked scan if that fails.

        Raises:
            UserError: as `takes`.
        """
        try:
            return self._scan(inputs, state, z, return_state)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            wrong = f"it failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        said = self._switch_off(Shape.of(inputs, state, z, return_state), inputs, wrong)
        if self.use == "require":
            raise UserError(f"`kernels` require: {said}; `kernels` auto goes on without")
        return chunked_scan(widened(inputs), state, z=z, return_state=return_state)

    def _wrong(self, inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None, return_state: bool) -> str | None:
        shape = Shape.of(inputs, state, z, return_state)
        if shape not in self.wrong:
            wrong = found_wrong(self._scan, inputs, state, z, return_state, shape.learns)
            if wrong is None:
                self.wrong[shape] = None
            else:
                self._switch_off(shape, inputs, wrong)
        return self.wrong[shape]

    def _switch_off(self, shape: Shape, inputs: ScanInputs, wrong: str) -> str:
        B, L = inputs.v.shape[:2]
        said = f"the fused kernel {shape} (seen with {B} x {L} tokens): {wrong}"
        _demand_alive(inputs.v.device, said)
        self.wrong[shape] = said
        if self.use != "require":
            logger.warning(
                "%s. The chunked scan takes its place for this shape, slower and right. Another mamba-ssm or Triton "
                "may do better; `kernels` off calls none and says nothing",
                said,
            )
        return said

    def begin(self, use: KernelUse, kept: Mapping[str, Any] | None = None) -> None:
        """Start anew; with what `kept` gave in an earlier process, so that the same kernels in the same variants are
        used. What was right then is looked at again.
        """
        self.use = use
        self.wrong.clear()
        if use == "off" or not kept:
            return
        if kept["made_by"] != made_by():
            logger.info("kernels were tuned with %s, this is %s: they are tuned anew", kept["made_by"], made_by())
            return
        kernels.siso_kernel()  # the module that it comes from has the tuners
        kernels.mimo_kernel()
        kernel_tuning.choose(kept["tuned"])
        for shape, said in kept["wrong"]:
            logger.warning("as before, %s: the chunked scan takes its place", said)
            self.wrong[Shape(**shape)] = said

    def kept(self) -> dict[str, Any] | None:
        """What `begin` of another process needs, of strings and numbers; None if no kernel was asked for."""
        if not self.wrong:
            return None
        wrong = [(shape._asdict(), said) for shape, said in self.wrong.items() if said is not None]
        return {"made_by": made_by(), "tuned": kernel_tuning.chosen(), "wrong": wrong}


def demand_possible(use: KernelUse, device: torch.device, bfloat16: bool) -> None:
    """Refuse to require kernels where none can be taken.

    Args:
        bfloat16: whether the layers compute in it.

    Raises:
        UserError: says what is missing.
    """
    if use != "require":
        return
    if device.type != "cuda":
        raise UserError(f"`kernels` require: the kernels are for CUDA GPUs, and this computes on {device.type}")
    if not bfloat16:
        raise UserError(
            "`kernels` require: the kernels compute in bfloat16: give `precision` bf16 (bench layer: `bfloat16`)"
        )


def made_by() -> dict[str, str]:
    """The device and the versions that choices hold for."""
    found = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    for package in _VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _demand_alive(device: torch.device, said: str) -> None:
    """Refuse to go on with a device on which nothing can be computed any more."""
    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError as error:
        raise UserError(
            f"{said}. It has left the device unusable: start again with `kernels` off (of a run, with `resume`)"
        ) from error


fused = Fused()
"""That of this process, which every layer asks."""
