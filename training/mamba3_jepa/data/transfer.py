"""How a batch gets from the worker process that made it to the process that uses it.

Its pixels lie in shared memory where there is room for them. Where there is not (a container often has 64 MB of
/dev/shm), or no file descriptor is left, all of it goes through the pipe, which is slower and always works. It is made
ready in the worker's own thread: what fails in the thread of a queue is lost, and the other side waits for it.
"""

from __future__ import annotations

import logging
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from mamba3_jepa.data.batch import Batch, Failure

logger = logging.getLogger(__name__)

_SHARED_MEMORY = "/dev/shm"
_LARGE = 1 << 16  # bytes; a smaller tensor is not worth the file descriptor that it holds as long as it lives


class Parcel:
    """A batch on its way: what arrives at the other end of a queue is the batch itself."""

    def __init__(self, content: bytes, slow_because: str | None) -> None:
        """`slow_because`: why its pixels are in `content` itself; None where they are in shared memory."""
        self._content, self._slow_because = content, slow_because

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (self._content, self._slow_because)


def packed(batch: Batch | Failure) -> Parcel | Failure:
    """`batch` ready for a queue; called in a worker process."""
    if isinstance(batch, Failure):
        return batch
    values = vars(batch)
    large = {name: v for name, v in values.items() if isinstance(v, Tensor) and v.nbytes >= _LARGE}
    small = {name: _array(v) if isinstance(v, Tensor) else v for name, v in values.items() if name not in large}
    lack = _lack_of_room(sum(tensor.nbytes for tensor in large.values()))
    if lack is None:
        try:
            for tensor in large.values():
                tensor.share_memory_()
            return Parcel(bytes(ForkingPickler.dumps(small | large)), slow_because=None)
        except (OSError, RuntimeError) as error:  # others have taken the room, or there are no descriptors left
            lack = " ".join(str(error).split())
    arrays = {name: _array(tensor) for name, tensor in large.items()}
    return Parcel(pickle.dumps(small | arrays, protocol=pickle.HIGHEST_PROTOCOL), slow_because=lack)


def _lack_of_room(size: int) -> str | None:
    """Why not every worker could take `size` bytes of shared memory at this moment; None if all could.

    Asked beforehand, since on some systems writing where there is no room kills the process.
    """
    info = get_worker_info()
    needed = size * (info.num_workers if info else 1)
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except (OSError, AttributeError):  # it is organised in another way here
        return None
    free = found.f_bavail * found.f_frsize
    if free >= needed:
        return None
    return (
        f"{_SHARED_MEMORY} has {free:,} bytes free, and a batch of each worker takes {needed:,} (docker run "
        "--shm-size=1g gives a container more)"
    )


def _unpacked(content: bytes, slow_because: str | None) -> Batch:
    if slow_because is not None and not _said:
        _said.append(slow_because)
        logger.warning("batches of the data workers go through pipes, which is slower: %s", slow_because)
    values: dict[str, Any] = pickle.loads(content)
    return Batch(**{name: _tensor(value) for name, value in values.items()})


class _Bfloat16(NamedTuple):
    """A tensor of a type that NumPy lacks, as int16."""

    bits: NDArray[np.int16]


def _array(tensor: Tensor) -> NDArray[Any] | _Bfloat16:
    return _Bfloat16(tensor.view(torch.int16).numpy()) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _tensor(value: Any) -> Any:
    """Of what `_array` made of a tensor; everything else as it is."""
    if isinstance(value, _Bfloat16):
        return torch.from_numpy(value.bits).view(torch.bfloat16)
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


_said: list[str] = []
