"""Raw: rows of 32-bit words, one after the other; docs/formats.md specifies it byte by byte.

Shapes: R rows of a file, V words a row, B rows of a batch, N dense columns, T tables, H key columns, K keys.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import DataError
from embedding.jagged import Jagged
from pipeline.formats.batch import HostBatch, MappedFile, allow_files
from pipeline.formats.block import reversed_hint
from pipeline.manifest import LabelDtype, Manifest, SplitInfo, row_words

Rows = NDArray[np.int64]

LABEL_ONE: dict[LabelDtype, int] = {"int32": 1, "float32": 0x3F80_0000}
"""The word of a label of 1; a label of 0 is the word 0 in either type."""


_BUFFER_BYTES = 512 << 10
"""Of rows that are read at once: a core's second-level cache holds them."""
_READ_BYTES = 256 << 10
"""Fewer are not worth opening a file."""


def _consecutive(rows: Rows) -> bool:
    """Whether rows follow one another, each once."""
    return int(rows[-1] - rows[0]) == rows.size - 1 and bool((rows[1:] > rows[:-1]).all())


class RowFiles:
    """The ``rows`` files of a split, in order: labels and dense columns of any of its rows.

    Raises:
        DataError: a file is missing, truncated or oversized.
    """

    def __init__(self, directory: Path, manifest: Manifest, split: SplitInfo) -> None:
        """Map the files; relative paths start at ``directory``."""
        self._manifest = manifest
        self._row_bytes = 4 * row_words(manifest)
        infos = [file for file in split.files if file.part == "rows"]
        allow_files(len(infos))
        self._files = [MappedFile(directory / file.path, file.bytes, (self._row_bytes, "row")) for file in infos]
        self._starts: Rows = np.cumsum([0, *(file.rows for file in infos)], dtype=np.int64)
        self._own = threading.local()
        self._words = [
            file.view(np.int32).reshape(info.rows, -1 if info.rows else row_words(manifest))
            for file, info in zip(self._files, infos, strict=True)
        ]

    def pieces(self, rows: Rows) -> Iterator[tuple[NDArray[np.int32], Rows, Rows]]:
        """For each file that ``rows`` touch: its words [R, V], the rows inside it, their rows of the batch."""
        if len(self._words) == 1:
            if rows.size:
                yield self._words[0], rows, np.arange(rows.size)
            return
        files = np.searchsorted(self._starts, rows, side="right") - 1
        for index in np.unique(files):
            places = np.flatnonzero(files == index)
            yield self._words[index], rows[places] - self._starts[index], places

    def blocks(self, rows: Rows) -> Iterator[tuple[NDArray[np.int32], Rows, Rows]]:
        """``pieces`` for whoever looks at each once: a block's words hold until the next one is asked for.

        Many rows that follow one another are read into a buffer that the near cache holds, instead of being looked up
        in the mapped file: its small pages cost more than the copy.

        Raises:
            DataError: a file cannot be read, or ends too early.
        """
        if rows.size * self._row_bytes < _READ_BYTES or not _consecutive(rows):
            yield from self.pieces(rows)
            return
        words = self._buffer()
        numbers = np.arange(len(words))
        first, past = int(rows[0]), int(rows[0]) + rows.size
        for index, file in enumerate(self._files):
            start, end = int(self._starts[index]), int(self._starts[index + 1])
            low, high = max(first, start), min(past, end)
            if low >= high:
                continue
            with file.opened() as opened:
                for row in range(low, high, len(words)):
                    count = min(len(words), high - row)
                    file.read_into(opened, words[:count], (row - start) * self._row_bytes, self._row_bytes)
                    place = row - first
                    yield words[:count], numbers[:count], np.arange(place, place + count)

    def _buffer(self) -> NDArray[np.int32]:
        """This thread's own rows [n, V]."""
        words: NDArray[np.int32] | None = getattr(self._own, "words", None)
        if words is None:
            words = np.empty((max(1, _BUFFER_BYTES // self._row_bytes), self._row_bytes // 4), np.int32)
            self._own.words = words
        return words

    def read_head(self, rows: Rows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Labels [B] and dense columns [B, N], float32.

        Raises:
            DataError: a label is neither 0 nor 1, or a dense value is not finite.
        """
        labels, dense = self.empty_head(rows.size)
        for block in self.blocks(rows):
            self.fill_head(rows, block, labels, dense)
        return labels, dense

    def empty_head(self, num_rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Room for the labels [B] and dense columns [B, N] of so many rows."""
        shape = (num_rows, len(self._manifest.dense.names))
        return np.empty(num_rows, np.float32), np.empty(shape, np.float32)

    def fill_head(
        self,
        rows: Rows,
        block: tuple[NDArray[np.int32], Rows, Rows],
        labels: NDArray[np.float32],
        dense: NDArray[np.float32],
    ) -> None:
        """Labels and dense columns of one of the ``blocks`` of ``rows``, written to their places.

        Raises:
            DataError: a label is neither 0 nor 1, or a dense value is not finite.
        """
        from pipeline.formats import raw_numba

        info, dtype = self._manifest.dense, self._manifest.label_dtype
        words, inside, places = block
        b, column = raw_numba.gather_head(
            words,
            words.view(np.float32),
            inside,
            places,
            LABEL_ONE[dtype],
            info.transform == "log1p_at_read",
            labels,
            dense,
        )
        if b < 0:
            return
        stored = self.words_of(rows[b])
        if column == 0:
            raise DataError(f"{self.place(rows[b], 'label')}: {label_fault(int(stored[0]), dtype)}")
        raise DataError(
            f"{self.place(rows[b], 'dense', column - 1)}: dense column {info.names[column - 1]!r} is "
            f"{stored.view(np.float32)[column]}; it must be finite, so fill or clip it in preparation"
        )

    def locate(self, row: int | np.int64) -> tuple[Path, int]:
        """File of a row of the split, and the row inside it (from 0)."""
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._files[index].path, int(row - self._starts[index])

    def place(self, row: int | np.int64, kind: str, column: int = 0) -> str:
        """File, row and byte of a value of a row of the split, for messages; ``byte_of`` tells the kinds."""
        path, inside = self.locate(row)
        return f"{path}: row {inside} (byte {self.byte_of(inside, kind, column)})"

    def byte_of(self, row: int, kind: str, column: int) -> int:
        """Byte of a file at which the ``label``, ``dense`` column, ``key`` or ``weight`` of one of its rows starts."""
        manifest = self._manifest
        step = 2 if manifest.key_dtype == "int64" else 1
        keys = 1 + len(manifest.dense.names)
        weights = keys + step * sum(table.hotness for table in manifest.tables)
        word = {"label": 0, "dense": 1 + column, "key": keys + step * column, "weight": weights + column}[kind]
        return row * self._row_bytes + 4 * word

    def words_of(self, row: int | np.int64) -> NDArray[np.int32]:
        """The words [V] of one row."""
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        words: NDArray[np.int32] = self._words[index][int(row - self._starts[index])]
        return words

    def will_need(self, start: int, stop: int) -> None:
        """Have rows ``start .. stop`` of the split read ahead into the page cache."""
        for file, first, last in zip(self._files, self._starts[:-1], self._starts[1:], strict=True):
            low, high = max(start, int(first)) - int(first), min(stop, int(last)) - int(first)
            file.will_need(low * self._row_bytes, high * self._row_bytes)

    def release(self, start: int, stop: int) -> None:
        """Let go of the mapped pages of rows ``start .. stop`` of the split."""
        for file, first, last in zip(self._files, self._starts[:-1], self._starts[1:], strict=True):
            low, high = max(start, int(first)) - int(first), min(stop, int(last)) - int(first)
            if high > low:
                file.release(low * self._row_bytes, high * self._row_bytes)


class RawReader:
    """Reads batches of a split in the Raw layout."""

    def __init__(self, directory: Path, manifest: Manifest, split: SplitInfo, files: RowFiles | None = None) -> None:
        """Map the files, unless ``files`` stand for them.

        Raises:
            DataError: a file is missing, truncated or oversized.
        """
        self._manifest = manifest
        self.files = files or RowFiles(directory, manifest, split)
        self._wide = manifest.key_dtype == "int64"
        self._first = 1 + len(manifest.dense.names)
        hotness = [table.hotness for table in manifest.tables]
        self._columns: Rows = np.cumsum([0, *hotness], dtype=np.int64)
        self._table_rows: Rows = np.array([table.rows for table in manifest.tables], np.int64)
        # Decided by the manifest alone, so that every rank hands over the same form.
        self._one_hot = all(count == 1 for count in hotness) and not manifest.missing_keys

    def read(self, rows: Rows) -> HostBatch:
        """Gather rows.

        Args:
            rows: [B] row numbers of the split, in any order.

        Raises:
            DataError: a label, dense value, key or weight is out of range.
        """
        if not self._one_hot or self._manifest.weighted:
            labels, dense = self.files.read_head(rows)
            return HostBatch(labels, dense, self.read_keys(rows), rows.size)
        labels, dense = self.files.empty_head(rows.size)
        keys = np.empty((self._table_rows.size, rows.size), self._manifest.key_dtype)
        for block in self.files.blocks(rows):
            self.files.fill_head(rows, block, labels, dense)
            self._fill_one_hot(rows, block, keys)
        return HostBatch(labels, dense, Jagged(keys.reshape(-1), None, None, *keys.shape), rows.size)

    def will_need(self, start: int, stop: int) -> None:
        """Have rows ``start .. stop`` read ahead into the page cache."""
        self.files.will_need(start, stop)

    def release(self, start: int, stop: int) -> None:
        """Let go of the mapped pages of rows ``start .. stop``."""
        self.files.release(start, stop)

    def read_keys(self, rows: Rows) -> Jagged:
        """The keys alone of ``read``."""
        from pipeline.formats import raw_numba

        num_tables, num_rows = self._table_rows.size, rows.size
        if self._one_hot:
            keys = np.empty((num_tables, num_rows), self._manifest.key_dtype)
            for block in self.files.blocks(rows):
                self._fill_one_hot(rows, block, keys)
            weights = None
            if self._manifest.weighted:
                pieces = list(self.files.pieces(rows))
                starts = np.arange(num_tables * num_rows).reshape(num_tables, num_rows)
                weights = self._read_weights(rows, pieces, starts, keys.size)
            return Jagged(keys.reshape(-1), None, weights, num_tables, num_rows)
        pieces = list(self.files.pieces(rows))
        counts = np.zeros((num_tables, num_rows), np.int64)
        for words, inside, places in pieces:
            b, column = raw_numba.count_keys(
                words,
                inside,
                places,
                self._first,
                self._wide,
                self._columns,
                self._table_rows,
                self._manifest.missing_keys,
                counts,
            )
            self._check_key(rows, b, column)
        offsets = np.zeros(counts.size + 1, np.int64)
        np.cumsum(counts.reshape(-1), out=offsets[1:])
        starts = offsets[:-1].reshape(num_tables, num_rows)
        keys = np.empty(offsets[-1], self._manifest.key_dtype)
        for words, inside, places in pieces:
            raw_numba.fill_keys(words, inside, places, self._first, self._wide, self._columns, starts, keys)
        return Jagged(keys, offsets, self._read_weights(rows, pieces, starts, keys.size), num_tables, num_rows)

    def _fill_one_hot(self, rows: Rows, block: tuple[NDArray[np.int32], Rows, Rows], keys: NDArray[Any]) -> None:
        """Keys [T, B] of one of the blocks of ``rows``, written to their places."""
        from pipeline.formats import raw_numba

        words, inside, places = block
        # Two narrow keys are loaded at once where every row starts at a multiple of 8 bytes.
        paired = not self._wide and words.shape[1] % 2 == 0
        pairs = words.view(np.int64) if paired else words[:0, :0].view(np.int64)
        b, column = raw_numba.gather_one_hot(
            words, pairs, inside, places, self._first, self._wide, self._table_rows, keys
        )
        self._check_key(rows, b, column)

    def _read_weights(
        self, rows: Rows, pieces: Sequence[tuple[Any, Any, Any]], starts: Rows, num_keys: int
    ) -> NDArray[np.float32] | None:
        if not self._manifest.weighted:
            return None
        from pipeline.formats import raw_numba

        weights = np.empty(num_keys, np.float32)
        for words, inside, places in pieces:
            b, column = raw_numba.fill_weights(
                words,
                words.view(np.float32),
                inside,
                places,
                self._first,
                self._wide,
                self._columns,
                starts,
                weights,
            )
            if b >= 0:
                raise DataError(
                    f"{self.files.place(rows[b], 'weight', column)}: a weight of table {self._table(column).name!r} is "
                    "not finite; correct the row"
                )
        return weights

    def _table(self, column: int) -> Any:
        return self._manifest.tables[int(np.searchsorted(self._columns, column, side="right")) - 1]

    def _check_key(self, rows: Rows, b: int, column: int) -> None:
        if b < 0:
            return
        place = self.files.place(rows[b], "key", column)
        table = self._table(column)
        words = self.files.words_of(rows[b])[self._first :]
        key = int(words[2 * column : 2 * column + 2].view(np.int64)[0]) if self._wide else int(words[column])
        if key == -1:
            raise DataError(
                f"{place}: table {table.name!r} has no key (-1), but the data set says that no key is "
                "missing; set missing_keys to true in dataset.json"
            )
        raise DataError(
            f"{place}: key {key} of table {table.name!r} lies outside its rows 0 .. {table.rows - 1}; correct the row "
            f"or the table's rows in dataset.json{reversed_hint(key, 8 if self._wide else 4, table.rows - 1)}"
        )


def label_fault(word: int, dtype: LabelDtype) -> str:
    """What is wrong with the word of a label that is neither 0 nor 1, and what it may be instead."""
    shown = np.int32(word).view(np.float32) if dtype == "float32" else word
    other: LabelDtype = "int32" if dtype == "float32" else "float32"
    remedy = "correct the row"
    if word == LABEL_ONE[other]:
        remedy = f"it is 1 as {other}, so set label_dtype to {other}"
    elif np.int32(word).byteswap() in LABEL_ONE.values():
        remedy = "it is 1 in big-endian order, but files must be little-endian"
    return f"label {shown} is neither 0 nor 1; {remedy}"


def encode_rows(
    manifest_words: int,
    labels: NDArray[Any],
    dense: NDArray[Any],
    keys: NDArray[Any] | None = None,
    weights: NDArray[np.float32] | None = None,
    label_dtype: LabelDtype = "int32",
) -> NDArray[np.int32]:
    """Put columns together to rows [B, V] of words.

    Args:
        manifest_words: V, from ``row_words``.
        labels: [B], 0 or 1.
        dense: [B, N] float32 or int32.
        keys: [B, H] int32 or int64, -1 = no key; ``None`` for the rows file of a jagged split.
        weights: [B, H] float32.
        label_dtype: how labels are stored.
    """
    num_rows = labels.shape[0]
    words = np.empty((num_rows, manifest_words), np.int32)
    words[:, 0] = np.where(labels != 0, LABEL_ONE[label_dtype], 0)
    word = 1
    for block in (dense, keys, weights):
        if block is not None and block.shape[1]:
            part = np.ascontiguousarray(block).view(np.int32)
            words[:, word : word + part.shape[1]] = part
            word += part.shape[1]
    assert word == manifest_words
    return words
