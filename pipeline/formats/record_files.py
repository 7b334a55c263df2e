"""Raw rows as they are stored, read straight into buffers that a caller owns.

Contiguous rows come by ``preadv``: through the page cache, or past it (``O_DIRECT``), where buffer, place and length
must be multiples of the disk's block. Rows picked one by one come out of the mapped files.

Shapes: B rows that are asked for, V 32-bit words a row.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import DataError
from pipeline.formats.batch import cut_short, unreadable
from pipeline.formats.raw import LABEL_ONE, RowFiles
from pipeline.manifest import DenseTransform, Manifest, SplitInfo, row_words

Records = NDArray[np.uint32]
Bytes = NDArray[np.uint8]
Rows = NDArray[np.int64]

PAGE = 4096
"""What buffers, places and lengths are multiples of where the page cache is passed by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """Where a record's columns are, in 32-bit words: all that is needed to take a block of records apart.

    Attributes:
        words: V.
        label_one: word 0, the label, where it is 1 (int32 or float32); a label of 0 is the word 0 in either type.
        num_dense: dense columns, words 1 .. num_dense.
        dense_transform: ``as_is`` (float32) or ``log1p_at_read`` (int32, log(1 + max(x, 0))).
        first_key: word of the first key.
        key_words: words of a key, 1 (int32) or 2 (int64, low word first).
        hotness: key columns of each table, side by side in table order; -1: no key.
        table_rows: rows of each table.
        weighted: whether the weights (float32) of all key columns follow them.
        missing: whether keys may be missing.
    """

    words: int
    label_one: int
    num_dense: int
    dense_transform: DenseTransform
    first_key: int
    key_words: int
    hotness: tuple[int, ...]
    table_rows: tuple[int, ...]
    weighted: bool
    missing: bool = False

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The layout of a Raw data set's rows."""
        num_dense = len(manifest.dense.names)
        return cls(
            words=row_words(manifest),
            label_one=LABEL_ONE[manifest.label_dtype],
            num_dense=num_dense,
            dense_transform=manifest.dense.transform,
            first_key=1 + num_dense,
            key_words=2 if manifest.key_dtype == "int64" else 1,
            hotness=tuple(table.hotness for table in manifest.tables),
            table_rows=tuple(table.rows for table in manifest.tables),
            weighted=manifest.weighted,
            missing=manifest.missing_keys,
        )

    @property
    def splittable(self) -> bool:
        """Whether ``pipeline.split_records`` takes them: tables have fewer than 2^31 rows."""
        return all(rows < 2**31 for rows in self.table_rows)

    @property
    def plain(self) -> bool:
        """Whether every bag holds one key, without a weight."""
        return all(count == 1 for count in self.hotness) and not self.weighted and not self.missing


class RecordSource(Protocol):
    """Where records come from: files, or a generator.

    Attributes:
        layout: of a record.
    """

    @property
    def layout(self) -> RecordLayout: ...  # noqa: D102

    def read_runs(self, runs: Sequence[tuple[int, int]], buffer: Bytes) -> Records:
        """Read contiguous runs (first row, rows), one behind the other; safe from several threads at once.

        Args:
            runs: rows of the split, in any order of runs.
            buffer: starts at a multiple of ``PAGE``, and has ``buffer_bytes`` of their rows.

        Returns:
            [B, V], a part of ``buffer``; it need not start where the buffer does.

        Raises:
            DataError: a file cannot be read or ends too early; the message names file, row and byte.
        """
        ...

    def read_rows(self, rows: Rows, buffer: Bytes) -> Records:
        """The same for rows [B] picked one by one."""
        ...

    def place_of(self, row: int) -> str:
        """File, row and (where it has one) byte of a row of the split."""
        ...

    def close(self) -> None:
        """Let go of files."""
        ...


