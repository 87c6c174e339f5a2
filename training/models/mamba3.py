"""The Mamba-3 layer and the backbone."""

from mamba3_jepa.models.mamba3 import Mamba3, Mamba3Backbone, Mamba3State

__all__ = ["Mamba3", "Mamba3Backbone", "Mamba3State"]
