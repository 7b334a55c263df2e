"""Compiled numbering and summing of equal ids; references in ``row_route.py``."""

from __future__ import annotations

import numba
import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2^64 / golden ratio: spreads consecutive ids over the table (Knuth's multiplicative hashing)."""

_COLUMNS = 32
"""Columns that one thread adds up at a time, at least: two cache lines of single precision."""


@numba.njit(nogil=True, cache=True)
def number_ids(ids, slots, distinct):  # type: ignore[no-untyped-def]
    """See ``row_route.number_ids``."""
    bits = 3
    while (1 << bits) < 2 * len(ids):
        bits += 1
    table = np.full(1 << bits, -1, np.int64)
    mask = (1 << bits) - 1
    shift = np.uint64(64 - bits)
    count = 0
    for k in range(len(ids)):
        place = np.int64((np.uint64(ids[k]) * _MULTIPLIER) >> shift)
        while table[place] >= 0 and distinct[table[place]] != ids[k]:
            place = (place + 1) & mask
        if table[place] < 0:
            table[place] = count
            distinct[count] = ids[k]
            count += 1
        slots[k] = table[place]
    return count


@numba.njit(parallel=True, nogil=True, cache=True)
def sum_by_slot(rows, slots, out):  # type: ignore[no-untyped-def]
    """See ``row_route.sum_by_slot``."""
    dim = rows.shape[1]
    # Threads take columns, so that a row's sum has one order whatever their number.
    parts = max(1, dim // _COLUMNS)
    for part in numba.prange(parts):
        begin = part * dim // parts
        end = (part + 1) * dim // parts
        for m in range(len(out)):
            for d in range(begin, end):
                out[m, d] = 0
        for k in range(len(slots)):
            slot = slots[k]
            for d in range(begin, end):
                out[slot, d] += rows[k, d]
