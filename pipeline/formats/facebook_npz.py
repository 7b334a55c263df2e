"""facebookresearch/dlrm's .npz: counts ``X_int`` [R, N], keys ``X_cat`` [R, T] and labels ``y`` [R].

Published with its ``data_utils.py`` (``*_reordered.npz`` of each day, ``*_processed.npz`` of all with ``counts`` [T],
the rows of each table). The loader there reads log(x + 1) of the counts, which are 0 where missing or negative. Its own
files hold int32, or float64 whose values are whole.

Shapes: R rows of a file, N dense columns, T tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DataError
from pipeline.formats.arrays import NpyWriter, StoredArray, is_damaged_npz, largest_keys, npz_names, open_npz, write_npz
from pipeline.formats.block import Block, DenseKind, Schema, check_block, make_block, read_sidecar, write_sidecar
from pipeline.formats.interchange import Fit, Loss, ReadOptions, WriteOptions, cannot_hold, key_dtype_of, tables_of
from pipeline.formats.names import day_order, split_name

_INT, _CAT, _LABEL, _COUNTS = "X_int", "X_cat", "y", "counts"
_SCANNED_ROWS = 1 << 16
_STEM_ENDS = ("_reordered", "_processed")


class FacebookSource:
    """The files of each split, in order; each is opened when its rows are asked for."""

    def __init__(self, folder: Path, files: dict[str, list[Path]], options: ReadOptions) -> None:
        """Look into every file for its shape, and for the rows of the tables where nothing tells them."""
        self._files = files
        self.splits: dict[str, int] = {}
        shape: tuple[int, int] | None = None
        largest: list[int] = []
        told = options.table_rows
        for split, paths in files.items():
            self.splits[split] = 0
            for path in paths:
                arrays = _open(path)
                found = (arrays[_INT].values.shape[1], arrays[_CAT].values.shape[1])
                if shape not in (None, found):
                    raise DataError(f"{path}: {found[0]} dense columns and {found[1]} tables, but others have {shape}")
                shape = found
                self.splits[split] += arrays[_LABEL].values.shape[0]
                if told is None:
                    keys = _largest(path, arrays[_CAT])
                    largest = [max(pair) for pair in zip(largest or keys, keys, strict=True)]
        assert shape is not None
        num_dense, num_tables = shape
        known = read_sidecar(folder, num_dense, num_tables, told)
        tables = tables_of(num_tables, told, [1] * num_tables, largest or [-1] * num_tables)
        dense: DenseKind = "natural"
        self.schema = known or Schema(
            name=folder.resolve().name or "dlrm",
            dense_names=tuple(f"I{n + 1}" for n in range(num_dense)),
            dense=dense,
            tables=tables,
            key_dtype=key_dtype_of(max((table.rows for table in tables), default=1)),
            source="npz of facebookresearch/dlrm",
        )

    def blocks(self, split: str) -> Iterator[Block]:
        """The rows of a split in order, checked."""
        size = self.schema.block_rows()
        for path in self._files[split]:
            arrays = _open(path)
            rows = arrays[_LABEL].values.shape[0]
            for start in range(0, rows, size):
                part = slice(start, min(rows, start + size))
                labels, dense, keys = (_whole(arrays[name], part) for name in (_LABEL, _INT, _CAT))
                if (dense < 0).any():
                    row, column = (int(place) for place in np.argwhere(dense < 0)[0])
                    raise DataError(
                        f"{arrays[_INT].where(start + row, column)}: count {dense[row, column]} is negative, of which "
                        "no logarithm can be taken; set it to 0, as facebookresearch/dlrm does"
                    )
                yield check_block(make_block(labels, dense, keys), self.schema, _Where(arrays, start))
                for array in arrays.values():
                    array.release(part.start, part.stop)


def _open(path: Path) -> dict[str, StoredArray]:
    arrays = open_npz(path, [_INT, _CAT, _LABEL])
    rows = arrays[_LABEL].values.shape[0] if arrays[_LABEL].values.ndim else 0
    arrays[_LABEL].expect("iuf", (rows,))
    arrays[_INT].expect("iuf", (rows, None))
    arrays[_CAT].expect("iuf", (rows, None))
    return arrays


def _largest(path: Path, keys: StoredArray) -> list[int]:
    """Largest key of each table, from ``counts`` where the file has them."""
    if _COUNTS in npz_names(path):
        counts = open_npz(path, [_COUNTS])[_COUNTS]
        counts.expect("iu", (keys.values.shape[1],))
        return [int(count) - 1 for count in counts.values]
    return largest_keys([keys], _SCANNED_ROWS)


def _whole(array: StoredArray, part: slice) -> Any:
    """Values of rows as integers of at most 32 bits.

    Raises:
        DataError: one is none.
    """
    values = array.values[part]
    if values.dtype.kind == "f":
        wrong = (values != np.rint(values)) | ~(np.abs(values) < 2**31)
    else:
        wrong = (values > 2**31 - 1) | (values < -(2**31))
    if wrong.any():
        place = [int(index) for index in np.argwhere(wrong)[0]]
        column = place[1] if len(place) > 1 else 0
        raise DataError(
            f"{array.where(part.start + place[0], column)}: {values[tuple(place)]} is no whole number of 32 bits; "
            "correct it"
        )
    return values.astype(np.int32)


@dataclass(frozen=True, slots=True)
class _Where:
    """File, row and byte of a value of a block."""

    arrays: dict[str, StoredArray]
    first: int

    def __call__(self, row: int, kind: str, column: int) -> str:
        name = {"label": _LABEL, "dense": _INT}.get(kind, _CAT)
        return self.arrays[name].where(self.first + row, column)


class FacebookSink:
    """One .npz file a split."""

    def __init__(self, directory: Path, schema: Schema) -> None:
        """Files are made by the first row of a split."""
        self._directory = directory
        self._schema = schema
        self._files: dict[str, dict[str, NpyWriter]] = {}

    def write(self, split: str, block: Block) -> None:
        """Append rows."""
        files = self._files.get(split) or self._open(split)
        files[_CAT].write(block.keys)
        files[_INT].write(block.dense)
        files[_LABEL].write(block.labels)

    def _open(self, split: str) -> dict[str, NpyWriter]:
        columns = {
            _CAT: len(self._schema.tables),
            _INT: len(self._schema.dense_names),
            _LABEL: None,
            _COUNTS: None,
        }
        files = self._files[split] = {}
        for name, count in columns.items():
            files[name] = NpyWriter(self._directory / f"{split}.{name}.part", "<i4", count)
        return files

    def finish(self) -> None:
        """Put the arrays together, and write what they have no place for."""
        for split, files in self._files.items():
            files[_COUNTS].write(np.minimum(self._schema.table_rows, 2**31 - 1))
            for file in files.values():
                file.finish()
            write_npz(self._directory / f"{split}.npz", {name: file.path for name, file in files.items()})
        write_sidecar(self._directory, self._schema)

    def close(self) -> None:
        """Close the files."""
        for files in self._files.values():
            for file in files.values():
                file.close()


class FacebookNpz:
    """The format."""

    name = "facebook-npz"

    def detect(self, path: Path) -> bool:
        """A .npz file with the three arrays, or a folder of such."""
        return bool(_files(path))

    def read(self, path: Path, options: ReadOptions) -> FacebookSource:
        """Open a file (``train``), or a folder: days are all ``train``, other names are splits."""
        files = _files(path)
        if not files:
            raise DataError(f"{path}: no .npz file with {_INT}, {_CAT} and {_LABEL}; name one")
        return FacebookSource(path if path.is_dir() else path.parent, files, options)

    def fit(self, schema: Schema, options: WriteOptions) -> Fit:  # noqa: ARG002 - has no options
        """Counts that are not negative, one key of 32 bits a table."""
        if not schema.counts and schema.dense_names:
            cannot_hold(
                self.name, "float dense columns, only counts (it takes their logarithm)", "choose another format"
            )
        for table in schema.tables:
            if table.hotness > 1 or table.rows > 2**31:
                what = f"table {table.name!r} of {table.rows} rows and {table.hotness} keys, only one of 32 bits"
                cannot_hold(self.name, what, "choose another format")
        losses: frozenset[Loss] = frozenset({"weights"} if schema.weighted else ())
        dense: DenseKind = "natural"
        kept = replace(schema, dense=dense, weighted=False, missing_keys=False, key_dtype="int32", offset_keys=False)
        return Fit(kept, losses)

    def write(self, directory: Path, schema: Schema, options: WriteOptions) -> FacebookSink:  # noqa: ARG002
        """Start writing."""
        return FacebookSink(directory, schema)


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of each split, in order."""
    candidates = [path] if path.is_file() else list(path.glob("*.npz"))
    # One that is damaged counts as well: it is refused when it is opened, where a day of many would go missing unseen.
    ours = [
        file
        for file in candidates
        if file.suffix == ".npz" and ({_INT, _CAT, _LABEL} <= set(npz_names(file)) or is_damaged_npz(file))
    ]
    if path.is_file():
        return {"train": ours} if ours else {}
    files: dict[str, list[Path]] = {}
    for file in sorted(ours, key=lambda file: (day_order(file.stem) or 0, file.name)):
        stem = file.stem
        for end in _STEM_ENDS:
            stem = stem.removesuffix(end)
        files.setdefault("train" if day_order(file.stem) is not None else split_name(stem), []).append(file)
    return files


FACEBOOK_NPZ = FacebookNpz()
