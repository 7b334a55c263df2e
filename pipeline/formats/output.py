"""The files of a split while they are written: under a name of their own until the whole set is complete.

Shapes: T tables.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.checksums import Checksum
from pipeline.formats.record_files import PAGE
from pipeline.manifest import FileInfo, Layout, Part, TableInfo

_UNFINISHED = ".part"
_HASHED_BESIDE = 1 << 20
"""Bytes from which on a block is hashed while it is written; less is not worth a thread."""
_ADVISED_BYTES, CACHED_BYTES = 32 << 20, 256 << 20
"""How often the system is told, and how far back; so a file of up to ``CACHED_BYTES`` stays in the page cache."""
WRITES_BEHIND = 4
"""Direct writes that may still be under way when ``OutputFile.write`` returns."""


class OutputFile:
    """One file being written, hashed on the way.

    A direct one hands blocks to the disk from where they are, without the page cache's copy, which costs more than all
    else that a block goes through here. A thread of its own waits for the disk. That takes blocks which start at a
    multiple of ``PAGE`` and are whole pages; from the first one that is not on, or if the file system does not let the
    page cache be passed by, the file is written as any other.
    """

    def __init__(self, directory: Path, relative: str, part: Part, table: str | None, *, direct: bool = False) -> None:
        """Open it for writing.

        Args:
            directory: of the set.
            relative: path in it.
            part: what it holds.
            table: whose.
            direct: pass the page cache by; an array must then stay as it is until ``WRITES_BEHIND`` more have been
                written, or the file is closed.

        Raises:
            OSError: it cannot be made.
        """
        self.relative = relative
        self._path = directory / relative
        self._unfinished = self._path.with_name(self._path.name + _UNFINISHED)
        self._part = part
        self._table = table
        self._bytes = 0
        self._advised = 0
        self._checksum = Checksum()
        self._made = make_folders(self._path.parent)
        self._stream = self._unfinished.open("wb", buffering=0)
        self._disk: ThreadPoolExecutor | None = None
        self._under_way: deque[Future[None]] = deque()
        if direct and _pass_cache_by(self._stream.fileno(), on=True):
            self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")

    def write(self, values: NDArray[Any]) -> None:
        """Append an array, little-endian."""
        data = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
        if self._disk is None:
            self._write_cached(data.data)
            return
        if data.ctypes.data % PAGE or data.size % PAGE:
            self._end_direct()
            self._write_cached(data.data)
            return
        self._under_way.append(self._disk.submit(self._write_direct, data.data, self._bytes))
        self._bytes += data.size
        self._checksum.update(data.data)
        while len(self._under_way) > WRITES_BEHIND:
            self._under_way.popleft().result()

    def _write_cached(self, data: memoryview) -> None:
        hashing = None
        if len(data) >= _HASHED_BESIDE:
            hashing = threading.Thread(target=self._checksum.update, args=(data,))
            hashing.start()
        else:
            self._checksum.update(data)
        try:
            while data:
                written = self._stream.write(data) or 0
                self._bytes += written
                data = data[written:]
        finally:
            if hashing is not None:
                hashing.join()
        self._let_go()

    def _let_go(self) -> None:
        """Have the system write what is new of a large file, and forget what it has written of it.

        Otherwise a file takes all the memory that is free before its pages are used again, and touching memory for the
        first time may be several times slower than the disk, on virtual machines above all.
        """
        if self._bytes - self._advised < _ADVISED_BYTES or not hasattr(os, "posix_fadvise"):
            return
        self._advised = self._bytes
        start = max(0, self._bytes - CACHED_BYTES)
        if start:
            os.posix_fadvise(self._stream.fileno(), start, self._bytes - start, os.POSIX_FADV_DONTNEED)

    def _write_direct(self, data: memoryview, place: int) -> None:
        """Whole pages, to a multiple of ``PAGE``; in the disk's thread."""
        descriptor = self._stream.fileno()
        while data:
            try:
                written = os.pwrite(descriptor, data, place)
            except OSError as error:
                # Some file systems take the flag and refuse the write, or want other multiples.
                if error.errno != errno.EINVAL or not _pass_cache_by(descriptor, on=False):
                    raise
                continue
            if written % PAGE:
                _pass_cache_by(descriptor, on=False)
            place += written
            data = data[written:]

    def _end_direct(self) -> None:
        """Wait for the disk, and go on through the page cache.

        Raises:
            OSError: an earlier block could not be written.
        """
        if self._disk is None:
            return
        try:
            while self._under_way:
                self._under_way.popleft().result()
        finally:
            self._disk.shutdown(cancel_futures=True)
            self._disk = None
            self._under_way.clear()
        _pass_cache_by(self._stream.fileno(), on=False)
        self._stream.seek(self._bytes)
        self._advised = self._bytes

    def close(self, rows: int) -> FileInfo:
        """Bring the file to the disk; it keeps its unfinished name until ``publish``."""
        self._end_direct()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return FileInfo(
            path=self.relative,
            rows=rows,
            bytes=self._bytes,
            checksum=self._checksum.text(),
            part=self._part,
            table=self._table,
        )

    def publish(self) -> None:
        """Give it its name, in place of a file that has it; who maps that one keeps what it maps."""
        self._unfinished.replace(self._path)

    def discard(self) -> None:
        """Remove it, and the folders that were made for it and are empty."""
        with suppress(OSError):  # what could not be written is removed
            self._end_direct()
        self._stream.close()
        self._unfinished.unlink(missing_ok=True)
        remove_folders(self._made)


