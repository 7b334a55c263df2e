"""Memory that copies for checkpoints go into: touched ahead of the first copy, and used again by the next.

A page of memory that a process uses for the first time has to be found and cleared, and where files fill the machine's
memory also taken from them: that takes up to twenty times as long as the copy itself, and the training would stand
still for it. So a thread of its own touches the memory while the training runs, and it is not given back.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_ALIGN = 64
_PAGE = 4096
_CHUNK = 64 << 20
"""Bytes touched between two looks whether that is still wanted."""


class CopyRoom:
    """Room for arrays of one copy at a time; none of its arrays may be in use when the next copy begins."""

    def __init__(self) -> None:
        """Take no memory yet."""
        self._room: Array = np.empty(0, np.uint8)
        self._used = 0
        self._toucher: threading.Thread | None = None
        self._enough = threading.Event()

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        return len(self._room)

    def prepare(self, sizes: Sequence[int]) -> None:
        """Begin to touch room for arrays of so many bytes, by a thread of its own.

        Raises:
            MemoryError: there is none.
        """
        self.begin(sizes)
        self._enough.clear()
        self._toucher = threading.Thread(target=self._touch, args=(self._room,), name="copy-room", daemon=True)
        self._toucher.start()

    def begin(self, sizes: Sequence[int]) -> None:
        """Begin a copy of arrays of so many bytes; what is too small is given back for something larger.

        Raises:
            MemoryError: there is none.
        """
        self._stop()
        self._used = 0
        needed = sum(_aligned(size) for size in sizes)
        if needed > len(self._room):
            self._room = np.empty(0, np.uint8)
            self._room = np.empty(needed, np.uint8)

    def take(self, shape: Sequence[int], dtype: Any) -> Array:
        """An array of the copy, uninitialised.

        Raises:
            ValueError: ``begin`` was told of less.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._used + size > len(self._room):
            raise ValueError(f"copy: {size} bytes more than the {len(self._room) - self._used} that are left")
        array: Array = self._room[self._used : self._used + size].view(dtype).reshape(shape)
        self._used += _aligned(size)
        return array

    @property
    def touching(self) -> bool:
        """Whether room is being touched."""
        return self._toucher is not None and self._toucher.is_alive()

    def _touch(self, room: Array) -> None:
        for start in range(0, len(room), _CHUNK):
            if self._enough.is_set():
                return
            room[start : start + _CHUNK : _PAGE] = 0

    def _stop(self) -> None:
        if self._toucher is not None:
            self._enough.set()
            self._toucher.join()
            self._toucher = None


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
