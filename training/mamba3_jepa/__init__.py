"""Mamba3-JEPA: predict the embedding of an answer from an image and a question, with Mamba-3 throughout."""

__version__ = "0.1.0"
