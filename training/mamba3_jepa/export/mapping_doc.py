"""WEIGHT_MAPPING.md, generated from the key map and the modules themselves.

`python -m mamba3_jepa.export.mapping_doc [FILE]` writes it.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, models

from mamba3_jepa.config import AngnConfig, preset
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.export.mapping_guide import GUIDE
from mamba3_jepa.export.mapping_text import HEADING, MEANINGS, TITLES
from mamba3_jepa.export.writer import stored_dtype
from mamba3_jepa.models.key_map import COMPONENTS, Component, exported_tensors, key_map
from mamba3_jepa.models.mamba3 import Mamba3, Mamba3Backbone
from mamba3_jepa.models.vljepa import Mamba3Jepa

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def mapping_document() -> str:
    """The whole of WEIGHT_MAPPING.md for the `small` preset, every component, gates on, three tools, 32,000 tokens."""
    model = _small_model()
    backbones = {
        "predictor": model.predictor.backbone,
        "y_encoder": model.y_encoder.backbone,
        "y_decoder": None if model.y_decoder is None else model.y_decoder.backbone,
    }
    lines = [HEADING, "", GUIDE.replace("@SPLIT@", "\n".join(_split_table(backbones))), ""]
    for component in COMPONENTS:
        lines += _section(model, component)
    return "\n".join(lines).rstrip() + "\n"


def _small_model() -> Mamba3Jepa:
    """Shapes without memory: everything on the meta device."""
    small = preset("small")
    recursion = dataclasses.replace(small.recursion, tools=["calculator", "dictionary", "memory"])
    config = small.replace(angn=AngnConfig(enabled=True), recursion=recursion)
    names = ["<pad>", "<bos>", "<eos>"] + [f"token{i}" for i in range(3, config.vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    with torch.device("meta"):
        return Mamba3Jepa(config, TextTokenizer(tokenizer), with_decoder=True, with_recursion=True)


def _section(model: Mamba3Jepa, component: Component) -> Iterator[str]:
    """One file: its tensors by pattern with their meaning, then key by key."""
    names = key_map(component, model.config)
    tensors = exported_tensors(model.state_dict(), component, model.config, "small")
    numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
    yield f"## {component}.safetensors"
    yield ""
    yield f"{TITLES[component]} {len(tensors)} tensors, {numbers:,} numbers."
    yield ""
    yield "| tensor | shape | meaning |"
    yield "|---|---|---|"
    for pattern, keys in _patterns(tensors).items():
        shape = _shape(tensors[keys[0]])
        yield f"| {_pattern_name(pattern, keys)} | {shape} | {_meaning(component, pattern)} |"
    yield ""
    yield "| key | shape | dtype | with `--dtype float16` / `bfloat16` | in PyTorch |"
    yield "|---|---|---|---|---|"
    for key, tensor in tensors.items():
        rounded = stored_dtype(key, tensor.dim(), "float16") == torch.float16
        yield f"| `{key}` | {_shape(tensor)} | F32 | {'F16 / BF16' if rounded else 'F32'} | `{names[key]}` |"
    yield ""


def _patterns(tensors: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in tensors:
        found.setdefault(_NUMBER.sub("{i}", key), []).append(key)
    return found


def _pattern_name(pattern: str, keys: list[str]) -> str:
    return f"`{pattern}`" + (f", i = 0 .. {len(keys) - 1}" if "{i}" in pattern else "")


def _meaning(component: Component, pattern: str) -> str:
    rest = pattern.removeprefix(f"{component}.")
    return MEANINGS.get(f"{component}:{rest}") or MEANINGS[rest]


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _split_table(backbones: dict[str, Mamba3Backbone | None]) -> Iterator[str]:
    """Which rows of in_proj hold what, per component."""
    yield "| rows of `in_proj.weight` | " + " | ".join(backbones) + " | what |"
    yield "|---|---|---|---|---|"
    parts = [
        ("z", "gate, (H, P)"), ("x", "values, (H, P)"), ("B", "(R, G, N)"), ("C", "(R, G, N)"),
        ("dd_dt", "(H)"), ("dd_A", "(H)"), ("trap", "(H)"), ("angle", "(S), shared by the heads"),
    ]  # fmt: skip
    for i, (name, what) in enumerate(parts):
        ranges = []
        for backbone in backbones.values():
            assert backbone is not None
            sizes = cast(Mamba3, backbone.layers[0]).split_sizes
            ranges.append(f"{sum(sizes[:i])} .. {sum(sizes[: i + 1])}")
        yield f"| {name} | {' | '.join(ranges)} | {what} |"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "WEIGHT_MAPPING.md").write_text(mapping_document(), encoding="utf-8")
