"""The Y-Decoder: embedding to text."""

from mamba3_jepa.models.y_decoder import YDecoder

__all__ = ["YDecoder"]
