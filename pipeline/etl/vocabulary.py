"""The vocabulary on disk: ``encoding/`` beside the data set, all that is needed to encode further rows the same way.

``encoding.json`` holds the rules and lists the Parquet files of each table, in the order of their numbers: columns
``number`` (int32), ``category`` (uint32, null for the missing one) and ``count`` (int64, in the counted rows).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dlrm.errors import DataError
from pipeline.etl.criteo_text import DENSE_NAMES, TABLE_NAMES
from pipeline.etl.lookup import Lookup, lookup_bytes
from pipeline.etl.numbering import Numbered
from pipeline.etl.rules import Rules, rules_from_values, rules_to_values

ENCODING_FOLDER = "encoding"
ENCODING_NAME = "encoding.json"
PART_ROWS = 1 << 22
"""Categories of one Parquet file: 32 MB."""
_VERSION = 1


@dataclass(frozen=True, slots=True)
class VocabularyPart:
    """Categories ``first .. first + rows`` of one column in one file."""

    path: Path
    first: int
    rows: int

    def values(self) -> Any:
        """Values [rows] uint32; 0 for the missing category.

        Raises:
            DataError: the file cannot be read, or is another one.
        """
        try:
            frame = pl.read_parquet(self.path, columns=["number", "category"], glob=False)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(f"{self.path}: not readable ({' '.join(str(error).split())}); prepare again") from None
        numbers = frame["number"].to_numpy()
        if (
            len(numbers) != self.rows
            or not len(numbers)
            or numbers[0] != self.first
            or numbers[-1] != self.first + self.rows - 1
        ):
            raise DataError(
                f"{self.path}: its numbers are not {self.first} to {self.first + self.rows - 1}, as {ENCODING_NAME} "
                "says; restore the file or prepare again"
            )
        return frame["category"].fill_null(0).to_numpy()


@dataclass(frozen=True, slots=True)
class TableVocabulary:
    """Categories of one column: the number of the missing one (0: none of its own), and the files."""

    name: str
    missing: int
    parts: tuple[VocabularyPart, ...]

    @property
    def rows(self) -> int:
        """Rows of the embedding table: every number, and 0."""
        return 1 + sum(part.rows for part in self.parts)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How rows are encoded.

    Attributes:
        rules: of values.
        tables: by column.
    """

    rules: Rules
    tables: tuple[TableVocabulary, ...]


def write_part(folder: Path, column: int, numbered: Numbered, part: int) -> dict[str, Any]:
    """Write one Parquet file; returns its entry in ``encoding.json``."""
    start = part * PART_ROWS
    stop = min(numbered.size, start + PART_ROWS)
    values = np.fromfile(numbered.path, np.uint32, stop - start, offset=4 * start)
    categories = pl.Series("category", values)
    if start < numbered.missing <= stop:
        categories[numbered.missing - 1 - start] = None
    frame = pl.DataFrame(
        {
            "number": np.arange(start + 1, stop + 1, dtype=np.int32),
            "category": categories,
            "count": numbered.counts_of(start, stop),
        }
    )
    path = folder / f"{TABLE_NAMES[column]}.{part:05d}.parquet"
    # One row group and fixed settings: the same bytes whoever writes it.
    frame.write_parquet(path, compression="lz4", statistics=False, row_group_size=PART_ROWS)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": path.name, "rows": stop - start, "bytes": path.stat().st_size, "sha256": digest}


def num_parts(numbered: Numbered) -> int:
    """Files that a column's categories take."""
    return -(-numbered.size // PART_ROWS)


def encoding_values(rules: Rules, numbered: Sequence[Numbered], files: Mapping[tuple[int, int], Any]) -> dict[str, Any]:
    """What ``encoding.json`` holds.

    Args:
        rules: of values.
        numbered: by column.
        files: entries of ``write_part`` by (column, part).
    """
    return {
        "format": "crosslane-encoding",
        "version": _VERSION,
        "rows_of": "criteo",
        "dense": list(DENSE_NAMES),
        "rules": rules_to_values(rules),
        "tables": [
            {
                "name": TABLE_NAMES[column],
                "rows": one.size + 1,
                "missing": one.missing,
                "files": [files[column, part] for part in range(num_parts(one))],
            }
            for column, one in enumerate(numbered)
        ],
    }


def read_encoding(folder: Path) -> Encoding:
    """Read ``encoding.json``.

    Args:
        folder: that holds it.

    Raises:
        DataError: it is missing, malformed, or a file it names has another size.
    """
    path = folder / ENCODING_NAME
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != "crosslane-encoding" or values["version"] != _VERSION:
            raise DataError(f"{path}: format {values['format']!r} version {values['version']}; this reads version 1")
        tables = tuple(_table(folder, table) for table in values["tables"])
    except OSError as error:
        raise DataError(
            f"{folder}: no readable {ENCODING_NAME} ({error.strerror}); name a data set of `crosslane prepare criteo`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: malformed ({type(error).__name__}: {error}); prepare the data set again") from None
    if [table.name for table in tables] != list(TABLE_NAMES):
        raise DataError(f"{path}: lists {len(tables)} tables, but Criteo's rows have {len(TABLE_NAMES)}")
    return Encoding(rules_from_values(values["rules"], str(path)), tables)


def _table(folder: Path, values: Mapping[str, Any]) -> TableVocabulary:
    parts, first = [], 1
    for file in values["files"]:
        path = folder / file["path"]
        size = path.stat().st_size
        if size != file["bytes"]:
            raise DataError(f"{path}: has {size} bytes, but {ENCODING_NAME} lists {file['bytes']}; restore the file")
        parts.append(VocabularyPart(path, first, int(file["rows"])))
        first += int(file["rows"])
    if values["rows"] != first:
        raise DataError(
            f"{folder / ENCODING_NAME}: table {values['name']}: rows {values['rows']}, but files of {first}"
        )
    return TableVocabulary(str(values["name"]), int(values["missing"]), tuple(parts))


@dataclass(frozen=True, slots=True)
class LookupPart:
    """Files ``start .. stop`` of a column: what one look-up table of a group holds."""

    column: int
    start: int
    stop: int


def lookup_groups(tables: Sequence[TableVocabulary], budget_bytes: int) -> list[list[LookupPart]]:
    """Look-up tables that fit into memory together; rows are passed over once for each group.

    Args:
        tables: by column.
        budget_bytes: for the tables of a group; a single file's part goes beyond it if need be.
    """
    groups: list[list[LookupPart]] = [[]]
    used = 0
    for column, table in enumerate(tables):
        start, categories = 0, 0
        for place, part in enumerate(table.parts):
            needed = lookup_bytes(categories + part.rows)
            if used + needed > budget_bytes and (used or categories):
                if categories:
                    groups[-1].append(LookupPart(column, start, place))
                groups.append([])
                start, categories, used = place, 0, 0
            categories += part.rows
        groups[-1].append(LookupPart(column, start, len(table.parts)))
        used += lookup_bytes(categories)
    return groups


def make_lookup(table: TableVocabulary, part: LookupPart) -> Lookup:
    """The look-up table of a part; behind the first one, what is not found stays as it was (-1)."""
    files = table.parts[part.start : part.stop]

    def parts() -> Iterator[tuple[int, Any]]:
        for file in files:
            yield file.first, file.values()

    categories = sum(file.rows for file in files)
    if part.start == 0:
        return Lookup(categories, parts(), table.missing, absent=0)
    return Lookup(categories, parts(), -1, absent=-1)
