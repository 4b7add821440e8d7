"""Memory that a process shares with one it starts, for answers whose arrays are too large for a pipe.

A pipe carries some tens of kilobytes at a time, and each time both ends wake. The memory has no name, so that nothing is left
behind whichever end is killed. Where the system has none (it is Linux's), answers travel in the message.
"""

import mmap
import os
import pickle
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any

SIZE = 1 << 27
"""Bytes that are mapped; the system gives only those that were written to. What is larger travels in the message."""

Message = tuple[bytes, list[int]]
"""A pickled value, and the bytes of each of its arrays that lie in the memory one after the other."""


class SharedMemory:
    """Made by one process, and given to the other as an argument of its start."""

    def __init__(self, file: int | None):
        self._file = file
        self._map = None if file is None else mmap.mmap(file, SIZE)

    @classmethod
    def made(cls) -> "SharedMemory":
        """New memory, where the system has any."""
        if not hasattr(os, "memfd_create"):
            return cls(None)
        file = os.memfd_create("answers")
        os.ftruncate(file, SIZE)
        return cls(file)

    def __reduce__(self) -> tuple[Callable[..., "SharedMemory"], tuple[Any, ...]]:
        return _attached, (None if self._file is None else reduction.DupFd(self._file),)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def put(self, value: Any) -> Message:
        """Lays the arrays of `value` down, over those of the value before; the message tells the other end what is there."""
        arrays: list[pickle.PickleBuffer] = []
        head = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
        parts = [array.raw() for array in arrays]
        sizes = [part.nbytes for part in parts]
        if self._map is None or sum(sizes) > SIZE:
            return pickle.dumps(value, protocol=5), []
        at = 0
        for part, size in zip(parts, sizes, strict=True):
            self._map[at : at + size] = part
            at += size
        return head, sizes

    def take(self, message: Message) -> Any:
        """A copy of the value that the other end put there."""
        head, sizes = message
        arrays, at = [], 0
        for size in sizes:
            assert self._map is not None
            arrays.append(bytearray(memoryview(self._map)[at : at + size]))
            at += size
        return pickle.loads(head, buffers=arrays)


def _attached(file: Any) -> SharedMemory:
    return SharedMemory(None if file is None else file.detach())
