"""`mamba3-jepa lm`."""

from __future__ import annotations

import dataclasses
import sys

from mamba3_jepa.cli.output import printable, write_out
from mamba3_jepa.device import checked_device
from mamba3_jepa.errors import UserError
from mamba3_jepa.inference.continuation import Continuer
from mamba3_jepa.models.language_model import Mamba3LanguageModel
from mamba3_jepa.models.language_model_files import read_language_model_tokenizer
from mamba3_jepa.settings.language_model import LanguageModelSettings


def run_lm(settings: LanguageModelSettings) -> None:
    """Print what the model says behind each text, as it comes.

    Raises:
        UserError: the settings, the model, its tokenizer or a text cannot be used.
    """
    settings.check()
    for text in settings.texts:
        _demand_valid(text)
    device = checked_device(settings.device)
    model = Mamba3LanguageModel.from_pretrained(settings.model, a_activation=settings.a_activation, device=device)
    tokenizer = read_language_model_tokenizer(settings.model, model.config, settings.tokenizer)
    continuer = Continuer(model, tokenizer, settings.generation, str(settings.model))
    if settings.json:
        said = [(text, continuer.go_on(text)) for text in settings.texts]
        write_out([{"prompt": text, **dataclasses.asdict(continuation)} for text, continuation in said])
        return
    for number, text in enumerate(settings.texts):
        _write("\n" * (number > 0) + text)
        continuer.go_on(text, listener=_write)
        _write("\n")


def _demand_valid(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text {text!r} is not valid UTF-8") from error


def _write(text: str) -> None:
    """Text to the standard output at once; of what steers a terminal, only new lines and tabs are left."""
    sys.stdout.write("".join(each if each in "\n\t" else printable(each) for each in text))
    sys.stdout.flush()
