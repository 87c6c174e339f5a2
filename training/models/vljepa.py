"""The full Mamba3-JEPA model."""

from mamba3_jepa.models.vljepa import Mamba3Jepa

__all__ = ["Mamba3Jepa"]
