"""Files of `torch.save` by other programs: tensors, numbers and texts are read, nothing in them is run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mamba3_jepa.errors import UserError


class _NumpyValue:
    """Stands for a number or an array of NumPy's, which is neither needed nor made."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


# Numbers of NumPy's lie beside the weights in many checkpoints: a loss, a learning rate. torch refuses them all.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_NumpyValue, f"numpy.{name}")
    for name in (
        "core.multiarray.scalar", "_core.multiarray.scalar", "core.multiarray._reconstruct",
        "_core.multiarray._reconstruct", "dtype", "ndarray",
    )
]  # fmt: skip


def read_torch_file(path: Path) -> Any:
    """What a file holds, on the CPU, its tensors mapped from the disk where the format allows; in the place of what
    is NumPy's stands something that is no tensor.

    Raises:
        UserError: it is missing, damaged, or holds what would have to be run.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            is_pickle = file.read(1) == b"\x80"  # as torch's older format is
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    is_zip = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)  # only zip can be mapped
    except pickle.UnpicklingError as error:
        if not is_zip and not is_pickle:
            raise UserError(_damaged(path, error)) from error
        raise UserError(f"{path}: holds more than tensors, numbers and texts; none of it was run") from error
    except Exception as error:  # what is no file of torch's can make the unpickler raise almost anything
        raise UserError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{path} ({path.stat().st_size} bytes): cut short, or no file of torch's: {said}"
