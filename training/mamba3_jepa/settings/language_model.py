"""Settings of `lm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mamba3_jepa.config import AActivation
from mamba3_jepa.errors import UserError
from mamba3_jepa.settings.common import Device
from mamba3_jepa.settings.inference import GenerationConfig
from mamba3_jepa.settings.limits import Checked

_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
_Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")]


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings(Checked):
    """Which language model is to go on from which texts."""

    texts: tyro.conf.Positional[_Texts] = ()
    """Texts to go on from, each by itself; an empty one starts from nothing."""
    model: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """An official Mamba-3 language model: a folder with config.json, the weights and tokenizer.json."""
    tokenizer: _Path = None
    """The tokenizer.json that the model was trained with, where it is not in the folder."""
    a_activation: AActivation = "heavy_tail"
    """A activation that the model was trained with, which its files do not say; with the wrong one the text is
    noise."""
    device: Device = "auto"
    json: bool = False
    """Print JSON, when all is said, rather than the text as it comes."""
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = field(default_factory=GenerationConfig)

    def check(self) -> None:
        """Raise UserError where there is nothing to do."""
        if not self.texts:
            raise UserError('nothing to go on from: give a text, such as "The capital of France is"')
