"""TorchRec's Criteo arrays: for each day or split a triple of .npy files.

Published with TorchRec's ``BinaryCriteoUtils`` and ``InMemoryBinaryCriteoIterDataPipe``: ``<name>_dense.npy`` float32
[R, N], transformed; ``<name>_labels.npy`` int32 [R, 1]; ``<name>_sparse.npy`` int32 [R, T], or, for fixed multi-hot,
``<name>_sparse_multi_hot.npz`` with arrays ``0`` ... ``T-1`` of [R, hotness].

Shapes: R rows of a file, N dense columns, T tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DataError
from pipeline.formats.arrays import NpyWriter, StoredArray, largest_keys, npz_names, open_npy, open_npz, write_npz
from pipeline.formats.block import Block, DenseKind, Schema, check_block, make_block, read_sidecar, write_sidecar
from pipeline.formats.interchange import Fit, Loss, ReadOptions, WriteOptions, cannot_hold, key_dtype_of, tables_of
from pipeline.formats.names import day_order, split_name

_DENSE, _SPARSE, _MULTI_HOT, _LABELS = "_dense.npy", "_sparse.npy", "_sparse_multi_hot.npz", "_labels.npy"
_SCANNED_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class _Triple:
    """The arrays of one name: [R, N], [R, 1] or [R], and the tables' key columns, in one array or in one each."""

    dense: StoredArray
    labels: StoredArray
    keys: list[StoredArray]

    @property
    def rows(self) -> int:
        return int(self.labels.values.shape[0])

    @property
    def hotness(self) -> list[int]:
        """Key columns of each table."""
        if len(self.keys) == 1 and not self.keys[0].name.endswith(": 0"):
            return [1] * self.keys[0].values.shape[1]
        return [array.values.shape[1] for array in self.keys]


def _open_triple(folder: Path, name: str) -> _Triple:
    dense, labels = open_npy(folder / (name + _DENSE)), open_npy(folder / (name + _LABELS))
    dense.expect("f", (None, None))
    rows = dense.values.shape[0]
    labels.expect("iuf", (rows, 1) if labels.values.ndim == 2 else (rows,))
    if dense.values.dtype.itemsize > 4:
        raise DataError(f"{dense.name}: values of {dense.values.dtype}, but TorchRec's are float32; write them so")
    if (folder / (name + _SPARSE)).is_file():
        keys = [open_npy(folder / (name + _SPARSE))]
    else:
        path = folder / (name + _MULTI_HOT)
        count = len(npz_names(path))
        keys = list(open_npz(path, [str(t) for t in range(count)]).values())
    for array in keys:
        array.expect("i", (rows, None))
    return _Triple(dense, labels, keys)


class TorchrecSource:
    """The triples of each split, in order."""

    def __init__(self, folder: Path, names: dict[str, list[str]], options: ReadOptions) -> None:
        """Open all arrays; without a file beside them that says more, look for the largest keys."""
        self._triples = {split: [_open_triple(folder, name) for name in parts] for split, parts in names.items()}
        every = [triple for parts in self._triples.values() for triple in parts]
        num_dense, hotness = every[0].dense.values.shape[1], every[0].hotness
        for triple in every:
            if (triple.dense.values.shape[1], triple.hotness) != (num_dense, hotness):
                raise DataError(
                    f"{triple.dense.name}: {triple.dense.values.shape[1]} dense columns and {sum(triple.hotness)} key "
                    f"columns, but {every[0].dense.name} has {num_dense} and {sum(hotness)}"
                )
        self.splits = {split: sum(triple.rows for triple in parts) for split, parts in self._triples.items()}
        self.schema = read_sidecar(folder, num_dense, len(hotness), options.table_rows) or self._found(
            folder, num_dense, hotness, every, options
        )

    @staticmethod
    def _found(folder: Path, num_dense: int, hotness: list[int], every: list[_Triple], options: ReadOptions) -> Schema:
        columns = np.cumsum([0, *hotness])
        largest = [-1] * len(hotness)
        if options.table_rows is None:
            per_array = [
                largest_keys([triple.keys[a] for triple in every], _SCANNED_ROWS) for a in range(len(every[0].keys))
            ]
            flat = [key for keys in per_array for key in keys]
            largest = [max(flat[start:stop]) for start, stop in pairwise(columns.tolist())]
        tables = tables_of(len(hotness), options.table_rows, hotness, largest)
        return Schema(
            name=folder.resolve().name or "torchrec",
            dense_names=tuple(f"I{n + 1}" for n in range(num_dense)),
            dense="float32",
            tables=tables,
            key_dtype=key_dtype_of(max((table.rows for table in tables), default=1)),
            source="TorchRec's Criteo arrays",
        )

    def blocks(self, split: str) -> Iterator[Block]:
        """The rows of a split in order, checked."""
        size = self.schema.block_rows()
        for triple in self._triples[split]:
            for start in range(0, triple.rows, size):
                part = slice(start, min(triple.rows, start + size))
                keys = [array.values[part] for array in triple.keys]
                joined = keys[0] if len(keys) == 1 else np.concatenate(keys, axis=1) if keys else np.empty((0, 0))
                labels = triple.labels.values[part].reshape(-1)
                block = make_block(_whole(labels), triple.dense.values[part], joined)
                yield check_block(block, self.schema, _Where(triple, start))
                for array in (triple.labels, triple.dense, *triple.keys):
                    array.release(part.start, part.stop)


