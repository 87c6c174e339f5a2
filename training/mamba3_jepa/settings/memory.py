"""Settings of `mamba3-jepa memory ...`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mamba3_jepa.errors import UserError
from mamba3_jepa.settings.common import Json
from mamba3_jepa.settings.inference import ModelSettings, demand_words, demand_words_in_each
from mamba3_jepa.settings.limits import Checked

_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
_File = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE")]]
_Facts = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")]]
_Numbers = tyro.conf.Positional[Annotated[tuple[int, ...], tyro.conf.arg(metavar="NUMBER ...")]]


def _demand_memory(file: Path) -> None:
    if file.suffix != ".safetensors":
        raise UserError(f"{file}: the name of a memory must end in .safetensors")


@dataclass(frozen=True, kw_only=True)
class MemoryAddSettings(ModelSettings):
    """What to remember, and where."""

    file: _File
    """The memory, a .safetensors file; it is made if it is not there."""
    facts: _Facts = ()
    """Sentences to remember."""
    texts: _Path = None
    """Remember every line of this text file."""
    image: _Path = None
    """Remember what was asked about this image (--question) and what is right (--answer)."""
    question: _Text = None
    """What was asked; without it, the prompt for describing an image."""
    answer: _Text = None
    """The right answer."""
    json: Json = False

    def check(self) -> None:
        """Raise UserError for contradictory or impossible settings."""
        _demand_memory(self.file)
        is_seen = self.image is not None or self.question is not None
        if self.answer is None and is_seen:
            raise UserError("`image` and `question` are remembered with their `answer`; give it")
        if self.answer is not None and not is_seen:
            raise UserError("`answer`: to what? Give an `image`, a `question`, or both")
        if not self.facts and self.texts is None and self.answer is None:
            raise UserError("nothing to remember: give sentences, `texts`, or `image`, `question` and `answer`")
        demand_words_in_each("sentence", self.facts)
        demand_words(question=self.question, answer=self.answer)


@dataclass(frozen=True, kw_only=True)
class MemoryListSettings(Checked):
    """Which memory to look into."""

    file: _File
    """The memory, a .safetensors file."""
    json: Json = False

    def check(self) -> None:
        """Raise UserError for a file of another name."""
        _demand_memory(self.file)


@dataclass(frozen=True, kw_only=True)
class MemoryRemoveSettings(Checked):
    """What to forget."""

    file: _File
    """The memory, a .safetensors file."""
    numbers: _Numbers = ()
    """Numbers of entries, as memory list gives them."""
    text: _Text = None
    """Remove what has this text; of an episode it is question and answer, as memory list shows it."""
    json: Json = False

    def check(self) -> None:
        """Raise UserError for contradictory settings."""
        _demand_memory(self.file)
        if bool(self.numbers) == (self.text is not None):
            raise UserError("give the numbers of what to remove, or its `text`")
