"""HugeCTR's Norm: a list of binary files, each with a header and samples of variable hotness.

Published in HugeCTR's Python interface document ("Dataset formats", Norm), with the check-sum framing as HugeCTR's
reader and generator have it (``CheckSum``, ``DataWriter``)::

    file list   text: the number of files, then their paths, one a line
    header      8 int64: error_check (1: framed), number_of_records, label_dim, dense_dim, slot_num, 3 reserved
    sample      label_dim float32, dense_dim float32, for each slot: int32 nnz and nnz keys of 4 (unsigned) or 8 bytes
    framed      header and each sample as: int32 length of what follows, that, 1 byte: the sum of its bytes

All little-endian. Keys of different slots must not overlap in HugeCTR, so that writers raise those of slot t by the
rows of the slots before (``offset_keys``).

Shapes: B rows, N dense columns, T tables (slots), H key columns of all tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import DataError
from pipeline.formats import norm_samples_numba
from pipeline.formats.block import (
    Block,
    DenseKind,
    Schema,
    check_block,
    make_block,
    read_sidecar,
    write_sidecar,
)
from pipeline.formats.file_list import looks_like_list, read_file_list, write_file_list
from pipeline.formats.interchange import Fit, Loss, ReadOptions, WriteOptions, cannot_hold, tables_of
from pipeline.formats.names import split_folders
from pipeline.formats.norm_file import FRAME_BYTES, HEADER_BYTES, Header, NormFile
from pipeline.formats.norm_samples import key_byte
from pipeline.manifest import KeyDtype

FILE_LIST = "file_list.txt"
_ROWS_PER_FILE = 1 << 20


class NormSource:
    """Norm files of each split."""

    def __init__(self, lists: dict[str, list[Path]], sidecar_folder: Path, options: ReadOptions) -> None:
        """Open all files; without a file beside them that says more, walk through them."""
        first = next((paths[0] for paths in lists.values() if paths), None)
        if first is None:
            raise DataError(f"{sidecar_folder}: the file lists name no file")
        header = NormFile(first, wide=False).header
        known = read_sidecar(sidecar_folder, header.num_dense, header.num_tables, options.table_rows)
        dtype = options.key_dtype or (known.key_dtype if known else _key_dtype(first))
        self._files = {split: [NormFile(path, dtype == "int64") for path in paths] for split, paths in lists.items()}
        for file in (file for files in self._files.values() for file in files):
            if (file.header.num_dense, file.header.num_tables) != (header.num_dense, header.num_tables):
                raise DataError(
                    f"{file.path}: header: {file.header.num_dense} dense columns and {file.header.num_tables} slots, "
                    f"but {first} has {header.num_dense} and {header.num_tables}"
                )
        self.splits = {split: sum(file.header.records for file in files) for split, files in self._files.items()}
        self.schema = known or self._scanned(sidecar_folder.resolve().name, header, dtype, options)
        if options.offset_keys is not None:
            self.schema = replace(self.schema, offset_keys=options.offset_keys)
        rows = self.schema.table_rows
        self._raised: NDArray[np.int64] = np.cumsum(rows) - rows if self.schema.offset_keys else np.zeros_like(rows)

    def _scanned(self, name: str, header: Header, dtype: KeyDtype, options: ReadOptions) -> Schema:
        longest = np.zeros(header.num_tables, np.int64)
        largest = np.full(header.num_tables, -1, np.int64)
        for file in (file for files in self._files.values() for file in files):
            file.scan(longest, largest)
        if options.offset_keys and options.table_rows is None:
            raise DataError(
                "--source-offset-keys: the files do not say how many rows each table has; give them with --rows"
            )
        return Schema(
            name=name or "norm",
            dense_names=tuple(f"I{n + 1}" for n in range(header.num_dense)),
            dense="float32",
            tables=tables_of(header.num_tables, options.table_rows, longest.tolist(), largest.tolist()),
            missing_keys=True,
            key_dtype=dtype,
            source="HugeCTR Norm files",
        )

    def blocks(self, split: str) -> Iterator[Block]:
        """The rows of a split in order, checked."""
        for file in self._files[split]:
            yield from self._file_blocks(file)

    def _file_blocks(self, file: NormFile) -> Iterator[Block]:
        schema, header = self.schema, file.header
        columns, size = schema.columns, schema.block_rows()
        byte = header.start
        for start in range(0, header.records, size):
            count = min(size, header.records - start)
            labels = np.empty(count, np.int32)
            dense = np.empty((count, header.num_dense), np.int32)
            keys = np.full((count, int(columns[-1])), -1, np.int64)
            starts = np.empty(count, np.int64)
            outcome, row, byte, number = norm_samples_numba.read_samples(
                file.file.data, byte, header.framed, file.wide, columns, self._raised, labels, dense, keys, starts
            )
            file.check(outcome, start + row, byte, number)
            block = make_block(labels, dense.view(np.float32), keys)
            where = _Where(file, start, starts, columns)
            yield check_block(block, schema, where)
            file.file.release(int(starts[0]), byte)
        file.check_end(byte)


@dataclass(frozen=True, slots=True)
class _Where:
    """File, row and byte of a value of a block."""

    file: NormFile
    first: int
    starts: Any
    columns: Any

    def __call__(self, row: int, kind: str, column: int) -> str:
        start = int(self.starts[row])
        header = self.file.header
        byte = start + {"label": 0, "dense": 4 + 4 * column}.get(kind, 0)
        if kind == "key":
            byte = key_byte(self.file.file.data, start, header.num_dense, self.file.wide, self.columns, column)
        return f"{self.file.path}: row {self.first + row} (byte {byte})"


def _key_dtype(path: Path) -> KeyDtype:
    """The width of keys with which a file can be walked from end to end.

    Raises:
        DataError: it can be with none, or with both to different ends.
    """
    fits: list[KeyDtype] = []
    fault: DataError | None = None
    widths: tuple[KeyDtype, ...] = ("int32", "int64")
    for dtype in widths:
        file = NormFile(path, dtype == "int64")
        try:
            file.scan(np.zeros(file.header.num_tables, np.int64), np.full(file.header.num_tables, -1, np.int64))
        except DataError as error:
            fault = fault or error
        else:
            fits.append(dtype)
    if not fits and fault is not None:
        raise fault
    return fits[0]  # both fit only where there is no key at all


class NormSink:
    """Data files and the file list of each split."""

    def __init__(self, directory: Path, schema: Schema, options: WriteOptions) -> None:
        """Files are made as rows come."""
        self._directory = directory
        self._schema = schema
        self._check_sum = options.check_sum
        self._rows_per_file = options.rows_per_file or _ROWS_PER_FILE
        self._raised = np.cumsum(schema.table_rows) - schema.table_rows if schema.offset_keys else None
        self._files: dict[str, list[str]] = {}
        self._open: BinaryIO | None = None
        self._split = ""
        self._rows = 0

    def write(self, split: str, block: Block) -> None:
        """Append rows."""
        wide = self._schema.key_dtype == "int64"
        raised = np.zeros_like(self._schema.table_rows) if self._raised is None else self._raised
        slots, num_keys = raised.size, block.keys.shape[1]
        longest = FRAME_BYTES + 4 * (1 + block.dense.shape[1] + slots) + num_keys * (8 if wide else 4)
        start = 0
        while start < block.rows:
            file = self._file(split)
            stop = min(block.rows, start + self._rows_per_file - self._rows)
            out = np.empty((stop - start) * longest, np.uint8)
            size = norm_samples_numba.write_samples(
                block.labels[start:stop],
                block.dense[start:stop].view(np.int32),
                block.keys[start:stop],
                self._schema.columns,
                raised,
                wide,
                self._check_sum,
                out,
            )
            file.write(out[:size].data)
            self._rows += stop - start
            start = stop

    def _file(self, split: str) -> BinaryIO:
        if self._open is None or split != self._split or self._rows == self._rows_per_file:
            self._end_file()
            names = self._files.setdefault(split, [])
            names.append(f"{len(names)}.data")
            (self._directory / split).mkdir(exist_ok=True)
            self._split, self._rows = split, 0
            self._open = (self._directory / split / names[-1]).open("wb")
            self._open.write(self._header())
        return self._open

    def _header(self) -> bytes:
        fields = [int(self._check_sum), self._rows, 1, len(self._schema.dense_names), len(self._schema.tables)]
        body = np.array([*fields, 0, 0, 0], "<i8").tobytes()
        if not self._check_sum:
            return body
        return np.array([HEADER_BYTES], "<i4").tobytes() + body + bytes([sum(body) % 256])

    def _end_file(self) -> None:
        if self._open is not None:
            self._open.seek(0)
            self._open.write(self._header())
        self.close()

    def finish(self) -> None:
        """Write the last header, the lists, and what they have no place for."""
        self._end_file()
        for split, names in self._files.items():
            write_file_list(self._directory / split / FILE_LIST, names)
        write_sidecar(self._directory, self._schema)

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open.close()
            self._open = None


class Norm:
    """The format."""

    name = "norm"

    def detect(self, path: Path) -> bool:
        """A file list of files that are no Parquet, or a folder with such lists."""
        lists = (
            [path] if path.is_file() else [folder / FILE_LIST for folder in split_folders(path, [FILE_LIST]).values()]
        )
        try:
            return bool(lists) and all(
                looks_like_list(file) and all(data.suffix != ".parquet" for data in read_file_list(file))
                for file in lists
            )
        except DataError:
            return False

    def read(self, path: Path, options: ReadOptions) -> NormSource:
        """Open a file list (``train``), or a folder of ``file_list.txt`` or ``<split>/file_list.txt``."""
        lists = {"train": path}
        if path.is_dir():
            lists = {split: folder / FILE_LIST for split, folder in split_folders(path, [FILE_LIST]).items()}
        if not lists:
            raise DataError(f"{path}: no {FILE_LIST} in it or in its folders; name a file list")
        folder = path if path.is_dir() else path.parent
        return NormSource({split: read_file_list(file) for split, file in lists.items()}, folder, options)

    def fit(self, schema: Schema, options: WriteOptions) -> Fit:
        """Float dense columns, keys without weights."""
        losses: set[Loss] = {"weights"} if schema.weighted else set()
        if schema.counts:
            losses.add("log1p-dense")
        rows = schema.table_rows
        most = int(rows.sum() if options.offset_keys else rows.max(initial=1))
        narrowest: KeyDtype = "int32" if most <= 2**32 else "int64"
        if options.key_dtype == "int32" and narrowest == "int64":
            cannot_hold("norm with keys of 4 bytes", f"keys up to {most - 1}", "use --key-dtype int64")
        dense: DenseKind = "float32"
        kept = replace(schema, dense=dense, weighted=False, missing_keys=True, key_dtype=options.key_dtype or narrowest)
        return Fit(replace(kept, offset_keys=options.offset_keys), frozenset(losses))

    def write(self, directory: Path, schema: Schema, options: WriteOptions) -> NormSink:
        """Start writing."""
        return NormSink(directory, schema, options)


NORM = Norm()
