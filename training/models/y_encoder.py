"""The Y-Encoder: text to embedding."""

from mamba3_jepa.models.y_encoder import YEncoder

__all__ = ["YEncoder"]
