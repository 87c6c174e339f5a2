"""The colours of all pictures: one means the same in each of them.

Colour-blind readers tell those apart that stand in one picture: they differ in lightness too, or come from Okabe and
Ito's and Tol's palettes.
"""

from __future__ import annotations

from collections.abc import Iterable

from mamba3_jepa.data.splits import stable_hash

# What is written, what is written beside it, and lines that are no data.
INK, FAINT, EDGE, GRID = "#24292f", "#57606a", "#b8bec6", "#e6e8eb"
GUIDE = "#c9ced6"
ALL = INK  # of several kinds together
REST = "#8a8f98"  # what stands beside the kinds: captions beside questions, what was before

TRAINING, VALIDATION = "#0072B2", "#E69F00"
GENERATED, NEAREST = "#40318d", "#7cc0e8"
RIGHT, WRONG = "#00805e", "#c8460b"  # dark enough for text on white
PREDICTED, TARGET = "#AA4499", "#999933"
RECALL = {1: "#5b3a1a", 5: "#a5702f", 10: "#dcb67f"}
WITH_ROTATION, WITHOUT_ROTATION = "#1f6f8b", "#d58fb4"
SCORE = "#8e44ad"  # of the confusion monitor, whatever it is of
PLAIN_CONFIDENCE = "#b7950b"
_CONFUSION = {
    "clear": "#5d6d7e",
    "mismatched": "#e377c2",
    "unanswerable": "#7b241c",
    "corrupted": "#2f9e9e",
    "imageless": "#f39c12",
    "foreign": "#2e4a9e",
    "degraded": "#9fd5c5",
    "shuffled": "#c39bd3",
    "tool": "#6c8e23",
    "wrong_answer": "#a93226",
    "given": "#6b5200",
    "given_clear": "#b0b7c0",
}
_KINDS = (
    "#66a61e", "#e7298a", "#7570b3", "#17becf", "#bcbd22", "#8c564b", "#f1948a", "#f2a6cf", "#c0392b", "#6e2c91",
)  # fmt: skip
MAX_KINDS = len(_KINDS)


def kind_colors(names: Iterable[str]) -> dict[str, str]:
    """A colour for each of `MAX_KINDS` names at most, such as question types: in every picture of the same names the
    same, in whatever order they come there.

    Raises:
        ValueError: there are more.
    """
    colors: dict[str, str] = {}
    for name in sorted(set(names)):
        if len(colors) == MAX_KINDS:
            raise ValueError(f"more than {MAX_KINDS} kinds: {name!r} has no colour left")
        place = stable_hash(name) % MAX_KINDS
        while _KINDS[place] in colors.values():
            place = (place + 1) % MAX_KINDS
        colors[name] = _KINDS[place]
    return colors


def confusion_colors(kinds: Iterable[str]) -> dict[str, str]:
    """A colour for each kind of confusion, known ones first and in a fixed order."""
    wanted = list(kinds)
    known = {kind: color for kind, color in _CONFUSION.items() if kind in wanted}
    return known | kind_colors(kind for kind in wanted if kind not in known)
