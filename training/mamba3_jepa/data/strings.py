"""Many texts in little memory: 8 bytes beside the letters of each, where a list of strings has 60."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import numpy as np


class Strings:
    """A sequence of texts, file names among them that are not UTF-8."""

    def __init__(self, texts: Iterable[str]) -> None:
        content, ends = bytearray(), array("q", [0])
        for text in texts:
            content += text.encode("utf-8", "surrogateescape")
            ends.append(len(content))
        self._content = np.frombuffer(content, dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._content[self._ends[i] : self._ends[i + 1]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))