class SplitFiles:
    """The files of one split being written.

    Attributes:
        rows: samples written so far.
        files: in the order that a manifest lists them in.
        ends: [T] int64, jagged: keys of each table so far.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        tables: Sequence[TableInfo],
        layout: Layout,
        weighted: bool,
        *,
        direct: bool = False,
    ) -> None:
        """Open the files of a layout.

        Raises:
            OSError: one cannot be made; those before it are removed.
        """
        self.rows = 0
        self.files: list[OutputFile] = []
        self.ends = np.zeros(len(tables), np.int64)
        parts: list[tuple[str, Part, str | None]] = [(f"{name}.bin", "rows", None)]
        if layout == "jagged":
            kinds: tuple[Part, ...] = ("offsets", "keys", "weights") if weighted else ("offsets", "keys")
            parts = [(f"{name}/rows.bin", "rows", None)]
            for index, table in enumerate(tables):
                parts += [(f"{name}/{index:03d}.{kind}.bin", kind, table.name) for kind in kinds]
        try:
            for relative, part, owner in parts:
                self.files.append(OutputFile(directory, relative, part, owner, direct=direct))
        except OSError:
            self.discard()
            raise
        for file, (_, part, _) in zip(self.files, parts, strict=True):
            if part == "offsets":
                file.write(np.zeros(1, np.int64))

    def table(self, index: int) -> list[OutputFile]:
        """Offsets, keys and (weighted sets) weights of a table."""
        width = (len(self.files) - 1) // self.ends.size
        return self.files[1 + index * width : 1 + (index + 1) * width]

    def discard(self) -> None:
        """Remove the files."""
        for file in reversed(self.files):  # the first one knows the folder that was made for all
            file.discard()


def _pass_cache_by(descriptor: int, *, on: bool) -> bool:
    """Have the page cache passed by, or not; returns whether that is another state than before."""
    if not hasattr(os, "O_DIRECT"):
        return False
    import fcntl  # systems that pass by have it

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:  # the file system does not let it be
        return False
    return bool(flags & os.O_DIRECT) != on


def make_folders(directory: Path) -> list[Path]:
    """Make a folder and those above it that are missing; returns the ones made, the innermost first."""
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return made


def remove_folders(made: Sequence[Path]) -> None:
    """Remove folders of ``make_folders`` again, up to the first one that holds something."""
    for folder in made:
        try:
            folder.rmdir()
        except OSError:  # somebody else's file is in it by now
            return
