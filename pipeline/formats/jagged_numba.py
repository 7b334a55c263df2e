"""Compiled gathers of the bags of one table.

Shapes: R rows of the split, B rows of the batch, K keys in the file. Single-threaded and without the interpreter's
lock, as in ``raw_numba``.
"""

from __future__ import annotations

import math
from typing import Any

from numba import njit


@njit(nogil=True, cache=True)
def count_bags(bounds: Any, rows: Any, num_keys: int, longest: int, counts: Any) -> int:
    """Lengths of the bags.

    Args:
        bounds: [R + 1] int64, the file of row offsets.
        rows: [B] int64.
        num_keys: K.
        longest: the table's hotness.
        counts: [B] int64, written.

    Returns:
        The first row of the batch whose offsets fall, leave the file of keys or lie too far apart, or -1.
    """
    for b in range(rows.size):
        start, stop = bounds[rows[b]], bounds[rows[b] + 1]
        if start < 0 or stop < start or stop > num_keys or stop - start > longest:
            return b
        counts[b] = stop - start
    return -1


@njit(nogil=True, cache=True)
def copy_bags(bounds: Any, stored: Any, rows: Any, table_rows: int, offsets: Any, keys: Any) -> tuple[int, int]:
    """Copy and check the keys of the bags.

    Args:
        bounds: [R + 1] int64.
        stored: [K] int32 or int64, the file of keys.
        rows: [B] int64.
        table_rows: keys lie below this.
        offsets: [B] int64, each bag's first place in ``keys``.
        keys: written.

    Returns:
        (row of the batch, place in the file) of the first key that is out of range, or (-1, 0).
    """
    for b in range(rows.size):
        k = offsets[b]
        for j in range(bounds[rows[b]], bounds[rows[b] + 1]):
            key = stored[j]
            if key < 0 or key >= table_rows:
                return b, j
            keys[k] = key
            k += 1
    return -1, 0


@njit(nogil=True, cache=True)
def copy_weights(bounds: Any, stored: Any, rows: Any, offsets: Any, weights: Any) -> tuple[int, int]:
    """Copy the weights of the bags; returns (row of the batch, place in the file) of one that is not finite."""
    for b in range(rows.size):
        k = offsets[b]
        for j in range(bounds[rows[b]], bounds[rows[b] + 1]):
            if not math.isfinite(stored[j]):
                return b, j
            weights[k] = stored[j]
            k += 1
    return -1, 0
