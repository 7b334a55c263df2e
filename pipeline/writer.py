"""Writes a prepared data set chunk by chunk; ``dataset.json`` comes last, so that half a set is none.

Shapes: B rows of a chunk, N dense columns, T tables, H key columns of all tables, K keys, V words of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import DataError
from embedding.jagged import Jagged
from pipeline.formats.bags import bag_offsets, to_columns, to_jagged
from pipeline.formats.output import SplitFiles, make_folders, remove_folders
from pipeline.formats.raw import encode_rows
from pipeline.manifest import (
    MANIFEST_NAME,
    Ceilings,
    DenseDtype,
    DenseInfo,
    KeyDtype,
    LabelDtype,
    Layout,
    Manifest,
    Recipe,
    SplitInfo,
    TableInfo,
    check_split_name,
    write_manifest,
)
from pipeline.replacement import left_behind, remove_left_behind


class DatasetWriter:
    """Writes a data set; a context manager that removes what it wrote when it is left before ``finish``.

    ``finish`` gives the files their names and writes the manifest: until then a set that is being replaced stays
    whole. Values are checked on the way, so that what was written can be read.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        name: str,
        dense_names: Sequence[str],
        tables: Sequence[TableInfo],
        layout: Layout = "raw",
        key_dtype: KeyDtype = "int32",
        weighted: bool = False,
        dense_dtype: DenseDtype = "float32",
        label_dtype: LabelDtype = "int32",
        overwrite: bool = False,
        direct: bool = False,
    ) -> None:
        """Make the folder.

        Args:
            directory: folder of the set; made where missing.
            name: name of the set.
            dense_names: the N dense columns.
            tables: the features; ``rows`` may be 0 until ``finish`` is told them; ``hotness`` is the number
                of key columns of Raw rows, and found out by itself in the jagged layout.
            layout: ``raw`` or ``jagged`` (strongly varying hotness).
            key_dtype: ``int64`` only for tables above 2^31 rows.
            weighted: every key has a float32 weight.
            dense_dtype: ``float32``, transformed already, or ``int32``, read as log(1 + max(x, 0)).
            label_dtype: how labels are stored.
            overwrite: replace a data set that is there.
            direct: pass the page cache by with rows that `write_rows` is handed (``output.OutputFile``).

        Raises:
            DataError: the folder holds a data set already, or cannot be made.
        """
        self.path = Path(directory)
        self._name = name
        self._dense = DenseInfo(
            names=tuple(dense_names),
            dtype=dense_dtype,
            transform="log1p_at_read" if dense_dtype == "int32" else "as_is",
        )
        self._tables = tuple(tables)
        self._layout = layout
        self._key_dtype = key_dtype
        self._weighted = weighted
        self._label_dtype = label_dtype
        self._direct = direct
        self._splits: dict[str, SplitFiles] = {}
        self._columns = np.cumsum([0, *(table.hotness for table in tables)])
        num_columns = int(self._columns[-1]) if layout == "raw" else 0
        self.row_words = 1 + len(self._dense.names) + num_columns * (np.dtype(key_dtype).itemsize // 4 + weighted)
        self._largest = np.full(len(self._tables), -1, np.int64)
        self._longest = np.zeros(len(self._tables), np.int64)
        self._missing = False
        self._open_directory(overwrite)

    def write(
        self,
        split: str,
        labels: NDArray[Any],
        dense: NDArray[Any],
        keys: NDArray[Any] | Jagged,
        weights: NDArray[np.float32] | None = None,
    ) -> None:
        """Append rows to a split.

        Args:
            split: name; the first write makes it.
            labels: [B], 0 or 1.
            dense: [B, N].
            keys: [B, H], the hotness columns of each table side by side, -1 = no key; or a ``Jagged``.
            weights: [B, H] beside an array of keys; a ``Jagged`` carries its own.

        Raises:
            DataError: shapes differ, or a value is out of range.
        """
        labels, dense = self._check_head(split, np.asarray(labels), np.asarray(dense))
        bags = keys if isinstance(keys, Jagged) else None
        if isinstance(keys, Jagged):
            weights = keys.weights
        if self._weighted != (weights is not None):
            wanted = "one for every key" if self._weighted else "none"
            raise DataError(f"split {split!r}: weights {'missing' if self._weighted else 'given'}, needs {wanted}")
        if weights is not None and not np.isfinite(weights).all():
            raise DataError(f"split {split!r}: a weight is not finite; fill or clip it before writing")
        if self._layout == "jagged":
            if bags is None:
                bags = to_jagged(self._check_columns(split, keys, labels.size), weights, self._columns)
            self._write_jagged(split, labels, dense, bags)
        else:
            if bags is not None:
                keys, weights = to_columns(bags, self._columns, split)
            columns = self._check_columns(split, keys, labels.size).astype(self._key_dtype, copy=False)
            if weights is not None:
                weights = np.where(columns >= 0, weights, 0).astype(np.float32, copy=False)
            self.write_rows(split, encode_rows(self.row_words, labels, dense, columns, weights, self._label_dtype))

    def write_rows(self, split: str, words: NDArray[np.int32]) -> None:
        """Append whole Raw rows that a caller has put together.

        The caller vouches for labels, dense values and weights; keys are checked. Of a writer that is ``direct`` the
        words must stay as they are while ``output.WRITES_BEHIND`` more calls for the same split return, or ``finish``.

        Args:
            split: name; the first write makes it.
            words: [B, V] int32, as docs/formats.md lays a row out.

        Raises:
            DataError: the shape does not fit, or a key is out of range.
        """
        if self._layout != "raw" or words.dtype != np.int32 or words.shape[1:] != (self.row_words,):
            raise DataError(
                f"split {split!r}: rows of {words.dtype} {words.shape}, but {self._layout} rows are int32 "
                f"[B, {self.row_words}]"
            )
        num_columns = int(self._columns[-1])
        if words.shape[0] and num_columns:
            from pipeline.formats import raw_numba

            smallest, largest = np.full((2, num_columns), [[2**63 - 1], [-(2**63)]], np.int64)
            first, wide = 1 + len(self._dense.names), self._key_dtype == "int64"
            raw_numba.key_range(words, first, wide, smallest, largest)
            self._note_keys(split, smallest, largest)
        files = self._split(split)
        files.files[0].write(words)
        files.rows += words.shape[0]

    def finish(
        self,
        *,
        table_rows: Mapping[str, int] | Sequence[int] | None = None,
        frequency_ordered: bool | None = None,
        licence: str = "",
        source: str = "",
        notes: Sequence[str] = (),
        ceilings: Ceilings | None = None,
        recipe: Recipe | None = None,
    ) -> Path:
        """Close the files and write ``dataset.json``.

        Args:
            table_rows: rows by table, or in table order, where the tables did not say.
            frequency_ordered: overrides what the tables say.
            licence: of the data.
            source: where the data came from.
            notes: how the values came about.
            ceilings: of a synthetic set.
            recipe: of a synthetic set whose rows ``pipeline.generator`` made.

        Returns:
            The folder.

        Raises:
            DataError: a key that was written lies outside its table.
        """
        if table_rows is not None and not isinstance(table_rows, Mapping):
            table_rows = dict(zip((table.name for table in self._tables), table_rows, strict=True))
        tables = []
        for index, table in enumerate(self._tables):
            rows = int(table_rows[table.name]) if table_rows is not None else table.rows
            if self._largest[index] >= rows:
                raise DataError(
                    f"table {table.name!r}: key {self._largest[index]} was written, but the table has {rows} rows"
                )
            tables.append(
                replace(
                    table,
                    rows=rows,
                    hotness=table.hotness if self._layout == "raw" else int(self._longest[index]),
                    frequency_ordered=table.frequency_ordered if frequency_ordered is None else frequency_ordered,
                )
            )
        splits = {
            name: SplitInfo(rows=split.rows, files=tuple(file.close(split.rows) for file in split.files))
            for name, split in self._splits.items()
        }
        manifest = Manifest(
            name=self._name,
            layout=self._layout,
            label_dtype=self._label_dtype,
            dense=self._dense,
            key_dtype=self._key_dtype,
            weighted=self._weighted,
            missing_keys=self._missing,
            tables=tuple(tables),
            splits=splits,
            licence=licence,
            source=source,
            notes=tuple(notes),
            ceilings=ceilings,
            recipe=recipe,
        )
        replaced = left_behind(self.path, manifest)
        # Gone before the first file changes: old and new files together must not pass for a set.
        (self.path / MANIFEST_NAME).unlink(missing_ok=True)
        for split in self._splits.values():
            for file in split.files:
                file.publish()
        write_manifest(self.path, manifest)
        remove_left_behind(self.path, replaced)
        self._splits.clear()
        self._made.clear()
        return self.path

    def abort(self) -> None:
        """Close and remove the files written so far, and folders made for them; nothing after ``finish``."""
        for split in self._splits.values():
            split.discard()
        self._splits.clear()
        remove_folders(self._made)
        self._made.clear()

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove what was written if the block did not get to its end."""
        self.abort()

    def _open_directory(self, overwrite: bool) -> None:
        try:
            if (self.path / MANIFEST_NAME).exists() and not overwrite:
                raise DataError(
                    f"{self.path}: holds a data set already; choose another folder, or replace it with --overwrite"
                )
            self._made = make_folders(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}; choose a folder that can be written") from None

    def _split(self, name: str) -> SplitFiles:
        if name not in self._splits:
            check_split_name(name)
            try:
                self._splits[name] = SplitFiles(
                    self.path, name, self._tables, self._layout, self._weighted, direct=self._direct
                )
            except OSError as error:
                raise DataError(
                    f"{error.filename or self.path}: {error.strerror or error}; choose a folder that can be written"
                ) from None
        return self._splits[name]

    def _check_head(self, split: str, labels: NDArray[Any], dense: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        if labels.ndim != 1 or dense.shape != (labels.size, len(self._dense.names)):
            raise DataError(
                f"split {split!r}: labels {labels.shape} and dense columns {dense.shape}, but the set needs [B] and "
                f"[B, {len(self._dense.names)}]"
            )
        if not ((labels == 0) | (labels == 1)).all():
            raise DataError(f"split {split!r}: a label is neither 0 nor 1; correct it before writing")
        if self._dense.dtype == "int32":
            if dense.size and not np.issubdtype(dense.dtype, np.integer):
                raise DataError(f"split {split!r}: dense columns are {dense.dtype}, but the set stores int32")
            return labels, dense.astype(np.int32, copy=False)
        dense = dense.astype(np.float32, copy=False)
        faulty = np.argwhere(~np.isfinite(dense))
        if faulty.size:
            b, column = faulty[0]
            raise DataError(
                f"split {split!r}: row {self._rows_so_far(split) + b}: dense column "
                f"{self._dense.names[column]!r} is {dense[b, column]}; fill or clip it before writing"
            )
        return labels, dense

    def _rows_so_far(self, split: str) -> int:
        return self._splits[split].rows if split in self._splits else 0

    def _check_columns(self, split: str, keys: Any, num_rows: int) -> NDArray[Any]:
        columns: NDArray[Any] = np.asarray(keys)
        if columns.shape != (num_rows, self._columns[-1]) or not np.issubdtype(columns.dtype, np.integer):
            raise DataError(
                f"split {split!r}: keys are {columns.dtype} {columns.shape}, but the set needs integers "
                f"[{num_rows}, {self._columns[-1]}], the hotness columns of each table side by side"
            )
        if columns.size:
            # Before they are narrowed to the stored type, where a large key would wrap.
            self._note_keys(split, columns.min(axis=0), columns.max(axis=0))
        return columns

    def _note_keys(self, split: str, smallest: NDArray[Any], largest: NDArray[Any]) -> None:
        for index, table in enumerate(self._tables):
            part = slice(self._columns[index], self._columns[index + 1])
            if part.start == part.stop:
                continue
            low, high = int(smallest[part].min()), int(largest[part].max())
            limit = table.rows or (2**31 if self._key_dtype == "int32" else 2**63)
            if low < -1 or high >= limit:
                raise DataError(
                    f"split {split!r}: key {low if low < -1 else high} of table {table.name!r} lies outside "
                    f"0 .. {limit - 1} (-1: no key)"
                )
            self._missing |= low == -1 and table.hotness == 1
            self._largest[index] = max(self._largest[index], high)

    def _write_jagged(self, split: str, labels: NDArray[Any], dense: NDArray[Any], bags: Jagged) -> None:
        num_rows, num_tables = labels.size, len(self._tables)
        if (bags.num_tables, bags.num_rows) != (num_tables, num_rows):
            raise DataError(
                f"split {split!r}: bags of {bags.num_tables} tables and {bags.num_rows} rows, but the set needs "
                f"{num_tables} and {num_rows}"
            )
        offsets = bag_offsets(bags)
        files = self._split(split)
        files.files[0].write(encode_rows(self.row_words, labels, dense, label_dtype=self._label_dtype))
        for index in range(num_tables):
            bounds = offsets[index * num_rows : (index + 1) * num_rows + 1]
            keys = bags.keys[bounds[0] : bounds[-1]]
            if keys.size:
                self._check_bag_keys(split, index, keys)
                self._longest[index] = max(self._longest[index], np.diff(bounds).max())
            parts = files.table(index)
            parts[0].write(bounds[1:] - bounds[0] + files.ends[index])
            parts[1].write(keys.astype(self._key_dtype, copy=False))
            if self._weighted:
                assert bags.weights is not None
                parts[2].write(bags.weights[bounds[0] : bounds[-1]].astype(np.float32, copy=False))
            files.ends[index] += keys.size
        files.rows += num_rows

    def _check_bag_keys(self, split: str, index: int, keys: NDArray[Any]) -> None:
        table = self._tables[index]
        limit = table.rows or (2**31 if self._key_dtype == "int32" else 2**63)
        low, high = int(keys.min()), int(keys.max())
        if low < 0 or high >= limit:
            raise DataError(
                f"split {split!r}: key {low if low < 0 else high} of table {table.name!r} lies outside 0 .. {limit - 1}"
            )
        self._largest[index] = max(self._largest[index], high)
