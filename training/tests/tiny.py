"""Tiny models with random weights, alone or as checkpoints on disk, and pictures to show them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mamba3_jepa.config import AngnConfig, preset
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.files.checkpoint import Checkpoint, DataRecord, save_checkpoint
from mamba3_jepa.models.vljepa import Mamba3Jepa

TEXTS = [
    "What colour is the circle?",
    "Is there a square?",
    "a red circle above a blue square",
    "red blue green yes no",
]
ANSWERS = ["red", "blue", "green", "yes", "no"]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30), "white": (250, 250, 250)}
GATES = AngnConfig(enabled=True)
_LATER = {1: ("y_decoder.", "recursion."), 2: ("recursion.",), 3: ()}


def tiny_model(
    phase: int = 1,
    texts: Iterable[str] | TextTokenizer = TEXTS,
    *,
    moved: bool = True,
    seed: int = 0,
    **changes: Any,
) -> Mamba3Jepa:
    """A model of preset tiny, in eval mode.

    Args:
        phase: it has the parts that this phase's checkpoints hold.
        texts: what its tokenizer is trained on, or the tokenizer.
        moved: its weights are away from the initial ones, where gates ignore their input, norms are one and the
            injector does nothing.
        changes: to the fields of its configuration.
    """
    torch.manual_seed(seed)
    tokenizer = texts if isinstance(texts, TextTokenizer) else TextTokenizer.train(texts, vocab_size=300)
    config = preset("tiny").replace(vocab_size=tokenizer.vocab_size, **changes)
    model = Mamba3Jepa(config, tokenizer, with_decoder=phase >= 2, with_recursion=phase >= 3)
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_checkpoint(path: Path, model: Mamba3Jepa, phase: int, answers: Iterable[str] = (), **fields: Any) -> Path:
    """The parts of the model that a run of `phase` saves, as the file it would leave."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_LATER[phase])}
    known: dict[str, Any] = {
        "data": DataRecord(source="test", synthetic=True, answers=list(answers)),
        "run": {"seed": 0, "val_fraction": 0.3},
    }
    checkpoint = Checkpoint(
        phase=phase, config=model.config, model=state, tokenizer=model.tokenizer.to_json(), **known | fields
    )
    save_checkpoint(path, checkpoint)
    return path


def write_images(folder: Path) -> dict[str, Path]:
    """One image of each colour, with some texture, by the name of its colour."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, colour in COLOURS.items():
        image = Image.new("RGB", (40, 32), colour)
        image.paste((0, 0, 0), (4, 4, 4 + 5 * len(name), 12))
        paths[name] = folder / f"{name}.png"
        image.save(paths[name])
    return paths
