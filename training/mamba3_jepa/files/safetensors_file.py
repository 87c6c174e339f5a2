"""safetensors files, written whole or not at all, the same bytes for the same tensors.

The library's own writer orders the metadata at random and reports a full disk only by text; the format is simple
enough to be written here (https://github.com/huggingface/safetensors#format). Reading is the library's.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mamba3_jepa.files.path_text import utf8_name
from mamba3_jepa.files.whole_file import whole_file

_ALIGNMENT = 8
_LONGEST_HEADER = 100_000_000  # bytes; the library's own limit
_READ_AT_ONCE = 4096
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """What the header of a file calls `dtype`; types that readers in other languages lack (bool) have no name."""
    return _DTYPES[dtype]


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """A file, open for reading as torch tensors, whatever its name is.

    Raises:
        OSError, SafetensorError: it is missing, damaged, or cut short.
    """
    with utf8_name(path) as name, safe_open(name, framework="pt") as file:
        yield file


@dataclass(frozen=True)
class Layout:
    """What the header of a file says. metadata: texts by name; of each tensor by name, shapes: its shape; starts: where
    its bytes begin in the file."""

    metadata: dict[str, str]
    shapes: dict[str, list[int]]
    starts: dict[str, int]


def read_layout(path: str | Path) -> Layout:
    """The header of a file, for those who read parts of its tensors by position: the library gives no positions.

    Raises:
        OSError: it cannot be read.
        ValueError, KeyError, TypeError, RecursionError: it is no such file, damaged, or cut short.
    """
    with open(path, "rb", buffering=0) as file:
        start = file.read(_READ_AT_ONCE)
        (length,) = struct.unpack("<Q", start[:8].ljust(8))
        if length > _LONGEST_HEADER:
            raise ValueError("no header")
        text = start[8 : 8 + length] + file.read(max(0, 8 + length - len(start)))
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}
        end = max((8 + length + entry["data_offsets"][1] for entry in entries.values()), default=8 + length)
        if end != os.fstat(file.fileno()).st_size:
            raise ValueError("cut short")
        return Layout(metadata, {name: entry["shape"] for name, entry in entries.items()}, starts)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to `path` through `whole_file`.

    Wide types come first, then by name, so that every tensor is aligned.

    Raises:
        UserError: the file cannot be written; what was at `path` is unchanged.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    with whole_file(path) as file:
        file.write(_header(order, tensors, metadata))
        for name in order:
            content = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(content.numpy().data)


def _header(order: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
