"""Columns of Parquet files as blocks of rows.

Shapes: B rows, H key columns of all tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dlrm.errors import DataError
from pipeline.formats.block import Block, Schema, make_block
from pipeline.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns by what they are."""

    label: str
    dense: tuple[str, ...]
    tables: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """In that order."""
        return [self.label, *self.dense, *self.tables]


def of_manifest(manifest: Manifest) -> tuple[Columns, Schema]:
    """Columns and schema of a data set of layout ``parquet``."""
    assert manifest.label_column is not None
    columns = Columns(manifest.label_column, manifest.dense.names, tuple(table.name for table in manifest.tables))
    schema = Schema(
        name=manifest.name,
        dense_names=manifest.dense.names,
        dense="float32",
        tables=manifest.tables,
        missing_keys=manifest.missing_keys,
        key_dtype=manifest.key_dtype,
    )
    return columns, schema


def block_of(frame: pl.DataFrame, columns: Columns, schema: Schema, path: Path, first: int, *, rounds: bool) -> Block:
    """Rows of a file as a block, whose values are still to be checked (``check_block``).

    Args:
        frame: [B] rows, all columns.
        columns: what its columns are.
        schema: of the data set.
        path: of the file.
        first: row of the file that the frame begins with.
        rounds: whether dense values of 64 bits may be rounded.

    Raises:
        DataError: a value is null or does not fit; the message names file and row.
    """
    for name in frame.columns:
        if frame[name].null_count():
            row = first + int(frame[name].is_null().arg_max() or 0)
            raise DataError(f"{path}: row {row}: column {name!r} is null; fill it, as no value may be missing")
    labels = frame[columns.label].cast(pl.Float32).to_numpy()
    labels = np.where((labels == 0) | (labels == 1), labels, -1).astype(np.int32)
    dense = np.empty((frame.height, len(columns.dense)), np.float32)
    for n, name in enumerate(columns.dense):
        values = frame[name].to_numpy()
        with np.errstate(over="ignore"):
            dense[:, n] = values
        if rounds or values.dtype == np.float32:
            continue
        changed = (dense[:, n] != values) & ~np.isnan(values)
        if changed.any():
            row = int(np.argmax(changed))
            raise DataError(
                f"{path}: row {first + row}: dense column {name!r} is {values[row]!r}, which 32 bits do not hold; "
                "--allow fp32-dense rounds it"
            )
    return make_block(labels, dense, _keys(frame, columns.tables, schema.columns, path, first))


def _keys(
    frame: pl.DataFrame, names: tuple[str, ...], columns: NDArray[np.int64], path: Path, first: int
) -> NDArray[np.int64]:
    """[B, H], shorter bags filled up with -1."""
    keys = np.full((frame.height, int(columns[-1])), -1, np.int64)
    for t, name in enumerate(names):
        series = frame[name]
        if isinstance(series.dtype, pl.Array):
            series = series.arr.to_list()
        if not isinstance(series.dtype, pl.List):
            keys[:, columns[t]] = series.to_numpy()
            continue
        lengths = series.list.len().to_numpy().astype(np.int64)
        hotness = int(columns[t + 1] - columns[t])
        if (lengths > hotness).any():
            row = int(np.argmax(lengths > hotness))
            raise DataError(
                f"{path}: row {first + row}: {lengths[row]} keys in column {name!r}, but the file beside it says "
                f"at most {hotness}"
            )
        values = series.filter(series.list.len() > 0).explode()
        if values.null_count():
            row = np.repeat(np.arange(frame.height), lengths)[int(values.is_null().arg_max() or 0)]
            raise DataError(f"{path}: row {first + row}: a key in a list of column {name!r} is null; fill it")
        ends = np.cumsum(lengths)
        place = np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
        keys[np.repeat(np.arange(frame.height), lengths), columns[t] + place] = values.to_numpy()
    return keys
