"""Criteo's tab-separated lines: label, 13 integers, 26 hexadecimal categories, to columns of numbers.

The references of ``criteo_text_numba`` stand here. A category is its 32-bit value as int64, ``MISSING`` where the
field is empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_DENSE = 13
NUM_CATEGORICAL = 26
NUM_COLUMNS = 1 + NUM_DENSE + NUM_CATEGORICAL
DENSE_NAMES = tuple(f"I{number}" for number in range(1, NUM_DENSE + 1))
TABLE_NAMES = tuple(f"C{number}" for number in range(1, NUM_CATEGORICAL + 1))
COLUMN_NAMES = ("label", *DENSE_NAMES, *TABLE_NAMES)

MISSING = -1
"""A category that is not there."""
MISSING_INTEGER = int(np.iinfo(np.int64).min)
"""An integer that is not there."""
MAX_DIGITS = 18
"""Every integer of so many digits fits into int64."""

OK, TOO_FEW, TOO_MANY, BAD_LABEL, BAD_INTEGER, BAD_HEX = range(6)
"""Outcomes of ``parse``."""

_SHOWN_CHARACTERS = 40
_WANTED = {
    BAD_LABEL: "0 or 1",
    BAD_INTEGER: "an integer of at most 18 digits, or empty",
    BAD_HEX: "8 hexadecimal digits, or empty",
}


@dataclass(slots=True)
class ParsedRows:
    """Rows of one piece: labels [rows] int32, integers [rows, 13] and categories [26, rows] int64."""

    labels: Any
    integers: Any
    categories: Any


@dataclass(slots=True)
class Fault:
    """What is wrong in a piece, ``row`` lines from its start."""

    row: int
    clause: str


def parse_rows(text: Any, *, labelled: bool = True) -> ParsedRows | Fault:
    """Parse whole lines.

    Args:
        text: [bytes] uint8.
        labelled: the rows start with the label; without, labels are 0.
    """
    from pipeline.etl import criteo_text_numba as engine

    rows = engine.count_lines(text)
    parsed = ParsedRows(
        np.empty(rows, np.int32), np.empty((rows, NUM_DENSE), np.int64), np.empty((NUM_CATEGORICAL, rows), np.int64)
    )
    first = 0 if labelled else 1
    outcome, row, column, start, end = engine.parse(text, first, parsed.labels, parsed.integers, parsed.categories)
    if outcome == OK:
        return parsed
    columns = f"{NUM_COLUMNS - first} ({'label, ' if labelled else ''}13 integers, 26 categories)"
    if outcome == TOO_FEW:
        return Fault(row, f"{column - first} columns, but a row has {columns}")
    if outcome == TOO_MANY:
        return Fault(row, f"more than {columns.replace(' (', ' columns (', 1)}")
    found = bytes(text[start:end][:_SHOWN_CHARACTERS]).decode("utf-8", "backslashreplace")
    name = COLUMN_NAMES[column]
    return Fault(row, f"column {column - first + 1} ({name}): {found!r}, but must be {_WANTED[outcome]}")


def parse(text: Any, first: int, labels: Any, integers: Any, categories: Any) -> tuple[int, int, int, int, int]:
    """Parse whole lines.

    Args:
        text: [bytes] uint8, whole lines; the last one may lack its line end.
        first: the first column that is there: 0 the label, 1 the first integer.
        labels: [rows] int32, filled; 0 where the text has none.
        integers: [rows, 13] int64, filled; ``MISSING_INTEGER`` where empty.
        categories: [26, rows] int64, filled; ``MISSING`` where empty.

    Returns:
        Outcome, row (the rows parsed, or the faulty one), column of the fault (counted with the label), first and
        last byte + 1 of the faulty field.
    """
    row, place = 0, 0
    lines = bytes(text).split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    for line in lines:
        labels[row] = 0
        start = place
        fields = line.removesuffix(b"\r").split(b"\t")
        for column, field in enumerate(fields, first):
            outcome = _store(field, column, row, labels, integers, categories)
            if outcome != OK:
                return outcome, row, column, start, start + len(field)
            start += len(field) + 1
        if first + len(fields) != NUM_COLUMNS:
            return TOO_FEW, row, first + len(fields), start - 1, start - 1
        place += len(line) + 1
        row += 1
    return OK, row, 0, 0, 0


def _store(field: bytes, column: int, row: int, labels: Any, integers: Any, categories: Any) -> int:
    if column == 0:
        if field not in {b"0", b"1"}:
            return BAD_LABEL
        labels[row] = int(field)
    elif column <= NUM_DENSE:
        if field and not re.fullmatch(rb"-?[0-9]{1,18}", field):
            return BAD_INTEGER
        integers[row, column - 1] = int(field) if field else MISSING_INTEGER
    elif column < NUM_COLUMNS:
        if field and not re.fullmatch(rb"[0-9a-fA-F]{8}", field):
            return BAD_HEX
        categories[column - 1 - NUM_DENSE, row] = int(field, 16) if field else MISSING
    else:
        return TOO_MANY
    return OK


def take_modulo(categories: Any, modulo: int) -> None:
    """Take every value that is there modulo ``modulo``, in place.

    Args:
        categories: [26, rows] int64; ``MISSING`` stays.
        modulo: 1 or more.
    """
    np.copyto(categories, categories % modulo, where=categories >= 0)


def transform_dense(integers: Any, floor: int, fill: int, out: Any) -> None:
    """Fill out = log(1 + max(x, floor) - floor), computed in float64 and rounded to float32.

    Args:
        integers: [rows, 13] int64.
        floor: 0 or a little below.
        fill: what ``MISSING_INTEGER`` counts as.
        out: [rows, 13] float32, filled.
    """
    above = np.maximum(np.where(integers == MISSING_INTEGER, fill, integers) - floor, 0)
    out[...] = np.log1p(above.astype(np.float64))
