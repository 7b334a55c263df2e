"""One Parquet file: its columns, and its rows as frames. pyarrow reads it where that is installed, else polars.

pyarrow goes first because a damaged file makes it raise, where polars panics or, asked for absurdly much memory by a
damaged length, ends the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dlrm.errors import DataError
from pipeline.formats.parquet_faults import check_ends, file_fault, rows_fault

_POLARS_FAULTS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)


def read_shape(path: Path) -> tuple[dict[str, Any], int]:
    """Types of a file's columns, as polars has them, and its rows.

    Raises:
        DataError: it is missing or no Parquet file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; restore it or correct the file list")
    check_ends(path)
    arrow = load_arrow()
    if arrow is None:
        try:
            frame = pl.scan_parquet(path, glob=False)
            return dict(frame.collect_schema()), int(frame.select(pl.len()).collect().item())
        except _POLARS_FAULTS as error:
            raise file_fault(path, error) from None
    try:
        footer = arrow.parquet.read_metadata(path)
        schema = footer.schema.to_arrow_schema()
        _ = schema.names  # raises where one is no text, at which polars would panic
        empty = pl.from_arrow(schema.empty_table())
    except (arrow.ArrowException, pl.exceptions.PanicException, OSError, ValueError) as error:
        raise file_fault(path, error) from None
    assert isinstance(empty, pl.DataFrame)
    return dict(empty.schema), int(footer.num_rows)


def read_frames(path: Path, columns: Sequence[str], size: int) -> Iterator[pl.DataFrame]:
    """A file's rows in order, at most ``size`` at once; lists of one length are lists like the others.

    Raises:
        DataError: a page cannot be read; the message names row group, column and byte where they can be found.
    """
    frames = _polars_frames if load_arrow() is None else _arrow_frames
    for frame in frames(path, list(columns), size):
        fixed = [pl.col(name).arr.to_list() for name, dtype in frame.schema.items() if isinstance(dtype, pl.Array)]
        yield frame.with_columns(fixed) if fixed else frame


def _arrow_frames(path: Path, columns: list[str], size: int) -> Iterator[pl.DataFrame]:
    arrow, first, rows = load_arrow(), 0, read_shape(path)[1]
    try:
        with arrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(size, columns=columns):
                frame = pl.from_arrow(batch)
                assert isinstance(frame, pl.DataFrame)
                yield frame.select(columns)
                first += frame.height
    except (arrow.ArrowException, pl.exceptions.PanicException, OSError) as error:
        raise rows_fault(path, first, rows, error) from None
    if first != rows:
        raise DataError(f"{path}: row {first}: the rows end there, but its footer says {rows}; restore the file")


def _polars_frames(path: Path, columns: list[str], size: int) -> Iterator[pl.DataFrame]:
    rows = read_shape(path)[1]
    for first in range(0, rows, size):
        try:
            frame = pl.scan_parquet(path, glob=False).select(columns).slice(first, size).collect()
        except _POLARS_FAULTS as error:
            raise rows_fault(path, first, min(first + size, rows), error) from None
        yield frame


def load_arrow() -> Any:
    """``pyarrow`` with its Parquet part, or ``None``."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        return None
    return pa
