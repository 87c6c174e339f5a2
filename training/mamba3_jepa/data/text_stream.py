"""Text out of tokens as they come: a character that needs several tokens is given when it is whole."""

from __future__ import annotations

from collections.abc import Sequence

from mamba3_jepa.data.tokenizer import TextTokenizer

_CONTEXT = 8  # tokens before the first one: decoders that join words look back
_INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are not yet a character


class TextStream:
    """Decodes one sequence of ids piece by piece; the pieces joined are what the ids decode to behind `before`."""

    def __init__(self, tokenizer: TextTokenizer, before: Sequence[int] = ()) -> None:
        """`before`: ids that were read, of which nothing is given again."""
        self._tokenizer, self._ids = tokenizer, list(before[-_CONTEXT:])
        self._start, self._given = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that is certain now, perhaps none."""
        self._ids.append(token)
        piece = self._piece()
        return "" if piece.endswith(_INCOMPLETE) else self._give(piece)

    def rest(self) -> str:
        """What is left at the end, whole or not."""
        return self._give(self._piece())

    def _piece(self) -> str:
        """The text of the ids that have not been given, as it is behind those that have."""
        given = self._tokenizer.decode(self._ids[self._start : self._given])
        return self._tokenizer.decode(self._ids[self._start :])[len(given) :]

    def _give(self, piece: str) -> str:
        if piece:
            self._start, self._given = self._given, len(self._ids)
        return piece
