"""The vision transformer, the X-Encoder."""

from mamba3_jepa.models.vit import VisionEncoder

__all__ = ["VisionEncoder"]
