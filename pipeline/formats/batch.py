"""What every reader hands over, and the files that readers map.

Shapes: B rows, N dense columns.
"""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import DataError
from embedding.jagged import Jagged

_AROUND = 2 << 20
"""Whoever touches a page gets those around it mapped as well, at most a huge page of them."""

_OTHER_FILES = 512
"""That a process may have open besides a split's."""


@dataclass(slots=True)
class HostBatch:
    """Rows of a split in host memory.

    Attributes:
        labels: [B] float32, 0 or 1.
        dense: [B, N] float32, transformed; finite.
        keys: the categorical features, table-major.
        num_rows: B; may be 0.
    """

    labels: NDArray[np.float32]
    dense: NDArray[np.float32]
    keys: Jagged
    num_rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        arrays = (self.labels, self.dense, self.keys.keys, self.keys.offsets, self.keys.weights)
        return sum(array.nbytes for array in arrays if array is not None)


class MappedFile:
    """A file mapped read-only into memory; pages are read from disk as they are touched.

    Attributes:
        path: the file.
        data: its whole content, uint8, read-only.
    """

    def __init__(self, path: Path, num_bytes: int, unit: tuple[int, str] | None = None) -> None:
        """Map a file.

        Args:
            path: file.
            num_bytes: bytes that the manifest lists.
            unit: bytes and name of what it is a sequence of, for messages.

        Raises:
            DataError: it is missing, unreadable, truncated or oversized.
        """
        self.path = path
        self._map: mmap.mmap | None = None
        try:
            with path.open("rb") as file:
                found = path.stat().st_size
                if found != num_bytes:
                    raise DataError(size_fault(path, found, num_bytes, unit))
                if num_bytes:  # an empty file cannot be mapped
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            remedy = "restore the file or prepare the data set again"
            if error.errno == errno.EMFILE:
                remedy = "raise the limit with `ulimit -n`"
            raise DataError(f"{path}: {error.strerror or error}; {remedy}") from None
        self.data: NDArray[np.uint8] = np.frombuffer(self._map or b"", dtype=np.uint8)

    def view(self, dtype: Any) -> NDArray[Any]:
        """The content as values of ``dtype``, little-endian as the machines that this runs on."""
        values: NDArray[Any] = self.data.view(dtype)
        return values

    def opened(self) -> BinaryIO:
        """The file, opened once more for ``read_into``.

        Raises:
            DataError: it is gone.
        """
        try:
            return self.path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}; restore the file") from None

    def read_into(self, opened: BinaryIO, target: NDArray[Any], place: int, row_bytes: int) -> None:
        """Fill an array with the file's bytes from ``place`` on.

        Args:
            opened: by ``opened``.
            target: contiguous, written.
            place: first byte.
            row_bytes: of a row, for messages.

        Raises:
            DataError: the file cannot be read, or ends too early.
        """
        data = target.reshape(-1).view(np.uint8).data
        got = 0
        while got < len(data):
            at = place + got
            try:
                read = os.preadv(opened.fileno(), [data[got:]], at)
            except OSError as error:
                raise DataError(unreadable(self.path, at, row_bytes, error)) from None
            if not read:
                raise DataError(cut_short(self.path, at, row_bytes, len(data) - got))
            got += read

    def will_need(self, start: int, stop: int) -> None:
        """Ask the system to read bytes ``start .. stop`` ahead, sequentially, into its page cache."""
        if self._map is None or stop <= start or not hasattr(mmap, "MADV_WILLNEED"):
            return
        start -= start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, start, stop - start)

    def release(self, start: int, stop: int) -> None:
        """Let go of the pages before byte ``stop`` that were touched from byte ``start`` on."""
        release_pages(self._map, start, stop)


def allow_files(count: int) -> None:
    """Raise this process's soft limit of open files, often 1,024, where a split of ``count`` files may pass it.

    A mapped file keeps one open, and reading it takes up to two more.
    """
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 4 * count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard))


def release_pages(mapped: mmap.mmap | None, start: int, stop: int) -> None:
    """Let go of mapped pages up to byte ``stop`` that reading from byte ``start`` on brought in.

    Rows that have gone by need no memory. The pages stay in the system's page cache and come back when they are
    touched, but no longer count as this process's.
    """
    start = max(0, start - _AROUND)
    start -= start % mmap.PAGESIZE
    stop -= stop % mmap.PAGESIZE
    if mapped is not None and stop > start and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)


def unreadable(path: Path, at: int, row_bytes: int, error: OSError) -> str:
    """The sentence about a file that the system does not read at byte ``at``."""
    return (
        f"{path}: row {at // row_bytes} (byte {at}): cannot be read ({error.strerror}); check the disk, or restore the "
        "file"
    )


def cut_short(path: Path, at: int, row_bytes: int, missing: int) -> str:
    """The sentence about a file that ends at byte ``at`` although it was longer when it was opened."""
    return (
        f"{path}: row {at // row_bytes} (byte {at}): the file ends there, but {missing} more bytes were listed; it was "
        "cut short while it was read, copy it again"
    )


def size_fault(path: Path, found: int, expected: int, unit: tuple[int, str] | None = None) -> str:
    """The sentence about a file that is not as long as its manifest says.

    Args:
        path: the file.
        found: its bytes.
        expected: those of the manifest.
        unit: bytes and name of what it is a sequence of, such as a row, where that is of one length.
    """
    kind, where = ("truncated", found) if found < expected else ("oversized", expected)
    place = ""
    if unit is not None:
        size, name = unit
        place = f" ({'cut' if found < expected else 'ends'} at {name} {where // size}, byte {where})"
    return (
        f"{path}: {kind}, {found} bytes where the manifest needs {expected}{place}; copy the file again or prepare the "
        "data set again"
    )
