"""Jagged: offsets and keys of each table in files of their own; docs/formats.md specifies it byte by byte.

Shapes: R rows of a split, B rows of a batch, T tables, K keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import DataError
from embedding.jagged import Jagged
from pipeline.formats.batch import HostBatch, MappedFile
from pipeline.formats.block import reversed_hint
from pipeline.formats.raw import RowFiles, Rows
from pipeline.manifest import Manifest, SplitInfo, TableInfo, unit_of


class _TableFiles:
    """Offsets, keys and weights of one table."""

    def __init__(self, directory: Path, manifest: Manifest, split: SplitInfo, table: TableInfo) -> None:
        files = {
            file.part: MappedFile(directory / file.path, file.bytes, unit_of(manifest, file.part))
            for file in split.files
            if file.table == table.name
        }
        self.table = table
        self.path = files["keys"].path
        self.bounds_path = files["offsets"].path
        self._files = files
        self.bounds: Rows = files["offsets"].view(np.int64)
        if self.bounds[0] != 0:
            raise DataError(
                f"{self.bounds_path}: row 0 (byte 0): the first offset is {int(self.bounds[0])}, but bags start at "
                "key 0; prepare the data set again"
            )
        itemsize = np.dtype(manifest.key_dtype).itemsize
        count, last = files["keys"].data.size // itemsize, int(self.bounds[-1])
        if files["keys"].data.size != last * itemsize:
            raise DataError(
                f"{self.path}: {files['keys'].data.size} bytes, but the last offset of {self.bounds_path} (byte "
                f"{8 * (self.bounds.size - 1)}) asks for {last} keys of {itemsize} bytes; prepare the data set again"
                + reversed_hint(last, 8, count)
            )
        self.keys: NDArray[Any] = files["keys"].view(manifest.key_dtype)
        self.weights: NDArray[Any] | None = None
        if manifest.weighted:
            if files["weights"].data.size != 4 * self.keys.size:
                raise DataError(
                    f"{files['weights'].path}: {files['weights'].data.size} bytes, but {self.keys.size} keys need "
                    f"{4 * self.keys.size}; prepare the data set again"
                )
            self.weights = files["weights"].view(np.float32)

    def count(self, rows: Rows, counts: Rows) -> None:
        from pipeline.formats import jagged_numba

        b = jagged_numba.count_bags(self.bounds, rows, self.keys.size, self.table.hotness, counts)
        if b >= 0:
            row = int(rows[b])
            raise DataError(
                f"{self.bounds_path}: row {row} (byte {8 * row}): offsets {int(self.bounds[row])} and "
                f"{int(self.bounds[row + 1])} are not a bag of at most {self.table.hotness} among {self.keys.size} "
                "keys; prepare the data set again" + reversed_hint(int(self.bounds[row + 1]), 8, self.keys.size)
            )

    def release(self, start: int, stop: int) -> None:
        """Let go of the mapped pages of rows ``start .. stop``."""
        first, last = int(self.bounds[start]), int(self.bounds[stop])
        self._files["offsets"].release(8 * start, 8 * stop)
        self._files["keys"].release(first * self.keys.itemsize, last * self.keys.itemsize)
        if self.weights is not None:
            self._files["weights"].release(4 * first, 4 * last)

    def copy(self, rows: Rows, starts: Rows, keys: NDArray[Any], weights: NDArray[np.float32] | None) -> None:
        from pipeline.formats import jagged_numba

        b, place = jagged_numba.copy_bags(self.bounds, self.keys, rows, self.table.rows, starts, keys)
        if b >= 0:
            raise DataError(
                f"{self.path}: row {rows[b]} (byte {self.keys.itemsize * place}): key {self.keys[place]} of table "
                f"{self.table.name!r} lies outside its rows 0 .. {self.table.rows - 1}; correct the row or the "
                "table's rows in dataset.json"
                + reversed_hint(int(self.keys[place]), self.keys.itemsize, self.table.rows - 1)
            )
        if weights is not None:
            b, place = jagged_numba.copy_weights(self.bounds, self.weights, rows, starts, weights)
            if b >= 0:
                raise DataError(
                    f"{self._files['weights'].path}: row {rows[b]} (byte {4 * place}): a weight of table "
                    f"{self.table.name!r} is not finite; correct the row"
                )


class JaggedReader:
    """Reads batches of a split in the jagged layout."""

    def __init__(self, directory: Path, manifest: Manifest, split: SplitInfo) -> None:
        """Map the files.

        Raises:
            DataError: a file is missing, truncated or oversized, or offsets and keys do not fit each other.
        """
        self._manifest = manifest
        self.files = RowFiles(directory, manifest, split)
        self._tables = [_TableFiles(directory, manifest, split, table) for table in manifest.tables]

    def read(self, rows: Rows) -> HostBatch:
        """Gather rows.

        Args:
            rows: [B] row numbers of the split, in any order.

        Raises:
            DataError: a label, dense value, key, weight or offset is out of range.
        """
        labels, dense = self.files.read_head(rows)
        return HostBatch(labels, dense, self.read_keys(rows), rows.size)

    def read_keys(self, rows: Rows) -> Jagged:
        """The keys alone of ``read``."""
        num_tables, num_rows = len(self._tables), rows.size
        counts = np.zeros((num_tables, num_rows), np.int64)
        for table, part in zip(self._tables, counts, strict=True):
            table.count(rows, part)
        offsets = np.zeros(counts.size + 1, np.int64)
        np.cumsum(counts.reshape(-1), out=offsets[1:])
        keys = np.empty(offsets[-1], self._manifest.key_dtype)
        weights = np.empty(offsets[-1], np.float32) if self._manifest.weighted else None
        for table, starts in zip(self._tables, offsets[:-1].reshape(num_tables, num_rows), strict=True):
            table.copy(rows, starts, keys, weights)
        return Jagged(keys, offsets, weights, num_tables, num_rows)

    def will_need(self, start: int, stop: int) -> None:
        """Have labels and dense columns of rows ``start .. stop`` read ahead into the page cache."""
        self.files.will_need(start, stop)

    def release(self, start: int, stop: int) -> None:
        """Let go of the mapped pages of rows ``start .. stop``."""
        self.files.release(start, stop)
        for table in self._tables:
            table.release(start, stop)
