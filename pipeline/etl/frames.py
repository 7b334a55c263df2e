"""Files of a table (CSV, Parquet, npz) into one frame that remembers where each row came from."""

from __future__ import annotations

import csv
import gzip
import zipfile
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import polars as pl

from dlrm.errors import ConfigError, DataError
from pipeline.etl.schema import TableSchema
from pipeline.etl.text_blocks import check_files, pieces

_FORMATS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".parquet": "parquet", ".npz": "npz"}


@dataclass(frozen=True, slots=True)
class Rows:
    """All rows of all inputs, in order.

    Attributes:
        frame: [n] rows; CSV columns are text.
        splits: [n] for each row the split that its file was given for.
        places: where each row came from, as (first row, name of the source).
    """

    frame: pl.DataFrame
    splits: Any
    places: tuple[tuple[int, str], ...]

    def where(self, row: int) -> str:
        """Source and number, from 1, of a row."""
        first, source = self.places[bisect_right(self.places, row, key=lambda place: place[0]) - 1]
        return f"{source}: row {row - first + 1}"

    def column(self, name: str) -> pl.Series:
        """One column.

        Raises:
            DataError: there is none of that name.
        """
        if name not in self.frame.columns:
            shown = ", ".join(self.frame.columns[:20]) + (", ..." if self.frame.width > 20 else "")
            raise DataError(f"column {name!r}: not in {self.places[0][1]}, which has {shown}; correct the schema")
        return self.frame[name]

    def matching(self, pattern: str) -> list[str]:
        """The columns that a name or a pattern with ``*`` means, in the frame's order.

        Raises:
            DataError: there is none.
        """
        if "*" not in pattern:
            return [self.column(pattern).name]
        # Only * is special: brackets and question marks may stand in a column's name.
        escaped = "".join(f"[{letter}]" if letter in "[?" else letter for letter in pattern)
        found = [name for name in self.frame.columns if fnmatchcase(name, escaped)]
        if not found:
            raise DataError(f"columns {pattern!r}: none in {self.places[0][1]}; correct the schema")
        return found

    def refuse(self, column: str, row: int, value: Any, wanted: str) -> NoReturn:
        """Refuse a value.

        Raises:
            DataError: always.
        """
        raise DataError(f"{self.where(row)}: column {column!r}: {value!r}, but must be {wanted}")


def read_rows(schema: TableSchema, inputs: Mapping[str, Sequence[Path] | pl.DataFrame]) -> Rows:
    """Read every file of every split into one frame.

    Args:
        schema: its ``format``, ``separator``, ``quote`` and ``header`` are used.
        inputs: files, or a frame, by split.

    Raises:
        DataError: a file is missing, empty, malformed, or has other columns than the first one.
    """
    frames: list[tuple[str, str, pl.DataFrame]] = []
    for split, given in inputs.items():
        if isinstance(given, pl.DataFrame):
            frames.append((split, schema.name, given))
            continue
        check_files(given, split)
        frames += [(split, str(path), _read_file(path, schema)) for path in given]
    if not frames:
        raise DataError("inputs: none; name at least one file")
    _, first_source, first_frame = frames[0]
    places, row = [], 0
    for _, source, frame in frames:
        if frame.schema != first_frame.schema:
            raise DataError(
                f"{source}: columns {_described(frame)}, but {first_source} has {_described(first_frame)}; "
                "all files need the same columns, in the same order"
            )
        places.append((row, source))
        row += frame.height
    if row == 0:
        raise DataError(f"{first_source}: no rows; a data set needs at least one")
    splits = np.repeat([split for split, _, _ in frames], [frame.height for _, _, frame in frames])
    return Rows(pl.concat([frame for _, _, frame in frames], rechunk=True), splits, tuple(places))


def _described(frame: pl.DataFrame) -> str:
    shown = [f"{name} ({dtype})" for name, dtype in list(frame.schema.items())[:20]]
    return ", ".join(shown) + (", ..." if frame.width > len(shown) else "")


