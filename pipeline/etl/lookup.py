"""Numbers of one column's categories in a hash table: open addressing, 60 % full, 13.3 bytes a category.

An entry is one uint64: the 32-bit value above, its number below; a slot that is 0 is empty. The slot of a value is
the high part of (hash times slots), so that any number of slots will do. The references of ``lookup_numba`` stand
here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pipeline.etl import lookup_numba as engine

_FILL = 0.6
_FEWEST_SLOTS = 64


def lookup_bytes(categories: int) -> int:
    """Bytes of the table of so many categories."""
    return 8 * max(_FEWEST_SLOTS, int(categories / _FILL) + 1)


class Lookup:
    """Numbers of one column's categories, or of a part of them."""

    def __init__(self, categories: int, parts: Iterable[tuple[int, Any]], missing: int, *, absent: int) -> None:
        """Lay the values out.

        Args:
            categories: in all parts.
            parts: (number of the first, values [n] uint32) in ascending order, so that frequent values are found first.
            missing: number of the missing category; 0: none of its own.
            absent: what a value that is not in the table gets.
        """
        self._entries = np.zeros(lookup_bytes(categories) // 8, np.uint64)
        for first, values in parts:
            engine.fill(values, first, missing, self._entries)
        self._missing = missing
        self._absent = absent

    def find(self, values: Any, out: Any) -> None:
        """Write the numbers of values [n] int64 into ``out`` [n] int32."""
        engine.find(values, self._entries, self._missing, self._absent, out)


def fill(values: Any, first: int, skipped: int, entries: Any) -> None:
    """Put values[i] -> number ``first + i`` into a table.

    Args:
        values: [n] uint32, distinct but for the one skipped.
        first: number of the first.
        skipped: the number whose value means nothing (the missing category's).
        entries: [slots] uint64, changed in place; there must be room.
    """
    for number, value in enumerate(values.tolist(), first):
        if number == skipped:
            continue
        slot = (value * 0x9E3779B1 & 0xFFFFFFFF) * len(entries) >> 32
        while entries[slot]:
            slot = (slot + 1) % len(entries)
        entries[slot] = value << 32 | number


def find(values: Any, entries: Any, missing: int, absent: int, out: Any) -> None:
    """Fill out[i] = number of values[i].

    Args:
        values: [n] int64; negative ones are missing.
        entries: [slots] uint64.
        missing: number of a missing value.
        absent: number of a value that the table does not hold.
        out: [n] int32, filled.
    """
    filled = entries[entries != 0]
    numbers = dict(zip((filled >> np.uint64(32)).tolist(), (filled & np.uint64(0xFFFFFFFF)).tolist(), strict=True))
    out[...] = [missing if value < 0 else numbers.get(value, absent) for value in values.tolist()]
