"""Compiled places of keys; the reference is in ``frequent_rows.py``."""

from __future__ import annotations

import numba
import numpy as np

_BLOCK = 4096
"""Keys of one table that make a piece of work."""


@numba.njit(nogil=True, forceinline=True, cache=True)
def _ones(word):  # type: ignore[no-untyped-def]
    """Bits that are set in 64 (Warren, Hacker's Delight, section 5-1)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(parallel=True, nogil=True, cache=True)
def place(keys, ends, word_start, words, before, threshold, out):  # type: ignore[no-untyped-def]
    """See ``frequent_rows.place``."""
    for table in range(len(ends)):
        begin = ends[table - 1] if table > 0 else 0
        blocks = (ends[table] - begin + _BLOCK - 1) // _BLOCK
        for block in numba.prange(blocks):
            first = begin + block * _BLOCK
            for k in range(first, min(first + _BLOCK, ends[table])):
                row = np.int64(keys[k])
                if word_start[table] < 0:
                    out[k] = row
                    continue
                word = words[word_start[table] + (row >> 6)]
                bit = np.uint64(row & 63)
                if (word >> bit) & np.uint64(1):
                    lower = word & ((np.uint64(1) << bit) - np.uint64(1))
                    out[k] = before[word_start[table] + (row >> 6)] + _ones(lower)
                else:
                    out[k] = row + threshold[table]
