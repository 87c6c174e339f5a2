"""Settings of the commands that use a trained model. Free of torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from mamba3_jepa.errors import UserError

# Settings that only one method reads: set with another one they would silently do nothing.
_BELONGS_TO = {
    "temperature": "sample",
    "top_k": "sample",
    "top_p": "sample",
    "beams": "beam",
    "length_penalty": "beam",
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How the Y-Decoder chooses its tokens."""

    method: Literal["greedy", "sample", "beam"] = "greedy"
    """greedy: the most probable token each time; sample: draw it; beam: search for the most probable answer."""
    temperature: float = 1.0
    """sample: divides the logits; below 1 the probable tokens get more probable, 0 is greedy."""
    top_k: int | None = None
    """sample: draw from the k most probable tokens only."""
    top_p: float | None = None
    """sample: draw from the fewest most probable tokens that have this probability together."""
    beams: int = 4
    """beam: unfinished answers kept at a time."""
    length_penalty: float = 0.0
    """beam: an answer's log-probability is divided by its number of tokens to this power; 0 prefers the most probable
    answer, 1 the one with the best mean."""
    max_tokens: int | None = None
    """Stop after this many tokens, the end mark included; default: as long as the model's longest answers."""
    seed: int = 0
    """sample: the same seed draws the same answers."""

    def __post_init__(self) -> None:
        for name, is_right, rule in (
            ("method", self.method in ("greedy", "sample", "beam"), "must be greedy, sample or beam"),
            ("temperature", 0 <= self.temperature < float("inf"), "must be at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "must be at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("beams", self.beams >= 1, "must be at least 1"),
            ("length_penalty", abs(self.length_penalty) < float("inf"), "must be a number"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "must be at least 1"),
        ):
            if not is_right:
                raise UserError(f"generation: {name} is {getattr(self, name)!r}, it {rule}")
        for field in fields(self):
            method = _BELONGS_TO.get(field.name, self.method)
            if method != self.method and getattr(self, field.name) != field.default:
                raise UserError(f"generation: {field.name} has no effect with {self.method}; choose method {method}")
