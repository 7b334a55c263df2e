"""The files of a split while they are written: under a name of their own until the whole set is complete.

Shapes: T tables.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest import FileInfo, Layout, Part, TableInfo

_UNFINISHED = ".part"
_HASHED_BESIDE = 1 << 20
"""Bytes from which on a block is hashed while it is written; less is not worth a thread."""
_ADVISED_BYTES, _BEHIND = 32 << 20, 256 << 20
"""How often the system is told, and how far back; so a file of up to ``_BEHIND`` stays in the page cache."""


class OutputFile:
    """One file being written, hashed on the way."""

    def __init__(self, directory: Path, relative: str, part: Part, table: str | None) -> None:
        """Open it for writing.

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
        self._hash = hashlib.sha256()
        self._made = make_folders(self._path.parent)
        self._stream = self._unfinished.open("wb", buffering=0)

    def write(self, values: NDArray[Any]) -> None:
        """Append an array, little-endian."""
        data = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
        hashing = None
        if len(data) >= _HASHED_BESIDE:
            hashing = threading.Thread(target=self._hash.update, args=(data,))
            hashing.start()
        else:
            self._hash.update(data)
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
        start = max(0, self._bytes - _BEHIND)
        if start:
            os.posix_fadvise(self._stream.fileno(), start, self._bytes - start, os.POSIX_FADV_DONTNEED)

    def close(self, rows: int) -> FileInfo:
        """Bring the file to the disk; it keeps its unfinished name until ``publish``."""
        os.fsync(self._stream.fileno())
        self._stream.close()
        return FileInfo(
            path=self.relative,
            rows=rows,
            bytes=self._bytes,
            sha256=self._hash.hexdigest(),
            part=self._part,
            table=self._table,
        )

    def publish(self) -> None:
        """Give it its name, in place of a file that has it; who maps that one keeps what it maps."""
        self._unfinished.replace(self._path)

    def discard(self) -> None:
        """Remove it, and the folders that were made for it and are empty."""
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

    def __init__(self, directory: Path, name: str, tables: Sequence[TableInfo], layout: Layout, weighted: bool) -> None:
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
                self.files.append(OutputFile(directory, relative, part, owner))
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
