"""The seam between formats: what each of them can be asked for.

A format is one file of this folder with one object of ``Format``. It recognises its files (``detect``), opens them
(``read``: a ``Source`` of blocks), says how it would hold rows of a schema (``fit``), and writes them (``write``: a
``Sink``). ``pipeline.convert`` puts any two together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, Protocol

from dlrm.errors import DataError
from pipeline.formats.block import Block, Schema
from pipeline.manifest import KeyDtype, LabelDtype, TableInfo

Loss = Literal["fp16-dense", "fp32-dense", "log1p-dense", "negative-counts", "weights"]
"""What a conversion may lose, if it is allowed by name."""

LOSSES: Mapping[Loss, str] = {
    "fp16-dense": "dense values are rounded to 16 bits",
    "fp32-dense": "dense values of 64 bits are rounded to 32",
    "log1p-dense": "counts become log(1 + max(x, 0)), which is what training reads; the counts are gone",
    "negative-counts": "negative and missing counts become 0, which is what training reads",
    "weights": "the weights of the keys are dropped",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What a reader is told that its files do not say.

    Attributes:
        table_rows: rows of each table; ``None``: as a file beside the data says, else the largest key + 1.
        key_dtype: width of the keys (Norm); ``None``: found out.
        offset_keys: keys are raised by the rows of the tables before (Norm); ``None``: as the file beside it says.
        allow: losses that are allowed.
    """

    table_rows: tuple[int, ...] | None = None
    key_dtype: KeyDtype | None = None
    offset_keys: bool | None = None
    allow: frozenset[Loss] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """What a writer may be told.

    Attributes:
        key_dtype: width of the keys (Raw, jagged, Norm); ``None``: the narrowest that holds them.
        label_dtype: type of the label (Raw).
        check_sum: frame header and samples with their length and sum (Norm).
        offset_keys: raise keys by the rows of the tables before, as HugeCTR's embeddings want them (Norm).
        rows_per_file: after so many rows a new file begins (Norm, Parquet); ``None``: what suits the format.
    """

    key_dtype: KeyDtype | None = None
    label_dtype: LabelDtype = "int32"
    check_sum: bool = False
    offset_keys: bool = True
    rows_per_file: int | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """How a format holds rows.

    Attributes:
        schema: of the rows as they will be read back.
        losses: what is lost against the rows given.
    """

    schema: Schema
    losses: frozenset[Loss] = field(default=frozenset())


class Source(Protocol):
    """An opened data set.

    Attributes:
        schema: what its rows hold.
        splits: rows of each split.
    """

    schema: Schema
    splits: dict[str, int]

    def blocks(self, split: str) -> Iterator[Block]:
        """The rows of a split in order, checked.

        Raises:
            DataError: a row is wrong; the message names file, row and (where the format has one) byte.
        """
        ...


class Sink(Protocol):
    """A data set being written."""

    def write(self, split: str, block: Block) -> None:
        """Append rows to a split, which the first of them makes.

        Raises:
            DataError: the format cannot hold one of them.
        """
        ...

    def finish(self) -> None:
        """Bring everything to the disk."""
        ...

    def close(self) -> None:
        """Close what is open; what was written before ``finish`` is worth nothing."""
        ...


class Format(Protocol):
    """One on-disk format.

    Attributes:
        name: as the command line has it.
    """

    name: str

    def detect(self, path: Path) -> bool:
        """Whether a file or folder is of this format."""
        ...

    def read(self, path: Path, options: ReadOptions) -> Source:
        """Open a file or folder.

        Raises:
            DataError: it is not what it must be.
        """
        ...

    def fit(self, schema: Schema, options: WriteOptions) -> Fit:
        """How rows would be held.

        Raises:
            DataError: the format has no place for them.
        """
        ...

    def write(self, directory: Path, schema: Schema, options: WriteOptions) -> Sink:
        """Start writing into an empty folder; ``schema`` is one of ``fit``."""
        ...


def cannot_hold(name: str, what: str, remedy: str) -> NoReturn:
    """Refuse a conversion.

    Raises:
        DataError: always.
    """
    raise DataError(f"{name} cannot hold {what}; {remedy}")


def tables_of(
    count: int, rows: tuple[int, ...] | None, hotness: list[int], largest: list[int]
) -> tuple[TableInfo, ...]:
    """Tables C1, C2, ... of files that name none.

    Args:
        count: T.
        rows: of each table as told; ``None``: the largest key + 1.
        hotness: key columns of each table.
        largest: largest key of each, -1 where there is none.

    Raises:
        DataError: another number of rows was told.
    """
    if rows is not None and len(rows) != count:
        raise DataError(f"--rows: {len(rows)} numbers for {count} tables; give one each")
    found = rows or tuple(max(1, key + 1) for key in largest)
    return tuple(TableInfo(name=f"C{t + 1}", rows=found[t], hotness=max(1, hotness[t])) for t in range(count))


def distinct_names(schema: Schema, name: str) -> list[str]:
    """Names of dense columns, tables and the label, in a format in which they share one name space.

    Raises:
        DataError: one stands for two columns.
    """
    names = [*schema.dense_names, *(table.name for table in schema.tables), "label"]
    repeated = sorted({one for one in names if names.count(one) > 1})
    if repeated:
        cannot_hold(name, f"two columns called {repeated[0]!r}", "rename one of them")
    return names


def key_dtype_of(rows: int) -> KeyDtype:
    """The narrowest type for keys below ``rows``."""
    return "int32" if rows <= 2**31 else "int64"
