"""HugeCTR's and NVTabular's Parquet: float labels and dense columns, int64 keys, list columns for multi-hot.

Published in HugeCTR's Python interface document ("Dataset formats", Parquet): a file list, and beside the files
``_metadata.json`` with ``file_stats`` (``file_name``, ``num_rows``) and the columns (``col_name``, ``index``) that are
``cats``, ``conts`` and ``labels``. NVTabular writes both. Without the metadata the column ``label`` is the label, float
columns are dense, integers and lists are keys.

Shapes: B rows, N dense columns, T tables, H key columns of all tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dlrm.errors import DataError
from pipeline.formats.block import Block, DenseKind, Schema, check_block, read_sidecar, write_sidecar
from pipeline.formats.file_list import looks_like_list, read_file_list, write_file_list
from pipeline.formats.interchange import (
    Fit,
    Loss,
    ReadOptions,
    WriteOptions,
    distinct_names,
    key_dtype_of,
    tables_of,
)
from pipeline.formats.names import split_folders
from pipeline.formats.parquet_block import Columns, block_of
from pipeline.formats.parquet_file import read_frames, read_shape

METADATA, FILE_LIST = "_metadata.json", "_file_list.txt"
_MARKS = (METADATA, FILE_LIST, "*.parquet")
_LABEL = "label"
_ROWS_PER_FILE = 1 << 18
_SCANNED_ROWS = 1 << 16


class ParquetSource:
    """Parquet files of each split, in order.

    Attributes:
        files: of each split.
        file_rows: rows of each file.
        columns: names of the columns by what they are.
    """

    def __init__(self, files: dict[str, list[Path]], folder: Path, options: ReadOptions) -> None:
        """Look into every file; without a file beside them that says more, scan the key columns."""
        self.files = files
        self._allow = options.allow
        first = next((paths[0] for paths in files.values() if paths), None)
        if first is None:
            raise DataError(f"{folder}: no Parquet file in it; name a file, a file list or a folder")
        self.columns = _columns(first)
        self.file_rows = {path: self._open(path) for paths in files.values() for path in paths}
        self.splits = {split: sum(self.file_rows[path] for path in paths) for split, paths in files.items()}
        columns = self.columns
        known = read_sidecar(folder, len(columns.dense), len(columns.tables), options.table_rows)
        self.schema = known or self._scanned(folder.resolve().name, first, options)
        names = (self.schema.dense_names, tuple(table.name for table in self.schema.tables))
        if names != (columns.dense, columns.tables):
            raise DataError(f"{folder}: the columns {', '.join(columns.all[1:])} are not those of the file beside them")

    def _open(self, path: Path) -> int:
        """Rows of a file, whose columns are those of the first one."""
        types, rows = read_shape(path)
        for name in self.columns.all:
            if name not in types:
                raise DataError(f"{path}: no column {name!r}, only {', '.join(types)}")
            inner = getattr(types[name], "inner", None) if name in self.columns.tables else None
            if not _is_number(inner or types[name], integer=name in self.columns.tables):
                raise DataError(f"{path}: column {name!r} has type {types[name]}, which is no type of such a column")
        told = _metadata(path.parent).get("file_stats") or []
        for stats in told:
            if stats.get("file_name") == path.name and stats.get("num_rows") != rows:
                raise DataError(
                    f"{path}: {rows} rows, but {path.parent / METADATA} says {stats.get('num_rows')}; copy the file "
                    "again, or correct the metadata"
                )
        return rows

    def _scanned(self, name: str, first: Path, options: ReadOptions) -> Schema:
        columns, types = self.columns, read_shape(first)[0]
        hotness, largest = [0] * len(columns.tables), [-1] * len(columns.tables)
        for path in self.file_rows:
            for frame in read_frames(path, columns.tables, _SCANNED_ROWS):
                for t, column in enumerate(columns.tables):
                    values, lists = frame[column], _is_list(frame.schema[column])
                    longest: Any = values.list.len().max() if lists else 1
                    key: Any = values.list.max().max() if lists else values.max()
                    hotness[t] = max(hotness[t], longest or 0)
                    largest[t] = max(largest[t], -1 if key is None else key)
        tables = tables_of(len(columns.tables), options.table_rows, hotness, largest)
        return Schema(
            name=name or "parquet",
            dense_names=columns.dense,
            dense="float32",
            tables=tuple(replace(table, name=column) for table, column in zip(tables, columns.tables, strict=True)),
            missing_keys=any(_is_list(types[column]) for column in columns.tables),
            key_dtype=key_dtype_of(max((table.rows for table in tables), default=1)),
            source="Parquet files in HugeCTR's layout",
        )

    def blocks(self, split: str) -> Iterator[Block]:
        """The rows of a split in order, checked."""
        size = self.schema.block_rows()
        for path in self.files[split]:
            start = 0
            for frame in read_frames(path, self.columns.all, size):

                def where(row: int, kind: str, column: int, path: Path = path, first: int = start) -> str:
                    del kind, column  # the message names the column
                    return f"{path}: row {first + row}"

                block = block_of(frame, self.columns, self.schema, path, start, rounds="fp32-dense" in self._allow)
                yield check_block(block, self.schema, where)
                start += frame.height


def _is_list(dtype: Any) -> bool:
    return isinstance(dtype, pl.List | pl.Array)


def _is_number(dtype: Any, *, integer: bool) -> bool:
    return bool(dtype.is_integer() or (not integer and (dtype.is_float() or dtype == pl.Boolean)))


def _metadata(folder: Path) -> dict[str, Any]:
    """What ``_metadata.json`` says, nothing where there is none."""
    path = folder / METADATA
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for part in ("file_stats", "cats", "conts", "labels"):
            if not all(isinstance(entry, dict) for entry in values.get(part, [])):
                raise DataError(f"{path}: {part} must be a list of objects")
        return dict(values)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{path}: not a Parquet data set's metadata ({error})") from None


def _columns(path: Path) -> Columns:
    told = _metadata(path.parent)
    if told:
        named = {part: tuple(str(entry.get("col_name")) for entry in told.get(part, [])) for part in ("cats", "conts")}
        labels = [str(entry.get("col_name")) for entry in told.get("labels", [])]
        if len(labels) != 1:
            raise DataError(f"{path.parent / METADATA}: labels {labels}; Crosslane trains on one label")
        return Columns(labels[0], named["conts"], named["cats"])
    types = read_shape(path)[0]
    if _LABEL not in types:
        raise DataError(f"{path}: no column {_LABEL!r}, and no {METADATA} that names another; write that file")
    rest = {name: dtype for name, dtype in types.items() if name != _LABEL}
    dense = tuple(name for name, dtype in rest.items() if dtype.is_float())
    return Columns(_LABEL, dense, tuple(name for name in rest if name not in dense))


class ParquetSink:
    """Parquet files, file list and metadata of each split."""

    def __init__(self, directory: Path, schema: Schema, options: WriteOptions) -> None:
        """Files are made as rows come."""
        self._directory = directory
        self._schema = schema
        self._rows_per_file = options.rows_per_file or _ROWS_PER_FILE
        self._waiting: list[pl.DataFrame] = []
        self._split = ""
        self._rows: dict[str, list[int]] = {}

    def write(self, split: str, block: Block) -> None:
        """Append rows; they wait in memory until a file is full."""
        if split != self._split:
            self._flush()
            self._split = split
            self._rows[split] = []
        frame = self._frame(block)
        while frame.height:
            room = self._rows_per_file - sum(part.height for part in self._waiting)
            self._waiting.append(frame[:room])
            frame = frame[room:]
            if sum(part.height for part in self._waiting) == self._rows_per_file:
                self._flush()

    def _frame(self, block: Block) -> pl.DataFrame:
        columns = self._schema.columns
        series = [pl.Series(_LABEL, block.labels.astype(np.float32))]
        series += [pl.Series(name, block.dense[:, n].copy()) for n, name in enumerate(self._schema.dense_names)]
        for t, table in enumerate(self._schema.tables):
            keys = block.keys[:, columns[t] : columns[t + 1]]
            if table.hotness == 1 and not self._schema.missing_keys:
                series.append(pl.Series(table.name, keys[:, 0].copy()))
                continue
            lists = pl.Series(table.name, np.ascontiguousarray(keys)).arr.to_list()
            if (keys < 0).any():
                lists = lists.list.eval(pl.element().filter(pl.element() >= 0))
            series.append(lists)
        return pl.DataFrame(series)

    def _flush(self) -> None:
        if not self._waiting:
            return
        frame = pl.concat(self._waiting)
        self._waiting = []
        folder = self._directory / self._split
        folder.mkdir(exist_ok=True)
        frame.write_parquet(folder / f"{len(self._rows[self._split])}.parquet", compression="snappy")
        self._rows[self._split].append(frame.height)

    def finish(self) -> None:
        """Write the last file, the lists, the metadata, and what they have no place for."""
        self._flush()
        schema = self._schema
        dense, tables = list(schema.dense_names), [table.name for table in schema.tables]
        for split, rows in self._rows.items():
            names = [f"{number}.parquet" for number in range(len(rows))]
            metadata = {
                "file_stats": [{"file_name": name, "num_rows": count} for name, count in zip(names, rows, strict=True)],
                "cats": _indexed(tables, 1 + len(dense)),
                "conts": _indexed(dense, 1),
                "labels": _indexed([_LABEL], 0),
            }
            write_file_list(self._directory / split / FILE_LIST, names)
            text = json.dumps(metadata, indent=1, ensure_ascii=False) + "\n"
            (self._directory / split / METADATA).write_text(text, encoding="utf-8")
        write_sidecar(self._directory, schema)

    def close(self) -> None:
        """Nothing stays open between rows."""


def _indexed(names: list[str], first: int) -> list[dict[str, Any]]:
    return [{"col_name": name, "index": first + place} for place, name in enumerate(names)]


class Parquet:
    """The format."""

    name = "parquet"

    def detect(self, path: Path) -> bool:
        """A Parquet file, a list of such, or a folder of them."""
        if path.is_file():
            return path.suffix == ".parquet" or _lists_parquet(path)
        return bool(split_folders(path, ["*.parquet", FILE_LIST]))

    def read(self, path: Path, options: ReadOptions) -> ParquetSource:
        """Open a file or file list (``train``), or a folder: of files, or of a folder for each split."""
        return ParquetSource(files_of(path), path.parent if path.is_file() else path, options)

    def fit(self, schema: Schema, options: WriteOptions) -> Fit:  # noqa: ARG002 - nothing that asks for another schema
        """Float dense columns, keys without weights."""
        losses: set[Loss] = {"weights"} if schema.weighted else set()
        if schema.counts:
            losses.add("log1p-dense")
        distinct_names(schema, self.name)
        dense: DenseKind = "float32"
        narrowest = key_dtype_of(max((table.rows for table in schema.tables), default=1))
        kept = replace(schema, dense=dense, weighted=False, key_dtype=narrowest, offset_keys=False)
        return Fit(kept, frozenset(losses))

    def write(self, directory: Path, schema: Schema, options: WriteOptions) -> ParquetSink:
        """Start writing."""
        return ParquetSink(directory, schema, options)


def files_of(path: Path) -> dict[str, list[Path]]:
    """The files of each split that a Parquet file, a file list or a folder stands for."""
    if path.is_file():
        return {"train": [path] if path.suffix == ".parquet" else read_file_list(path)}
    return {split: _files(folder) for split, folder in split_folders(path, _MARKS).items()}


def _lists_parquet(path: Path) -> bool:
    try:
        return looks_like_list(path) and all(file.suffix == ".parquet" for file in read_file_list(path))
    except DataError:
        return False


def _files(folder: Path) -> list[Path]:
    """The files of a folder: those of its list, else all, numbers by size."""
    if (folder / FILE_LIST).is_file():
        return read_file_list(folder / FILE_LIST)
    numbers = re.compile(r"\d+")
    return sorted(
        folder.glob("*.parquet"),
        key=lambda file: (numbers.sub("#", file.name), [int(number) for number in numbers.findall(file.name)]),
    )


PARQUET = Parquet()
