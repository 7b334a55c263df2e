"""Compiled gathers from mapped rows into the arrays of a batch.

Shapes: R rows of a file, V 32-bit words a row, B rows of the batch, T tables, H key columns of all tables, K
keys. ``rows`` [B] are rows of the file and ``places`` [B] their rows of the batch, so that a batch may come
from several files. Nothing here runs in parallel: several reader threads do, next to the engine's own, and the
interpreter's lock is free (nogil). 64-bit keys are put together from two words, as a row need not be aligned.

Every function that checks returns the first fault as (row of the batch or -1, column or table).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

_BLOCK_ROWS = 64
_MOST, _LEAST = np.int32(2**31 - 1), np.int32(-(2**31))
_EXPONENT = np.int32(0x7F80_0000)
"""Bits of a float32 that are all set where it is no finite number."""


@njit(nogil=True, cache=True)
def gather_head(
    words: Any, floats: Any, rows: Any, places: Any, one: int, log1p: bool, labels: Any, dense: Any
) -> tuple[int, int]:
    """Labels and dense columns; a fault in column 0 is the label, in column 1 + n dense column n.

    Args:
        words: [R, V] int32, the file.
        floats: [R, V] float32, the same bytes.
        rows: [B] int64.
        places: [B] int64.
        one: the word of a label of 1; a label of 0 is the word 0.
        log1p: dense columns are int32 and become log(1 + max(x, 0)).
        labels: [B] float32, written.
        dense: [B, N] float32, written.
    """
    for start in range(0, rows.size, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, rows.size)
        wrong = False
        for i in range(start, stop):  # without a way out, so that the compiler uses vector instructions
            row, b = rows[i], places[i]
            label = words[row, 0]
            wrong |= (label != 0) & (label != one)
            labels[b] = label != 0
            for n in range(dense.shape[1]):
                if log1p:
                    dense[b, n] = math.log1p(max(words[row, 1 + n], 0))
                else:
                    wrong |= (words[row, 1 + n] & _EXPONENT) == _EXPONENT
                    dense[b, n] = floats[row, 1 + n]
        if wrong:
            return _first_in_heads(words, floats, rows[start:stop], places[start:stop], one, dense.shape[1], log1p)
    return -1, 0


@njit(nogil=True, cache=True)
def _first_in_heads(
    words: Any, floats: Any, rows: Any, places: Any, one: int, num_dense: int, log1p: bool
) -> tuple[int, int]:
    """The first label or dense value of rows, in their order, that is wrong."""
    for i in range(rows.size):
        if words[rows[i], 0] != 0 and words[rows[i], 0] != one:
            return places[i], 0
        for n in range(num_dense):
            if not log1p and not math.isfinite(floats[rows[i], 1 + n]):
                return places[i], 1 + n
    return -1, 0


@njit(nogil=True, inline="always")
def key_at(words: Any, row: int, word: int, wide: bool) -> Any:
    """The key that starts at a word of a row."""
    if wide:
        low = np.int64(words[row, word]) & np.int64(0xFFFFFFFF)
        return (np.int64(words[row, word + 1]) << np.int64(32)) | low
    return np.int64(words[row, word])


@njit(nogil=True, inline="always")
def _outside(key: Any, limit: Any) -> Any:
    """Whether a key is negative or at least ``limit``, in one comparison."""
    return np.uint64(key) >= np.uint64(limit)


@njit(nogil=True)
def _one_column(
    words: Any, rows: Any, places: Any, together: bool, word: int, wide: bool, limit: Any, column: Any
) -> Any:
    """The keys of a table; whether one lies outside."""
    wrong, place = False, places[0]
    if together:
        for i in range(rows.size):
            key = key_at(words, rows[i], word, wide)
            wrong |= _outside(key, limit)
            column[place + i] = key
    else:
        for i in range(rows.size):
            key = key_at(words, rows[i], word, wide)
            wrong |= _outside(key, limit)
            column[places[i]] = key
    return wrong


@njit(nogil=True, inline="always")
def _limit(rows: Any) -> Any:
    """Rows of a table as far as int32 keys can name them, so that a negative key lies beyond, too."""
    return np.uint32(min(rows, 1 << 31))


@njit(nogil=True)
def _two_columns(pairs: Any, rows: Any, pair: int, limit: Any, next_limit: Any, column: Any, next_column: Any) -> Any:
    """The keys of two tables, which one load brings; whether one lies outside."""
    wrong = False
    for i in range(rows.size):
        both = np.uint64(pairs[rows[i], pair])
        low, high = np.uint32(both), np.uint32(both >> np.uint64(32))
        wrong |= (low >= limit) | (high >= next_limit)
        column[i], next_column[i] = np.int32(low), np.int32(high)
    return wrong


@njit(nogil=True, cache=True)
def gather_one_hot(
    words: Any, pairs: Any, rows: Any, places: Any, first: int, wide: bool, table_rows: Any, keys: Any
) -> tuple[int, int]:
    """Keys of rows that hold exactly one per table.

    Args:
        words: [R, V] int32, the file.
        pairs: [R, V / 2] int64, the same bytes, where V is even and keys are narrow; else empty.
        rows: [B] int64.
        places: [B] int64, ascending.
        first: word of the first key.
        wide: keys are int64.
        table_rows: [T] int64.
        keys: [T, B] int32 or int64, written.
    """
    step = 2 if wide else 1
    for start in range(0, rows.size, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, rows.size)
        # Table by table: the rows lie in the nearest cache, and keys are written one behind the other.
        wrong, place, t = False, places[start], 0
        together = places[stop - 1] - place == stop - 1 - start  # places ascend
        while t < table_rows.size:
            word = first + t * step
            if together and pairs.size and word % 2 == 0 and t + 1 < table_rows.size:
                limit, next_limit = _limit(table_rows[t]), _limit(table_rows[t + 1])
                column, next_column = keys[t, place:], keys[t + 1, place:]
                wrong |= _two_columns(pairs, rows[start:stop], word // 2, limit, next_limit, column, next_column)
                t += 2
            else:
                part = rows[start:stop]
                wrong |= _one_column(words, part, places[start:stop], together, word, wide, table_rows[t], keys[t])
                t += 1
        if wrong:
            return _first_outside(words, rows[start:stop], places[start:stop], first, wide, table_rows)
    return -1, 0


@njit(nogil=True, cache=True)
def _first_outside(words: Any, rows: Any, places: Any, first: int, wide: bool, table_rows: Any) -> tuple[int, int]:
    """The first key of rows, in their order, that lies outside its table."""
    for i in range(rows.size):
        for t in range(table_rows.size):
            key = key_at(words, rows[i], first + t * (2 if wide else 1), wide)
            if key < 0 or key >= table_rows[t]:
                return places[i], t
    return -1, 0


@njit(nogil=True, cache=True)
def count_keys(
    words: Any,
    rows: Any,
    places: Any,
    first: int,
    wide: bool,
    columns: Any,
    table_rows: Any,
    missing_keys: bool,
    counts: Any,
) -> tuple[int, int]:
    """Check keys and count those of each bag that are there.

    Args:
        words: [R, V] int32, the file.
        rows: [B] int64.
        places: [B] int64.
        first: word of the first key.
        wide: keys are int64.
        columns: [T + 1] int64, the first key column of each table; the last entry is H.
        table_rows: [T] int64.
        missing_keys: -1 may stand in a table of one key column.
        counts: [T, B] int64, written.

    Returns:
        The first fault, its second part the key column (0 .. H - 1).
    """
    step = 2 if wide else 1
    for i in range(rows.size):
        row, b = rows[i], places[i]
        for t in range(table_rows.size):
            present = 0
            least = -1 if missing_keys or columns[t + 1] - columns[t] > 1 else 0
            for h in range(columns[t], columns[t + 1]):
                key = key_at(words, row, first + h * step, wide)
                if key < least or key >= table_rows[t]:
                    return b, h
                present += key >= 0
            counts[t, b] = present
    return -1, 0


@njit(nogil=True, cache=True)
def fill_keys(
    words: Any, rows: Any, places: Any, first: int, wide: bool, columns: Any, offsets: Any, keys: Any
) -> None:
    """Copy the keys that are there to their bags, in column order; ``offsets`` [T, B] is each bag's first key."""
    step = 2 if wide else 1
    for i in range(rows.size):
        row, b = rows[i], places[i]
        for t in range(columns.size - 1):
            k = offsets[t, b]
            for h in range(columns[t], columns[t + 1]):
                key = key_at(words, row, first + h * step, wide)
                if key >= 0:
                    keys[k] = key
                    k += 1


