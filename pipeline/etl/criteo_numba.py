"""Compiled half of the Criteo preparation: parse lines, count categories, number them.

Every function releases the GIL and is started from a thread pool, one piece of a file or one column a call;
none uses numba's own threads, so that preparing beside a running trainer is safe.

A category is its 32-bit value as int64, ``MISSING`` where the field is empty. Hash tables are open-addressed
with linear probing, a power of two long and at most half full; a slot whose second array holds 0 is empty.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

NUM_DENSE = 13
NUM_CATEGORICAL = 26
NUM_COLUMNS = 1 + NUM_DENSE + NUM_CATEGORICAL

MISSING = -1
"""A category that is not there."""
MISSING_INTEGER = np.iinfo(np.int64).min
"""An integer that is not there."""

OK, TOO_FEW, TOO_MANY, BAD_LABEL, BAD_INTEGER, BAD_HEX = range(6)
"""Outcomes of ``parse``."""

_TAB, _NEWLINE, _RETURN, _MINUS, _ZERO, _NINE = (ord(c) for c in "\t\n\r-09")
_MAX_DIGITS = 18  # every integer of so many digits fits into int64
_HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Fibonacci hashing (Knuth, TAOCP 3, 6.4)


@njit(nogil=True, cache=True)
def count_lines(text: Any) -> int:
    """Lines in ``text`` [bytes] uint8; a last line needs no line end."""
    lines = 0
    for byte in text:
        lines += byte == _NEWLINE
    if len(text) > 0 and text[len(text) - 1] != _NEWLINE:
        lines += 1
    return lines


@njit(nogil=True, cache=True)
def _integer(text: Any, start: int, end: int) -> tuple[bool, int]:
    """Whether ``text[start:end]`` is a decimal integer, and its value."""
    negative = start < end and text[start] == _MINUS
    if negative:
        start += 1
    if start == end or end - start > _MAX_DIGITS:
        return False, 0
    value = 0
    for place in range(start, end):
        digit = text[place]
        if digit < _ZERO or digit > _NINE:
            return False, 0
        value = value * 10 + (digit - _ZERO)
    return True, -value if negative else value


@njit(nogil=True, cache=True)
def _hex8(text: Any, start: int, end: int) -> int:
    """The value of eight hexadecimal digits, -1 if it is anything else."""
    if end - start != 8:
        return -1
    value = 0
    for place in range(start, end):
        digit = text[place]
        if _ZERO <= digit <= _NINE:
            nibble = digit - _ZERO
        elif 97 <= digit <= 102:
            nibble = digit - 87
        elif 65 <= digit <= 70:
            nibble = digit - 55
        else:
            return -1
        value = value * 16 + nibble
    return value


@njit(nogil=True, cache=True)
def _field(text: Any, start: int, end: int, column: int, row: int, labels: Any, integers: Any, categories: Any) -> int:
    """Store one field of a row; returns the outcome."""
    if column == 0:
        if end - start != 1 or (text[start] != _ZERO and text[start] != _ZERO + 1):
            return BAD_LABEL
        labels[row] = text[start] - _ZERO
    elif column <= NUM_DENSE:
        integers[row, column - 1] = MISSING_INTEGER
        if start < end:
            good, value = _integer(text, start, end)
            if not good:
                return BAD_INTEGER
            integers[row, column - 1] = value
    elif column < NUM_COLUMNS:
        categories[column - 1 - NUM_DENSE, row] = MISSING
        if start < end:
            value = _hex8(text, start, end)
            if value < 0:
                return BAD_HEX
            categories[column - 1 - NUM_DENSE, row] = value
    else:
        return TOO_MANY
    return OK


@njit(nogil=True, cache=True)
def parse(text: Any, labels: Any, integers: Any, categories: Any) -> tuple[int, int, int, int, int]:
    """Parse whole lines.

    Args:
        text: [bytes] uint8, whole lines; the last one may lack its line end.
        labels: [rows] int32, filled.
        integers: [rows, 13] int64, filled; ``MISSING_INTEGER`` where empty.
        categories: [26, rows] int64, filled; ``MISSING`` where empty.

    Returns:
        Outcome, row (the rows parsed, or the faulty one), column of the fault, first and last byte + 1 of
        the faulty field.
    """
    row, place, size = 0, 0, len(text)
    while place < size:
        column, start = 0, place
        while True:
            while place < size and text[place] != _TAB and text[place] != _NEWLINE:
                place += 1
            line_ends = place == size or text[place] == _NEWLINE
            end = place
            if line_ends and end > start and text[end - 1] == _RETURN:
                end -= 1
            outcome = _field(text, start, end, column, row, labels, integers, categories)
            if outcome != OK:
                return outcome, row, column, start, end
            place += 1
            start = place
            column += 1
            if line_ends:
                break
        if column != NUM_COLUMNS:
            return TOO_FEW, row, column, end, end
        row += 1
    return OK, row, 0, 0, 0


@njit(nogil=True, cache=True)
def _slot(value: Any, keys: Any, filled: Any) -> Any:
    """Slot of ``value``, or the empty slot where it belongs."""
    mask = len(keys) - 1
    slot = np.int64((np.uint64(value) * _HASH) >> np.uint64(32)) & mask
    while filled[slot] != 0 and keys[slot] != value:
        slot = (slot + 1) & mask
    return slot


@njit(nogil=True, cache=True)
def count(values: Any, keys: Any, counts: Any, used: int) -> tuple[Any, Any, int]:
    """Count values into a hash table, which grows as needed.

    Args:
        values: [n] int64.
        keys: [slots] int64.
        counts: [slots] int64, 0 where empty; changed in place or replaced.
        used: filled slots.

    Returns:
        keys, counts, used after the counting.
    """
    for value in values:
        slot = _slot(value, keys, counts)
        if counts[slot] == 0:
            if 2 * (used + 1) > len(keys):
                old_keys, old_counts = keys, counts
                keys = np.empty(2 * len(old_keys), np.int64)
                counts = np.zeros(2 * len(old_keys), np.int64)
                for old in range(len(old_keys)):
                    if old_counts[old] != 0:
                        new = _slot(old_keys[old], keys, counts)
                        keys[new] = old_keys[old]
                        counts[new] = old_counts[old]
                slot = _slot(value, keys, counts)
            keys[slot] = value
            used += 1
        counts[slot] += 1
    return keys, counts, used


@njit(nogil=True, cache=True)
def fill_ids(values: Any, keys: Any, ids: Any) -> None:
    """Put values[i] -> id i + 1 into an empty table at least twice as long as ``values`` [n] int64."""
    for place in range(len(values)):
        slot = _slot(values[place], keys, ids)
        keys[slot] = values[place]
        ids[slot] = place + 1


@njit(nogil=True, cache=True)
def encode(values: Any, keys: Any, ids: Any, out: Any) -> None:
    """Fill out[i] = id of values[i] [n] int64; 0 where the table does not hold it."""
    for place in range(len(values)):
        out[place] = ids[_slot(values[place], keys, ids)]


@njit(nogil=True, cache=True)
def transform_dense(integers: Any, out: Any) -> None:
    """Fill out = log(1 + max(x, 0)), computed in float64 and rounded to float32; 0 where missing.

    Args:
        integers: [rows, 13] int64.
        out: [rows, 13] float32, filled.
    """
    for row in range(integers.shape[0]):
        for column in range(integers.shape[1]):
            value = integers[row, column]
            out[row, column] = np.float32(np.log1p(np.float64(value))) if value > 0 else np.float32(0.0)
