"""Weights out of a checkpoint, for readers in any language, and the proof that they arrived."""