@njit(nogil=True, cache=True)
def fill_weights(
    words: Any, floats: Any, rows: Any, places: Any, first: int, wide: bool, columns: Any, offsets: Any, out: Any
) -> tuple[int, int]:
    """Copy the weights of the keys that are there; they follow the H keys of a row.

    Args:
        words: [R, V] int32, the file.
        floats: [R, V] float32, the same bytes.
        rows: [B] int64.
        places: [B] int64.
        first: word of the first key.
        wide: keys are int64.
        columns: [T + 1] int64, the first key column of each table.
        offsets: [T, B] int64, each bag's first key.
        out: [K] float32, written.

    Returns:
        The first weight that is not finite, its second part the key column.
    """
    step = 2 if wide else 1
    first_weight = first + columns[-1] * step
    for i in range(rows.size):
        row, b = rows[i], places[i]
        for t in range(columns.size - 1):
            k = offsets[t, b]
            for h in range(columns[t], columns[t + 1]):
                if key_at(words, row, first + h * step, wide) >= 0:
                    weight = floats[row, first_weight + h]
                    if not math.isfinite(weight):
                        return b, h
                    out[k] = weight
                    k += 1
    return -1, 0


@njit(nogil=True, cache=True)
def key_range(words: Any, first: int, wide: bool, smallest: Any, largest: Any) -> None:
    """Smallest and largest key of each key column.

    Args:
        words: [B, V] int32.
        first: word of the first key.
        wide: keys are int64.
        smallest: [H] int64, lowered.
        largest: [H] int64, raised.
    """
    if wide:
        for b in range(words.shape[0]):
            for h in range(smallest.size):
                key = key_at(words, b, first + h * 2, wide)
                smallest[h] = min(smallest[h], key)
                largest[h] = max(largest[h], key)
        return
    # In 32 bits and arrays of its own: vector instructions take sixteen columns at once.
    low, high = np.full(smallest.size, _MOST, np.int32), np.full(smallest.size, _LEAST, np.int32)
    for b in range(words.shape[0]):
        keys = words[b, first : first + smallest.size]
        for h in range(keys.size):
            low[h] = min(low[h], keys[h])
            high[h] = max(high[h], keys[h])
    if words.shape[0]:
        for h in range(smallest.size):
            smallest[h] = min(smallest[h], np.int64(low[h]))
            largest[h] = max(largest[h], np.int64(high[h]))
