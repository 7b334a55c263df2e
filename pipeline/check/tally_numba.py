"""Compiled counts over blocks of stored rows; ``tally.py`` has the reference of each.

Single-threaded and without the interpreter's lock: several of them count different columns of the same block at once.

Shapes: B rows of a block, V 32-bit words a row, N dense columns, T tables, H key columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from embedding.lookup_numba import prefetch_row
from pipeline.check.tally import FULL, HEAD, KEYS, MISSING, OUTSIDE, SINGLES, UNSEEN, VALUE_BINS, VALUE_SHIFT
from pipeline.formats.raw_numba import key_at

_EXPONENT = 0x7F80_0000  # all ones in the words of infinities and NaN
_BLOCK = 512  # rows whose words and a table's own numbers stay in the cache
_AHEAD = 16
_CACHED_ROWS = 1 << 19  # counters of smaller tables are near enough


@njit(nogil=True, cache=True)
def tally_labels(labels: Any, one: int, counts: Any) -> int:
    """Count labels of 0, of 1, and others."""
    fault = -1
    for b in range(labels.size):
        if labels[b] == 0:
            counts[0] += 1
        elif labels[b] == one:
            counts[1] += 1
        else:
            counts[2] += 1
            if fault < 0:
                fault = b
    return fault


@njit(nogil=True, cache=True)
def tally_dense(values: Any, words: Any, bins: Any, moments: Any, extremes: Any) -> tuple[int, int]:
    """Histograms, moments and extremes of dense columns."""
    row, column = -1, 0
    for b in range(values.shape[0]):
        for n in range(values.shape[1]):
            word = words[b, n]
            bins[n, (word >> VALUE_SHIFT) & (VALUE_BINS - 1)] += 1
            if word & _EXPONENT == _EXPONENT:
                if row < 0:
                    row, column = b, n
                continue
            value = values[b, n]
            moments[n, 0] += value
            moments[n, 1] += np.float64(value) * value
            extremes[n, 0] = min(extremes[n, 0], value)
            extremes[n, 1] = max(extremes[n, 1], value)
    return row, column


@njit(nogil=True, inline="always")
def _group(key: Any) -> Any:
    if key < SINGLES:
        return key
    return SINGLES + np.int64((np.uint64(key) * np.uint64(0x9E37_79B9_7F4A_7C15)) >> np.uint64(58))


@njit(nogil=True, inline="always")
def _counter(key: Any, shift: Any) -> Any:
    return key if key < HEAD else HEAD + ((key - HEAD) >> shift)


@njit(nogil=True, inline="always")
def _raise_counter(counters: Any, counter: Any, carried: Any, full: Any) -> Any:
    """Count a look-up; returns how many counters were full so far."""
    if counters[counter] < FULL:
        counters[counter] += 1
        return full
    carried[full] = counter
    counters[counter] = 1
    return full + 1


@njit(nogil=True, inline="always")
def _ask(words: Any, row: int, word: int, wide: bool, address: Any, start: Any, shift: Any) -> None:
    """Have the counter of a key fetched; an address that is none does no harm."""
    prefetch_row(address, start + _counter(key_at(words, row, word, wide), shift), 2)


@njit(nogil=True, cache=True)
def _tally_column(
    words: Any,
    begin: int,
    end: int,
    word: int,
    wide: bool,
    rows: int,
    many: bool,
    start: int,
    shift: int,
    learn: bool,
    counters: Any,
    totals: Any,
    groups: Any,
    carried: Any,
    full: int,
) -> tuple[int, int]:
    """One key column of some rows: the first row with a key outside its table, or -1, and the full counters so far."""
    address, mask, fault, found = counters.ctypes.data, (1 << shift) - 1, -1, 0
    ahead = _AHEAD if rows > _CACHED_ROWS else end
    for b in range(begin, end):
        if b + ahead < end:
            _ask(words, b + ahead, word, wide, address, start, shift)
        key = key_at(words, b, word, wide)
        if key < 0 or key >= rows:
            outside = key != -1 or not many
            totals[OUTSIDE if outside else MISSING] += 1
            if outside and fault < 0:
                fault = b
            continue
        found += 1
        counted = key < HEAD or (key - HEAD) & mask == 0
        if learn:
            if counted:
                full = _raise_counter(counters, start + _counter(key, shift), carried, full)
            continue
        groups[_group(key)] += 1
        if counted and counters[start + _counter(key, shift)] == 0:
            totals[UNSEEN] += mask + 1 if key >= HEAD else 1
    totals[KEYS] += found
    return fault, full


@njit(nogil=True, cache=True)
def tally_keys(
    words: Any,
    first: int,
    wide: bool,
    columns: Any,
    table_rows: Any,
    missing_keys: bool,
    starts: Any,
    shifts: Any,
    learn: bool,
    counters: Any,
    totals: Any,
    groups: Any,
    carried: Any,
) -> tuple[int, int, int]:
    """Count the keys of some tables, column by column in blocks of rows; counters are asked for ahead."""
    step = 2 if wide else 1
    row, column, full = words.shape[0], -1, 0
    for begin in range(0, words.shape[0], _BLOCK):
        end = min(begin + _BLOCK, words.shape[0])
        for t in range(table_rows.size):
            many = missing_keys or columns[t + 1] - columns[t] > 1
            for h in range(columns[t], columns[t + 1]):
                fault, full = _tally_column(
                    words,
                    begin,
                    end,
                    first + h * step,
                    wide,
                    table_rows[t],
                    many,
                    starts[t],
                    shifts[t],
                    learn,
                    counters,
                    totals[t],
                    groups[t],
                    carried,
                    full,
                )
                if fault >= 0 and fault < row:
                    row, column = fault, h
    return (row if column >= 0 else -1), column, full


@njit(nogil=True, cache=True)
def tally_weights(words: Any, first: int, wide: bool, columns: Any, weight: int, wrong: Any) -> tuple[int, int]:
    """Count weights that are not finite, of keys that are there."""
    row, column = -1, -1
    for b in range(words.shape[0]):
        for t in range(wrong.size):
            for h in range(columns[t], columns[t + 1]):
                high = words[b, first + h * 2 + 1] if wide else words[b, first + h]
                if high >= 0 and words[b, weight + h] & _EXPONENT == _EXPONENT:
                    wrong[t] += 1
                    if row < 0:
                        row, column = b, h
    return row, column