def _whole(labels: Any) -> Any:
    """Labels as integers; what is none becomes -1, which no label is."""
    if labels.dtype.kind != "f":
        return labels
    return np.where((labels == 0) | (labels == 1), labels, -1).astype(np.int32)


@dataclass(frozen=True, slots=True)
class _Where:
    """File, row and byte of a value of a block."""

    triple: _Triple
    first: int

    def __call__(self, row: int, kind: str, column: int) -> str:
        array = {"label": self.triple.labels, "dense": self.triple.dense}.get(kind)
        if array is None:
            for array in self.triple.keys:
                if column < array.values.shape[1]:
                    break
                column -= array.values.shape[1]
        assert array is not None
        return array.where(self.first + row, column)


class TorchrecSink:
    """A triple for each split."""

    def __init__(self, directory: Path, schema: Schema) -> None:
        """Files are made by the first row of a split."""
        self._directory = directory
        self._schema = schema
        self._columns = schema.columns
        self._multi_hot = any(table.hotness > 1 for table in schema.tables)
        self._files: dict[str, list[NpyWriter]] = {}
        self._rows: dict[str, int] = {}

    def write(self, split: str, block: Block) -> None:
        """Append rows; every bag has as many keys as its table's hotness."""
        if (block.keys < 0).any():
            row, column = np.argwhere(block.keys < 0)[0]
            table = self._schema.tables[int(np.searchsorted(self._columns, column, side="right")) - 1]
            raise DataError(
                f"split {split!r}: row {self._rows.get(split, 0) + row}: table {table.name!r} lacks a key, but "
                "torchrec-npy has no place for that; choose another format"
            )
        dense, labels, *keys = self._files.get(split) or self._open(split)
        dense.write(block.dense)
        labels.write(block.labels.reshape(-1, 1))
        if self._multi_hot:
            for file, start, stop in zip(keys, self._columns[:-1], self._columns[1:], strict=True):
                file.write(block.keys[:, start:stop])
        else:
            keys[0].write(block.keys)
        self._rows[split] = self._rows.get(split, 0) + block.rows

    def _open(self, split: str) -> list[NpyWriter]:
        start = str(self._directory / split)
        hotness = [table.hotness for table in self._schema.tables]
        files = self._files[split] = []
        files.append(NpyWriter(Path(start + _DENSE), "<f4", len(self._schema.dense_names)))
        files.append(NpyWriter(Path(start + _LABELS), "<i4", 1))
        if self._multi_hot:
            for t, count in enumerate(hotness):
                files.append(NpyWriter(Path(f"{start}.{t}.part"), "<i4", count))
        else:
            files.append(NpyWriter(Path(start + _SPARSE), "<i4", len(hotness)))
        return files

    def finish(self) -> None:
        """Write the headers, and what the arrays have no place for."""
        for split, files in self._files.items():
            for file in files:
                file.finish()
            if self._multi_hot:
                members = {str(t): file.path for t, file in enumerate(files[2:])}
                write_npz(self._directory / (split + _MULTI_HOT), members)
        write_sidecar(self._directory, self._schema)

    def close(self) -> None:
        """Close the files."""
        for files in self._files.values():
            for file in files:
                file.close()


class TorchrecNpy:
    """The format."""

    name = "torchrec-npy"

    def detect(self, path: Path) -> bool:
        """A folder of triples, or the first file of one."""
        return bool(_names(path))

    def read(self, path: Path, options: ReadOptions) -> TorchrecSource:
        """Open a folder: ``day_0_*`` ... are all ``train``, other names are splits; or one triple by its dense file."""
        names = _names(path)
        if not names:
            raise DataError(f"{path}: no *{_DENSE} in it; name a folder of TorchRec's arrays")
        return TorchrecSource(path if path.is_dir() else path.parent, names, options)

    def fit(self, schema: Schema, options: WriteOptions) -> Fit:  # noqa: ARG002 - has no options
        """Float dense columns, keys of 32 bits."""
        losses: set[Loss] = {"weights"} if schema.weighted else set()
        if schema.counts:
            losses.add("log1p-dense")
        for table in schema.tables:
            if table.rows > 2**31:
                cannot_hold(self.name, f"table {table.name!r} of {table.rows} rows", "its keys have 32 bits")
        dense: DenseKind = "float32"
        kept = replace(schema, dense=dense, weighted=False, missing_keys=False, key_dtype="int32", offset_keys=False)
        return Fit(kept, frozenset(losses))

    def write(self, directory: Path, schema: Schema, options: WriteOptions) -> TorchrecSink:  # noqa: ARG002
        """Start writing."""
        return TorchrecSink(directory, schema)


def _names(path: Path) -> dict[str, list[str]]:
    """What triples are called, by split and in order."""
    if path.is_file():
        return {"train": [path.name.removesuffix(_DENSE)]} if path.name.endswith(_DENSE) else {}
    found = [file.name.removesuffix(_DENSE) for file in path.glob("*" + _DENSE)]
    names: dict[str, list[str]] = {}
    for name in sorted(found, key=lambda name: (day_order(name) or 0, name)):
        names.setdefault("train" if day_order(name) is not None else split_name(name), []).append(name)
    return names


TORCHREC_NPY = TorchrecNpy()