def _read_file(path: Path, schema: TableSchema) -> pl.DataFrame:
    # A compressed CSV file carries its format in the suffix before the last.
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    kind = schema.format or _FORMATS.get(suffix.lower())
    if kind is None:
        raise ConfigError(
            f"{path}: suffix {suffix!r} says no format; set `format` in the schema to csv, parquet or npz"
        )
    try:
        if kind == "csv":
            return _read_csv(path, schema)
        return _read_npz(path) if kind == "npz" else pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError, EOFError, zlib.error) as error:
        if path.suffix == ".gz":
            deque(pieces(path, 1 << 20), maxlen=0)  # says how far damaged gzip can be read
        raise DataError(f"{path}: not a readable {kind} file ({' '.join(str(error).split())})") from None


def _read_csv(path: Path, schema: TableSchema) -> pl.DataFrame:
    """A CSV file as text; Polars fills rows that are too short with nulls, so these are looked for."""
    try:
        frame = pl.read_csv(
            path,
            separator=schema.separator,
            quote_char=schema.quote,
            has_header=schema.header,
            infer_schema=False,
            glob=False,
        )
    except pl.exceptions.NoDataError:
        raise DataError(f"{path}: empty; a file needs at least one row") from None
    except pl.exceptions.ComputeError:
        _check_widths(path, schema)
        raise
    if not schema.header:
        # Polars has counted from 1 and from 0 in different releases.
        frame.columns = [f"column_{number}" for number in range(1, frame.width + 1)]
    if frame.width and frame[frame.columns[-1]].null_count():
        _check_widths(path, schema)
    return frame


def _check_widths(path: Path, schema: TableSchema) -> None:
    """Find a row with another number of columns than the first one."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader(
            file,
            delimiter=schema.separator,
            quotechar=schema.quote,
            quoting=csv.QUOTE_MINIMAL if schema.quote else csv.QUOTE_NONE,
        )
        width = None
        for fields in reader:
            width = width or max(1, len(fields))
            if len(fields) != width and (fields or width > 1):
                raise DataError(
                    f"{path}: line {reader.line_num}: {len(fields)} columns, but the first line has {width}"
                )


def _read_npz(path: Path) -> pl.DataFrame:
    """Arrays as columns.

    ``x`` [n] is a column; ``x`` [n, k] is a column of lists and also the columns ``x.0`` to ``x.<k-1>``;
    ``x.keys`` [K] with ``x.offsets`` [n + 1] are a column of lists ``x``, and ``x.weights`` [K] beside
    them a column of lists ``x.weights``.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError):  # NumPy's own words advise to unpickle what it cannot read
        raise DataError(
            f"{path}: not a readable npz file of plain arrays; write it with numpy.savez, without Python objects"
        ) from None
    columns: dict[str, pl.Series] = {}
    for name, array in arrays.items():
        if name.endswith(".offsets"):
            base = name.removesuffix(".offsets")
            for part, column in ((f"{base}.keys", base), (f"{base}.weights", f"{base}.weights")):
                if part in arrays:
                    columns[column] = _lists(path, column, arrays[part], array)
        elif array.ndim == 1 and f"{name.rpartition('.')[0]}.offsets" not in arrays:
            columns[name] = pl.Series(name, array)
        elif array.ndim == 2:
            columns[name] = pl.Series(name, array).arr.to_list()
            columns |= {f"{name}.{k}": pl.Series(f"{name}.{k}", array[:, k]) for k in range(array.shape[1])}
        elif array.ndim != 1:
            raise DataError(f"{path}: array {name!r} has {array.ndim} dimensions; columns need 1 or 2")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: arrays of {lengths} rows; all need as many")
    return pl.DataFrame(columns)


def _lists(path: Path, name: str, values: Any, offsets: Any) -> pl.Series:
    """Lists of ``values`` [K] by ``offsets`` [n + 1]."""
    good = values.ndim == 1 and offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 0
    offsets = offsets.astype(np.int64) if good else offsets
    if not good or offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise DataError(f"{path}: {name}.offsets must rise from 0 to the {len(values)} values that they cut up")
    lengths = np.diff(offsets)
    rows = pl.DataFrame({"row": np.repeat(np.arange(len(lengths)), lengths), "value": values})
    lists = rows.group_by("row", maintain_order=True).agg("value")
    every = pl.DataFrame({"row": np.arange(len(lengths))})
    return every.join(lists, on="row", how="left", maintain_order="left")["value"].alias(name)
