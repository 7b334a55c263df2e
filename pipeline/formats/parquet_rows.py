"""Rows of Parquet files for training: row groups come through pyarrow, ahead of their use, as Raw rows in memory.

Shapes: B rows of a batch, R rows of a row group, V 32-bit words of a Raw row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dlrm.errors import ConfigError, DataError
from pipeline.formats.block import check_block
from pipeline.formats.parquet_block import block_of, of_manifest
from pipeline.formats.parquet_faults import check_ends, file_fault, rows_fault
from pipeline.formats.parquet_file import load_arrow
from pipeline.formats.raw import RowFiles, Rows, encode_rows
from pipeline.formats.row_groups import RowGroups
from pipeline.manifest import FileInfo, Manifest, SplitInfo, row_words

_SHARE_OF_MEMORY = 0.5
"""That two windows of decoded rows may take."""


class ParquetRows(RowFiles):
    """The Parquet files of a split as ``RowFiles``: whatever reads Raw rows reads these.

    Any row is found, but its whole row group is decoded for it. A shuffle draws from one window of rows at a time,
    whose groups are decoded once and held together with those of the next window.
    """

    def __init__(self, directory: Path, manifest: Manifest, split: SplitInfo) -> None:
        """Read the files' footers.

        Raises:
            ConfigError: pyarrow is not installed.
            DataError: a file is missing, no Parquet file, lacks a column, or has another number of rows.
        """
        self._arrow = load_arrow()
        if self._arrow is None:
            raise ConfigError(
                "data.path: training from Parquet files needs pyarrow; install it with "
                "pip install 'crosslane[parquet]', or convert them to raw"
            )
        self._manifest = manifest
        self._row_bytes = 4 * row_words(manifest)
        self._columns, self._schema = of_manifest(manifest)
        self._paths = [directory / file.path for file in split.files]
        self._footers = [self._open(path, file) for path, file in zip(self._paths, split.files, strict=True)]
        self._starts: Rows = np.cumsum([0, *(file.rows for file in split.files)], dtype=np.int64)
        sizes = [[footer.row_group(g).num_rows for g in range(footer.num_row_groups)] for footer in self._footers]
        self._group_starts: Rows = np.cumsum([0, *(size for file in sizes for size in file)], dtype=np.int64)
        self._group_files = np.repeat(np.arange(len(sizes)), [len(file) for file in sizes])
        self._first_groups = np.cumsum([0, *(len(file) for file in sizes)])
        self.groups = RowGroups(self._decode, self._group_files.size)

    def _open(self, path: Path, file: FileInfo) -> Any:
        check_ends(path)
        try:
            footer = self._arrow.parquet.read_metadata(path)
            names = set(footer.schema.to_arrow_schema().names)
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            raise file_fault(path, error) from None
        if missing := [name for name in self._columns.all if name not in names]:
            raise DataError(f"{path}: no column {missing[0]!r}; restore the file or adopt the files again")
        if footer.num_rows != file.rows:
            raise DataError(f"{path}: {footer.num_rows} rows, but {file.rows} are listed; adopt the files again")
        return footer

    def pieces(self, rows: Rows) -> Iterator[tuple[NDArray[np.int32], Rows, Rows]]:
        """See ``RowFiles.pieces``; a piece is a row group."""
        groups = np.searchsorted(self._group_starts, rows, side="right") - 1
        numbers = np.unique(groups)
        for group, words in zip(numbers, self.groups.get(numbers.tolist()), strict=True):
            places = np.flatnonzero(groups == group)
            yield words, rows[places] - self._group_starts[group], places

    def blocks(self, rows: Rows) -> Iterator[tuple[NDArray[np.int32], Rows, Rows]]:
        """See ``RowFiles.blocks``."""
        return self.pieces(rows)

    def locate(self, row: int | np.int64) -> tuple[Path, int]:
        """See ``RowFiles.locate``."""
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._paths[file], int(row - self._starts[file])

    def place(self, row: int | np.int64, kind: str, column: int = 0) -> str:
        """File and row of a value of a row of the split; a value of a column-wise file has no byte of its own."""
        del kind, column  # the messages name the column
        path, inside = self.locate(row)
        return f"{path}: row {inside}"

    def words_of(self, row: int | np.int64) -> NDArray[np.int32]:
        """See ``RowFiles.words_of``."""
        ((words, inside, _),) = self.pieces(np.array([row], np.int64))
        found: NDArray[np.int32] = words[int(inside[0])]
        return found

    def will_need(self, start: int, stop: int) -> None:
        """Have the row groups of rows ``start .. stop`` decoded ahead.

        Raises:
            ConfigError: two such windows do not fit into half of the memory.
        """
        limit = int(_SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        needed = 2 * (stop - start) * self._row_bytes
        if needed > limit:
            raise ConfigError(
                f"data.shuffle_window: two windows of {stop - start} decoded rows take {needed / 2**30:.1f} GiB, but "
                f"at most half of the memory, {limit / 2**30:.1f} GiB, may; lower it to "
                f"{limit // (2 * self._row_bytes)}, or convert the Parquet files to raw"
            )
        first, last = np.searchsorted(self._group_starts, (start, stop - 1), side="right") - 1
        self.groups.announce(range(int(first), int(last) + 1))

    def release(self, start: int, stop: int) -> None:
        """Nothing: row groups are let go of as others are asked for."""

    def _decode(self, group: int) -> NDArray[np.int32]:
        """Rows [R, V] of a row group, checked."""
        file = int(self._group_files[group])
        path, number = self._paths[file], group - int(self._first_groups[file])
        first = int(self._group_starts[group] - self._starts[file])
        footer = self._footers[file]
        try:
            with self._arrow.parquet.ParquetFile(
                path, metadata=footer, pre_buffer=True, page_checksum_verification=True
            ) as opened:
                table = opened.read_row_group(number, columns=self._columns.all, use_threads=False)
        except (self._arrow.ArrowException, OSError) as error:
            raise rows_fault(path, first, first + footer.row_group(number).num_rows, error) from None
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        block = block_of(frame.select(self._columns.all), self._columns, self._schema, path, first, rounds=True)
        check_block(block, self._schema, lambda row, *_: f"{path}: row {first + row}")
        return encode_rows(
            row_words(self._manifest), block.labels, block.dense, block.keys.astype(self._manifest.key_dtype)
        )
