"""Adaptive neural gating of the residual stream."""

from mamba3_jepa.models.angn import Angn, AngnGate

__all__ = ["Angn", "AngnGate"]
