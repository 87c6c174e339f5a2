"""What worker processes are started with: they all see one copy of its NumPy arrays.

An index of ten million samples has 250 MB, which eight workers would hold eight times.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
from multiprocessing import context, reduction
from typing import Any

_WORTH_IT = 1 << 16  # bytes of arrays; fewer are copied
_ALIGNMENT = 64


class Spawned:
    """Wraps an argument of a process that is spawned: `content` is what arrives there, its arrays read-only.

    They lie in memory without a name in any file system, which ends with the last process that has it. Where there is
    none, each process gets a copy.
    """

    def __init__(self, content: Any) -> None:
        self._content = content
        self._packed: tuple[int, bytes, list[tuple[int, int]]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if context.get_spawning_popen() is None:
            return Spawned, (self._content,)
        if self._packed is None:
            self._packed = _packed(self._content)
        if self._packed is None:
            return _itself, (self._content,)
        descriptor, stream, places = self._packed
        return _unpacked, (reduction.DupFd(descriptor), stream, places)

    def started(self) -> None:
        """All processes that get it have been started: what only starting them needs is let go."""
        packed, self._packed = self._packed, None
        if packed is not None:
            os.close(packed[0])


def _itself(content: Any) -> Any:
    return content


def _packed(content: Any) -> tuple[int, bytes, list[tuple[int, int]]] | None:
    """A file descriptor of memory with the arrays, the rest of `content`, and where each array begins and ends."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    if sum(array.nbytes for array in arrays) < _WORTH_IT or not hasattr(reduction, "DupFd"):
        return None
    places, end = [], 0
    descriptor = None
    try:
        descriptor = _anonymous_file()
        with open(descriptor, "wb", closefd=False) as file:
            for array in arrays:
                begin = -(-end // _ALIGNMENT) * _ALIGNMENT
                end = begin + array.nbytes
                file.seek(begin)
                file.write(array)
                places.append((begin, end))
        return descriptor, stream, places
    except OSError:  # no descriptor left, or no room
        if descriptor is not None:
            os.close(descriptor)
        return None


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mamba3-jepa index")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _unpacked(passed: Any, stream: bytes, places: list[tuple[int, int]]) -> Any:
    descriptor = passed.detach()
    memory = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    os.close(descriptor)
    return pickle.loads(stream, buffers=[memory[begin:end] for begin, end in places])
