"""Tiny models with random weights, as checkpoints on disk, for the tests of the commands that use a trained model."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from mamba3_jepa.config import RecursionConfig, preset
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


def make_model(phase: int, knowledge_dim: int | None = None) -> Mamba3Jepa:
    """The model of a phase, its weights moved away from their initial values (the injector starts at zero)."""
    torch.manual_seed(0)
    tokenizer = TextTokenizer.train(TEXTS, vocab_size=300)
    config = preset("tiny").replace(
        vocab_size=tokenizer.vocab_size,
        max_answer_tokens=12,
        recursion=RecursionConfig(hidden_dim=16, knowledge_dim=knowledge_dim),
    )
    model = Mamba3Jepa(config, tokenizer, with_decoder=phase >= 2, with_recursion=phase >= 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_checkpoint(path: Path, model: Mamba3Jepa, phase: int, answers: list[str] | None = None) -> Path:
    """The model as the file a run of `phase` would leave."""
    data = DataRecord(source="test", synthetic=True, answers=answers or [])
    save_checkpoint(
        path,
        Checkpoint(
            phase=phase,
            config=model.config,
            model=model.state_dict(),
            tokenizer=model.tokenizer.to_json(),
            data=data,
            run={"seed": 0, "val_fraction": 0.3},
        ),
    )
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
