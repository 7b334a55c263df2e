"""Rows on their way from one format to another: what a block of them is, what is checked, how they are summed.

Shapes: B rows, N dense columns, T tables, H key columns of all tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from dlrm.config import describe_validation
from dlrm.errors import DataError
from pipeline.manifest import KeyDtype, TableInfo

DenseKind = Literal["float16", "float32", "int32", "natural"]
"""``float16``: float32 values that are exact in 16 bits. ``int32``: counts, of which training takes
log(1 + max(x, 0)). ``natural``: counts, none of them negative or missing."""

MISSING_COUNT = -(2**31)
"""An int32 dense value that is not there; training reads it as 0, as every negative one."""

SIDECAR = "crosslane.json"
"""File beside converted data that says what their format has no place for."""

_BLOCK_BYTES = 16 << 20
_MOST_ROWS = 1 << 16
_WORD = 0xFFFF_FFFF_FFFF_FFFF
_PRIME = 0x9E37_79B9_7F4A_7C15


@checked_dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Schema:
    """What rows hold, whatever format they lie in."""

    name: Annotated[str, Field(min_length=1)]
    dense_names: tuple[str, ...]
    dense: DenseKind
    tables: tuple[TableInfo, ...]
    """``rows`` is known; ``hotness`` is the number of key columns of a block."""
    weighted: bool = False
    missing_keys: bool = False
    """Whether a table of hotness 1 may lack its key in a row."""
    key_dtype: KeyDtype = "int32"
    """Narrowest type that holds the keys of every table."""
    offset_keys: bool = False
    """Whether the files hold keys raised by the rows of the tables before (HugeCTR's Norm)."""
    licence: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether dense columns are int32 counts, and not float32."""
        return self.dense in ("int32", "natural")

    @property
    def columns(self) -> NDArray[np.int64]:
        """[T + 1], the first key column of each table; the last entry is H."""
        return np.cumsum([0, *(table.hotness for table in self.tables)], dtype=np.int64)

    @property
    def table_rows(self) -> NDArray[np.int64]:
        """[T], rows of each table."""
        return np.array([table.rows for table in self.tables], np.int64)

    def block_rows(self) -> int:
        """Rows of one block, so that memory stays bounded whatever a row takes."""
        width = 4 + 4 * len(self.dense_names) + int(self.columns[-1]) * (12 if self.weighted else 8)
        rows: int = max(1, min(_MOST_ROWS, _BLOCK_BYTES // width))
        return rows


@dataclass(slots=True)
class Block:
    """Rows in memory, C-contiguous.

    Attributes:
        labels: [B] int32, 0 or 1.
        dense: [B, N] float32, or int32 counts.
        keys: [B, H] int64, the hotness columns of each table side by side; -1 = no key.
        weights: [B, H] float32, or [B, 0] where keys have none.
    """

    labels: NDArray[np.int32]
    dense: NDArray[Any]
    keys: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def rows(self) -> int:
        """B."""
        return int(self.labels.shape[0])


def make_block(labels: Any, dense: Any, keys: Any, weights: Any = None) -> Block:
    """A block of arrays of any strides and integer widths."""
    count = labels.shape[0]
    kind = np.int32 if np.issubdtype(dense.dtype, np.integer) else np.float32
    return Block(
        _own(labels, np.int32),
        _own(dense, kind),
        _own(keys, np.int64),
        np.empty((count, 0), np.float32) if weights is None else _own(weights, np.float32),
    )


def _own(values: Any, dtype: Any) -> Any:
    """A C-contiguous array that may be written: every block is of the same type to compiled functions."""
    array = np.ascontiguousarray(values, dtype)
    return array if array.flags.writeable else array.copy()


Where = Callable[[int, str, int], str]
"""Tells file, row and byte of (row of the block, ``label``, ``dense``, ``key`` or ``weight``, column)."""


def check_block(block: Block, schema: Schema, where: Where) -> Block:
    """Hand a block through that holds nothing it must not.

    Raises:
        DataError: a label is neither 0 nor 1, a dense value or weight is not finite, or a key lies outside its table.
    """
    from pipeline.formats import block_numba

    columns, table_rows = schema.columns, schema.table_rows
    row, place = block_numba.find_fault(
        block.labels,
        block.dense.view(np.int32),
        block.dense.dtype == np.float32,
        block.keys,
        block.weights.view(np.int32),
        columns,
        table_rows,
        schema.missing_keys,
    )
    if row < 0:
        return block
    num_dense = block.dense.shape[1]
    if place == 0:
        raise DataError(
            f"{where(row, 'label', 0)}: label {block.labels[row]} is neither 0 nor 1; correct the row"
            + reversed_hint(int(block.labels[row]), 4, 1)
        )
    if place <= num_dense:
        raise DataError(
            f"{where(row, 'dense', place - 1)}: dense column {schema.dense_names[place - 1]!r} is "
            f"{block.dense[row, place - 1]}; it must be finite, so fill or clip it"
        )
    column = place - 1 - num_dense
    kind = "key" if column < columns[-1] else "weight"
    column %= max(1, int(columns[-1]))
    table = schema.tables[int(np.searchsorted(columns, column, side="right")) - 1]
    if kind == "weight":
        raise DataError(f"{where(row, 'weight', column)}: a weight of table {table.name!r} is not finite; correct it")
    key = int(block.keys[row, column])
    if key == -1:
        raise DataError(f"{where(row, 'key', column)}: table {table.name!r} has no key (-1), but every row needs one")
    hint = reversed_hint(key, 4, table.rows - 1) or reversed_hint(key, 8, table.rows - 1)
    raise DataError(
        f"{where(row, 'key', column)}: key {key} of table {table.name!r} lies outside its rows 0 .. {table.rows - 1}; "
        f"correct the row or the table's rows{hint}"
    )


def reversed_hint(value: int, width: int, limit: int) -> str:
    """A clause for values that would be in range if their ``width`` bytes were in the other order, else nothing."""
    if not -(1 << (8 * width - 1)) <= value < 1 << (8 * width):
        return ""
    other = int.from_bytes((value % (1 << (8 * width))).to_bytes(width, "little"), "big")
    if other == value or not 0 <= other <= limit:
        return ""
    return f" (with its bytes reversed it is {other}: is the file big-endian? it must be little-endian)"


def find_fault(
    labels: Any,
    dense: Any,
    is_float: bool,
    keys: Any,
    weights: Any,
    columns: Any,
    table_rows: Any,
    missing_keys: bool,
) -> tuple[int, int]:
    """Row and place of the first value that must not be, or (-1, 0); reference of the compiled function.

    Args:
        labels: [B] int32.
        dense: [B, N] int32, the words of the dense columns.
        is_float: whether those are float32.
        keys: [B, H] int64.
        weights: [B, H or 0] int32, the words of the weights.
        columns: [T + 1] int64.
        table_rows: [T] int64.
        missing_keys: whether -1 may stand in a table of one key column.

    Returns:
        The row, and 0 for its label, 1 + n for dense column n, 1 + N + h for key h, 1 + N + H + h for weight h.
    """
    hotness = np.diff(columns)
    table_of = np.repeat(np.arange(hotness.size), hotness)
    least = np.where((hotness > 1) | missing_keys, -1, 0)[table_of]
    wrong = np.concatenate(
        [
            ((labels != 0) & (labels != 1))[:, None],
            ~np.isfinite(dense.view(np.float32)) if is_float else np.zeros(dense.shape, bool),
            (keys < least) | (keys >= table_rows[table_of]),
            ~np.isfinite(weights.view(np.float32)) & (keys[:, : weights.shape[1]] >= 0),
        ],
        axis=1,
    )
    found = np.argwhere(wrong)
    return (int(found[0, 0]), int(found[0, 1])) if found.size else (-1, 0)


def sum_rows(state: int, labels: Any, dense: Any, keys: Any, weights: Any, columns: Any) -> int:
    """Take rows into a 64-bit sum that depends on their order; reference of the compiled function.

    The sum does not depend on blocks, formats, or where in its columns a bag has its keys: each row adds its label,
    the words of its dense columns, and for each table the number of its keys, the keys, and their weights.

    Args:
        state: the sum so far; 0 at the start.
        labels: [B] int32.
        dense: [B, N] int32, the words of the dense columns.
        keys: [B, H] int64; -1 = no key.
        weights: [B, H or 0] int32, the words of the weights.
        columns: [T + 1] int64.

    Returns:
        The sum with the rows.
    """
    for row in range(labels.shape[0]):
        words = [int(labels[row]), *dense[row].tolist()]
        for start, stop in pairwise(columns.tolist()):
            there = [h for h in range(start, stop) if keys[row, h] >= 0]
            words.append(len(there))
            for h in there:
                words.append(int(keys[row, h]))
                if weights.shape[1]:
                    words.append(int(weights[row, h]))
        for word in words:
            state = ((state ^ (word & _WORD)) * _PRIME) & _WORD
            state ^= state >> 29
    return state


def log1p_counts(counts: Any, out: Any) -> None:
    """Fill out = log(1 + max(x, 0)) in float64, rounded to float32; reference of the compiled function.

    Args:
        counts: [B, N] int32.
        out: [B, N] float32, written.
    """
    out[...] = np.log1p(np.maximum(counts, 0).astype(np.float64))


class RowSum:
    """The sum of the rows of a split, and how many there are.

    Attributes:
        rows: samples so far.
    """

    def __init__(self, schema: Schema) -> None:
        """Start at nothing."""
        self.rows = 0
        self._columns = schema.columns
        self._state = np.uint64(0)

    def add(self, block: Block) -> None:
        """Take a block in."""
        from pipeline.formats import block_numba

        state = block_numba.sum_rows(
            self._state,
            block.labels,
            block.dense.view(np.int32),
            block.keys,
            block.weights.view(np.int32),
            self._columns,
        )
        self._state = np.uint64(state)  # numba hands back a Python integer, and would take a small one as int64
        self.rows += block.rows

    @property
    def text(self) -> str:
        """The sum in 16 hexadecimal digits."""
        return f"{int(self._state):016x}"


def write_sidecar(directory: Path, schema: Schema) -> None:
    """Write ``crosslane.json``."""
    text = json.dumps(_ADAPTER.dump_python(schema, mode="json"), indent=1, ensure_ascii=False) + "\n"
    (directory / SIDECAR).write_text(text, encoding="utf-8")


def read_sidecar(
    directory: Path, num_dense: int, num_tables: int, table_rows: tuple[int, ...] | None = None
) -> Schema | None:
    """What ``crosslane.json`` says about files of so many columns; ``None`` where there is none.

    Args:
        directory: where it is looked for.
        num_dense: dense columns of the files.
        num_tables: tables of the files.
        table_rows: rows of each table, instead of those that it tells.

    Raises:
        DataError: it is malformed, or about other columns.
    """
    path = directory / SIDECAR
    if not path.is_file():
        return None
    try:
        schema = _ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path}: " + "; ".join(describe_validation(error))) from None
    if (len(schema.dense_names), len(schema.tables)) != (num_dense, num_tables):
        raise DataError(
            f"{path}: tells of {len(schema.dense_names)} dense columns and {len(schema.tables)} tables, but the data "
            f"have {num_dense} and {num_tables}; remove it, or put the right one there"
        )
    return schema if table_rows is None else with_rows(schema, table_rows)


def with_rows(schema: Schema, table_rows: tuple[int, ...]) -> Schema:
    """A schema with other numbers of rows.

    Raises:
        DataError: there is not one for each table.
    """
    if len(table_rows) != len(schema.tables):
        raise DataError(f"--rows: {len(table_rows)} numbers for {len(schema.tables)} tables; give one each")
    tables = tuple(replace(table, rows=rows) for table, rows in zip(schema.tables, table_rows, strict=True))
    return replace(schema, tables=tables)


_ADAPTER: TypeAdapter[Schema] = TypeAdapter(Schema)
