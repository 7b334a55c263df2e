"""Compiled passes over blocks of rows; ``block.py`` has the reference of each.

Shapes: B rows, N dense columns, T tables, H key columns of all tables. Single-threaded and without the interpreter's
lock, so that reading, checking and writing overlap.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

_EXPONENT = 0x7F80_0000  # all ones in the words of infinities and NaN


@njit(nogil=True, cache=True)
def _wrong_key(keys: Any, columns: Any, table_rows: Any, missing_keys: bool) -> int:
    """Column of the first key of a row that lies outside its table, or -1."""
    for t in range(table_rows.size):
        least = -1 if missing_keys or columns[t + 1] - columns[t] > 1 else 0
        for h in range(columns[t], columns[t + 1]):
            if keys[h] < least or keys[h] >= table_rows[t]:
                return int(h)
    return -1


@njit(nogil=True, cache=True)
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
    """Row and place of the first value that must not be, or (-1, 0)."""
    num_dense, num_keys = dense.shape[1], keys.shape[1]
    for b in range(labels.size):
        if labels[b] != 0 and labels[b] != 1:
            return b, 0
        if is_float:
            for n in range(num_dense):
                if dense[b, n] & _EXPONENT == _EXPONENT:
                    return b, 1 + n
        wrong = _wrong_key(keys[b], columns, table_rows, missing_keys)
        if wrong >= 0:
            return b, 1 + num_dense + wrong
        for h in range(weights.shape[1]):
            if keys[b, h] >= 0 and weights[b, h] & _EXPONENT == _EXPONENT:
                return b, 1 + num_dense + num_keys + h
    return -1, 0


@njit(nogil=True, inline="always")
def _mix(state: Any, word: Any) -> Any:
    mixed = (state ^ np.uint64(np.int64(word))) * np.uint64(0x9E37_79B9_7F4A_7C15)
    return mixed ^ (mixed >> np.uint64(29))


@njit(nogil=True, cache=True)
def sum_rows(state: Any, labels: Any, dense: Any, keys: Any, weights: Any, columns: Any) -> Any:
    """Take rows into a 64-bit sum that depends on their order; ``state`` and the result are uint64."""
    for b in range(labels.size):
        state = _mix(state, labels[b])
        for n in range(dense.shape[1]):
            state = _mix(state, dense[b, n])
        for t in range(columns.size - 1):
            present = 0
            for h in range(columns[t], columns[t + 1]):
                present += keys[b, h] >= 0
            state = _mix(state, present)
            for h in range(columns[t], columns[t + 1]):
                if keys[b, h] >= 0:
                    state = _mix(state, keys[b, h])
                    if weights.shape[1] > 0:
                        state = _mix(state, weights[b, h])
    return state


@njit(nogil=True, cache=True)
def log1p_counts(counts: Any, out: Any) -> None:
    """Fill out = log(1 + max(x, 0)) in float64, rounded to float32, as the Raw reader does."""
    for b in range(counts.shape[0]):
        for n in range(counts.shape[1]):
            out[b, n] = math.log1p(max(counts[b, n], 0))
