"""Files in order through several workers at once: one reads, one hashes, others count, in a ring of buffers."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import DataError
from pipeline.checksums import Checksum
from pipeline.formats.record_files import PAGE, page_aligned

Bytes = NDArray[np.uint8]
Work = Callable[[Bytes, int], None]
"""Called with whole units of a file, and the number of the first."""

_CHUNK_BYTES = 8 << 20
_MOST_DIRECT = 4 * _CHUNK_BYTES
_RING = 4
RING_BYTES = 2 * _RING * _CHUNK_BYTES
"""Of the buffers, and of what is made out of one chunk at a time."""


class Stream:
    """Reads files; every worker sees the chunks of a file in order, from a thread of its own.

    Memory: the ring's buffers, of about 8 MiB each, whatever a file's size.
    """

    def __init__(self, workers: int, *, direct: bool, progress: Callable[[int], None] = lambda _: None) -> None:
        """Start threads.

        Args:
            workers: most workers of a file.
            direct: pass the page cache by where the file system lets one.
            progress: called with the bytes of each chunk.
        """
        self._lanes = [ThreadPoolExecutor(1, thread_name_prefix="check") for _ in range(workers + 1)]
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._progress = progress
        self._ring: list[Bytes] = []
        self._busy: list[list[Future[None]]] = []
        self._turn = 0

    def __enter__(self) -> Self:
        """Nothing but the stream."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the threads."""
        for lane in self._lanes:
            lane.shutdown(cancel_futures=True)

    def read(self, path: Path, unit_bytes: int, works: Sequence[Work], checksum: Checksum | None) -> None:
        """Read a file.

        Args:
            path: the file.
            unit_bytes: of what must not be cut, such as a row.
            works: the workers' parts, no more than there are workers.
            checksum: gets all of its bytes.

        Raises:
            DataError: it cannot be read.
        """
        chunk = unit_bytes * max(1, _CHUNK_BYTES // unit_bytes)
        direct = self._direct and math.lcm(unit_bytes, PAGE) <= _MOST_DIRECT
        if direct:
            step = math.lcm(unit_bytes, PAGE)
            chunk = step * max(1, _CHUNK_BYTES // step)
        size, place = path.stat().st_size, 0
        try:
            descriptor = _open(path, direct=direct)
            try:
                while place < size:
                    data = self._fill(descriptor, place, min(chunk, size - place))
                    parts: list[Any] = [checksum.update] if checksum else []
                    futures = [self._lanes[-1].submit(part, data) for part in parts]
                    first = place // unit_bytes
                    for lane, work in zip(self._lanes, works, strict=False):
                        futures.append(lane.submit(work, data, first))
                    self._busy[self._turn] = futures
                    self._turn = (self._turn + 1) % _RING
                    place += data.size
                    self._progress(data.size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(
                f"{path}: byte {place}: cannot be read ({error.strerror or error}); check the disk, or restore the file"
            ) from None
        self._wait()

    def _wait(self) -> None:
        for futures in self._busy:
            for future in futures:
                future.result()

    def _fill(self, descriptor: int, place: int, wanted: int) -> Bytes:
        """Bytes of a file in the ring's next buffer, once its last ones are done with."""
        if len(self._ring) <= self._turn:
            self._ring.append(np.empty(0, np.uint8))
            self._busy.append([])
        for future in self._busy[self._turn]:
            future.result()
        room = -(-wanted // PAGE) * PAGE
        if self._ring[self._turn].size < room:
            self._ring[self._turn] = page_aligned(np.empty(room + PAGE, np.uint8), room)
        buffer, got = self._ring[self._turn], 0
        while got < wanted:
            read = os.preadv(descriptor, [buffer[got:room].data], place + got)
            if not read or (read % PAGE and got + read < wanted):
                raise OSError(0, "became shorter while it was read")
            got += read
        return buffer[:wanted]


def _open(path: Path, *, direct: bool) -> int:
    if direct:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system does not let the page cache be passed by
                raise
    return os.open(path, os.O_RDONLY)
