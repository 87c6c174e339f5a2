"""A page of cards, each with an image and lines of text under it, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mamba3_jepa.evaluation.palette import FAINT, INK, RIGHT, WRONG
from mamba3_jepa.files.whole_file import whole_file

# Everything is in pixels of the PNG, which is drawn at twice the size it is meant to be seen at.
_CARD, _IMAGE, _PAD, _GAP, _MARGIN = 620, 572, 24, 28, 36
_BODY, _SMALL, _LINE = 25, 20, 34
_MARK, _SCORE = 36, 84
_MAX_COLUMNS = 4
_TEXT_WIDTH = _CARD - 2 * _PAD

_PAGE, _PAPER, _BORDER, _EMPTY = "#eef0f3", "#ffffff", "#d5d9df", "#e1e4e8"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of text in a card; `mark` is given to texts of the model: right (True) or wrong (False)."""

    text: str
    color: str
    size: int = _BODY
    bold: bool = False
    mark: bool | None = None
    score: float | None = None
    space_above: int = 0
    indent: int = 0


def draw_cards(images: Sequence[Image.Image | None], cards: Sequence[Sequence[Row]], path: Path) -> Path:
    """Write the PNG `path` with one card for each of the N samples, at most four in a row.

    Args:
        images: N pictures of any size and mode; None is drawn as a grey box that says so.
        cards: for each sample the lines of text, from top to bottom.

    Raises:
        UserError: the file cannot be written.
    """
    columns = min(_MAX_COLUMNS, len(cards))
    heights = [
        max(_card_height(rows) for rows in cards[start : start + columns]) for start in range(0, len(cards), columns)
    ]
    size = (
        2 * _MARGIN + columns * _CARD + (columns - 1) * _GAP,
        2 * _MARGIN + sum(heights) + (len(heights) - 1) * _GAP,
    )
    sheet = Image.new("RGB", size, _PAGE)
    top = _MARGIN
    for row, height in enumerate(heights):
        for column, number in enumerate(range(row * columns, min((row + 1) * columns, len(cards)))):
            left = _MARGIN + column * (_CARD + _GAP)
            _draw_card(sheet, left, top, height, images[number], cards[number])
        top += height + _GAP
    with whole_file(path) as file:
        sheet.save(file, format="PNG")
    return path


def text_rows(
    text: str,
    *,
    color: str = INK,
    bold: bool = False,
    mark: bool | None = None,
    score: float | None = None,
    space_above: int = 0,
    max_lines: int = 4,
) -> list[Row]:
    """One text as the lines it takes; the mark and the score stand beside the first."""
    indent = 0 if mark is None else _MARK
    width = _TEXT_WIDTH - indent - (0 if score is None else _SCORE)
    return [
        Row(
            text=line,
            color=color,
            bold=bold,
            indent=indent,
            mark=mark if number == 0 else None,
            score=score if number == 0 else None,
            space_above=space_above if number == 0 else 0,
        )
        for number, line in enumerate(_wrap(text, width, _BODY, bold=bold, max_lines=max_lines))
    ]


def heading(text: str, *, space_above: int = 10) -> Row:
    """What the texts below it are."""
    return Row(text=text, color=FAINT, size=_SMALL, space_above=space_above)


def marked_rows(text: str, is_right: bool, *, score: float | None = None, max_lines: int = 4) -> list[Row]:
    """A text of the model's, green with a tick or red with a cross."""
    color = RIGHT if is_right else WRONG
    return text_rows(text, color=color, mark=is_right, score=score, space_above=4, max_lines=max_lines)


def _card_height(rows: Sequence[Row]) -> int:
    return _PAD + _IMAGE + _PAD + sum(_LINE + row.space_above for row in rows) + _PAD


def _draw_card(
    sheet: Image.Image, left: int, top: int, height: int, image: Image.Image | None, rows: Sequence[Row]
) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.rounded_rectangle(
        (left, top, left + _CARD - 1, top + height - 1), radius=18, fill=_PAPER, outline=_BORDER, width=2
    )
    x, y = left + _PAD, top + _PAD
    _draw_image(sheet, x, y, image)
    y += _IMAGE + _PAD
    right_edge = left + _CARD - _PAD
    for row in rows:
        y += row.space_above
        baseline = y + _BODY
        draw.text((x + row.indent, baseline), row.text, row.color, _font(row.size, row.bold), anchor="ls")
        if row.mark is not None:
            draw.text((x, baseline), "✓" if row.mark else "✗", row.color, _font(_BODY, True), anchor="ls")
        if row.score is not None:
            draw.text((right_edge, baseline), f"{row.score:.2f}", FAINT, _font(_SMALL), anchor="rs")
        y += _LINE


def _draw_image(sheet: Image.Image, x: int, y: int, image: Image.Image | None) -> None:
    box = (x, y, x + _IMAGE - 1, y + _IMAGE - 1)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle(box, fill=_EMPTY)
    if image is None:
        draw.text((x + _IMAGE // 2, y + _IMAGE // 2), "no image", FAINT, _font(_BODY), anchor="mm")
        return
    # Few pixels stay crisp when enlarged; many are averaged when shrunk.
    method = Image.Resampling.NEAREST if max(image.size) * 4 <= _IMAGE else Image.Resampling.LANCZOS
    fitted = ImageOps.contain(image.convert("RGB"), (_IMAGE, _IMAGE), method)
    sheet.paste(fitted, (x + (_IMAGE - fitted.width) // 2, y + (_IMAGE - fitted.height) // 2))
    draw.rectangle(box, outline=_EMPTY, width=2)  # where a white picture ends


def _wrap(text: str, width: int, size: int, *, bold: bool = False, max_lines: int) -> list[str]:
    """Lines no wider than `width` pixels: longer words are cut, lines over `max_lines` become an ellipsis."""
    font = _font(size, bold)
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        *full, rest = _cut(word, width, font)
        lines[-1:] = [*full, rest]
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "…"]
    return lines


def _cut(word: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The word in pieces that fit the width; one piece when it fits whole."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


@lru_cache(maxsize=8)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic, and the marks."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
