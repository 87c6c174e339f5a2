"""What `on_bad_sample` skip leaves out: each bad sample is counted and said once, however many passes meet it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from mamba3_jepa.data.splits import stable_hash

logger = logging.getLogger(__name__)


class LeftOut:
    """The bad samples met so far, by what was wrong with them: that names the sample."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._noted: list[str] = []

    def __len__(self) -> int:
        return len(self._known)

    def note(self, bad: Iterable[str]) -> None:
        """Keep the messages `bad` for the next `say`."""
        self._noted += bad

    def say(self, where: str, bad: Iterable[str]) -> None:
        """Warn of those of the messages `bad` that are new; nothing is said if none is."""
        new = {stable_hash(message): message for message in (*self._noted, *bad)}
        self._noted = []
        new = {key: message for key, message in new.items() if key not in self._known}
        if not new:
            return
        before, first = len(self._known), next(iter(new.values()))
        self._known.update(new)
        so_far = f" ({len(self._known)} so far)" if before else ""
        logger.warning("%s: %d bad samples skipped%s, the first: %s", where, len(new), so_far, first)