def buffer_bytes(layout: RecordLayout, rows: int) -> int:
    """Bytes of a buffer that any ``rows`` rows can be read into: they may start and end inside a page."""
    return -(-rows * layout.words * 4 // PAGE) * PAGE + PAGE


class RecordFiles:
    """The ``rows`` files of a Raw split as a ``RecordSource``."""

    def __init__(
        self, directory: Path, manifest: Manifest, split: SplitInfo, mapped: RowFiles, *, direct: bool
    ) -> None:
        """Files are opened as they are needed.

        Args:
            directory: relative paths start here.
            manifest: of a Raw data set.
            split: whose files.
            mapped: the same files, mapped.
            direct: pass the page cache by where the file system lets one.

        Raises:
            DataError: the layout is not Raw.
        """
        if manifest.layout != "raw":
            raise DataError(
                f"data set {directory}: layout {manifest.layout!r} has no records of one length; read decoded batches, "
                "or convert it to raw"
            )
        self.layout = RecordLayout.of(manifest)
        self._row_bytes = 4 * self.layout.words
        self._paths = [directory / file.path for file in split.files]
        self._starts: Rows = np.cumsum([0, *(file.rows for file in split.files)], dtype=np.int64)
        self._mapped = mapped
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._lock = threading.Lock()
        self._open: dict[tuple[int, bool], int] = {}
        self._scratch = threading.local()

    def read_runs(self, runs: Sequence[tuple[int, int]], buffer: Bytes) -> Records:
        """See ``RecordSource.read_runs``."""
        pieces = [piece for run in runs for piece in self._pieces(*run)]
        if len(pieces) == 1 and self._direct:
            return self._read_direct(*pieces[0], buffer)
        at = 0
        for file, first, count in pieces:
            size = count * self._row_bytes
            if self._direct:
                scratch = self._scratch_of(buffer_bytes(self.layout, count))
                records = self._read_direct(file, first, count, scratch)
                buffer[at : at + size] = records.reshape(-1).view(np.uint8)
            else:
                self._read(file, first * self._row_bytes, buffer[at : at + size], size)
            at += size
        return self._records(buffer[:at])

    def read_rows(self, rows: Rows, buffer: Bytes) -> Records:
        """See ``RecordSource.read_rows``."""
        return gather_records(self._mapped, self.layout, rows, buffer)

    def place_of(self, row: int) -> str:
        """See ``RecordSource.place_of``."""
        return self._mapped.place(row, "label")

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _records(self, data: Bytes) -> Records:
        return data.view(np.uint32).reshape(-1, self.layout.words)

    def _pieces(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """(File, first row inside it, rows) of a run that may go on in the next file."""
        pieces = []
        while count:
            file = int(np.searchsorted(self._starts, first, side="right")) - 1
            here = min(count, int(self._starts[file + 1]) - first)
            pieces.append((file, first - int(self._starts[file]), here))
            first, count = first + here, count - here
        return pieces

    def _scratch_of(self, size: int) -> Bytes:
        """This thread's own aligned buffer."""
        scratch: Bytes | None = getattr(self._scratch, "buffer", None)
        if scratch is None or scratch.size < size:
            scratch = self._scratch.buffer = page_aligned(np.empty(size + PAGE, np.uint8), size)
        return scratch

    def _read_direct(self, file: int, first: int, count: int, buffer: Bytes) -> Records:
        """Whole pages around the rows; the records start inside the first one."""
        start, stop = first * self._row_bytes, (first + count) * self._row_bytes
        low = start - start % PAGE
        high = -(-stop // PAGE) * PAGE
        try:
            self._read(file, low, buffer[: high - low], stop - low, direct=True)
        except _NotDirectError:
            self._read(file, low, buffer[: high - low], stop - low)
        return self._records(buffer[start - low : stop - low])

    def _read(self, file: int, place: int, target: Bytes, needed: int, *, direct: bool = False) -> None:
        """Fill at least the first ``needed`` bytes of ``target`` from byte ``place`` of a file.

        Raises:
            DataError: it cannot be read, or ends before.
            _NotDirectError: the file system does not let the page cache be passed by.
        """
        got = 0
        while got < needed:
            try:
                read = os.preadv(self._descriptor(file, direct=direct), [target[got:].data], place + got)
            except OSError as error:
                if direct and error.errno == errno.EINVAL:
                    raise _NotDirectError from None
                raise DataError(unreadable(self._paths[file], place + got, self._row_bytes, error)) from None
            got += read
            if not read or (direct and read % PAGE and got < needed):
                raise DataError(cut_short(self._paths[file], place + got, self._row_bytes, needed - got))

    def _descriptor(self, file: int, *, direct: bool) -> int:
        with self._lock:
            key = (file, direct)
            if key not in self._open:
                flags = os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if direct else 0)
                self._open[key] = os.open(self._paths[file], flags)
            return self._open[key]


class _NotDirectError(Exception):
    """The file system refused ``O_DIRECT``."""


class DecodedRecords:
    """Rows that become Raw rows in memory alone (Parquet) as a ``RecordSource``."""

    def __init__(self, manifest: Manifest, files: RowFiles) -> None:
        """Take over the split's rows."""
        self.layout = RecordLayout.of(manifest)
        self._files = files

    def read_runs(self, runs: Sequence[tuple[int, int]], buffer: Bytes) -> Records:
        """See ``RecordSource.read_runs``."""
        return self.read_rows(rows_of_runs(runs), buffer)

    def read_rows(self, rows: Rows, buffer: Bytes) -> Records:
        """See ``RecordSource.read_rows``."""
        return gather_records(self._files, self.layout, rows, buffer)

    def place_of(self, row: int) -> str:
        """See ``RecordSource.place_of``."""
        return self._files.place(row, "label")

    def close(self) -> None:
        """Nothing is open."""


def gather_records(files: RowFiles, layout: RecordLayout, rows: Rows, buffer: Bytes) -> Records:
    """Copy rows [B] picked one by one to the start of a buffer; returns them [B, V]."""
    records = buffer[: rows.size * layout.words * 4].view(np.uint32).reshape(-1, layout.words)
    signed = records.view(np.int32)
    for words, inside, places in files.pieces(rows):
        first = int(places[0])
        if int(places[-1]) - first == places.size - 1:  # places ascend: they are one piece
            # Row numbers were checked where they were made; "clip" spares a second pass.
            np.take(words, inside, axis=0, out=signed[first : first + places.size], mode="clip")
        else:
            signed[places] = words[inside]
    return records


def rows_of_runs(runs: Sequence[tuple[int, int]]) -> Rows:
    """The rows [B] of contiguous runs (first row, rows), one behind the other."""
    numbers = [np.arange(first, first + count, dtype=np.int64) for first, count in runs]
    return np.concatenate([*numbers, np.empty(0, np.int64)])


def page_aligned(raw: Any, size: int) -> Bytes:
    """``size`` bytes of ``raw`` (at least ``size + PAGE``, uint8) that start at a multiple of ``PAGE``."""
    start = -raw.ctypes.data % PAGE
    aligned: Bytes = raw[start : start + size]
    return aligned


def prefers_direct(num_bytes: int) -> bool:
    """Whether files of so many bytes had better pass the page cache by: they take more than half of the memory."""
    return num_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
