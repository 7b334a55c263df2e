"""Compiled writer of Criteo's text; ``criteo_tsv.py`` has its reference. Shapes: B rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_MISSING_COUNT = -(2**31)
_TAB, _NEWLINE, _MINUS, _ZERO, _LETTER = 9, 10, 45, 48, 87  # _LETTER + 10 is "a"


@njit(nogil=True, cache=True)
def _write_integer(value: Any, out: Any, place: int) -> int:
    """Write a decimal integer; returns the place behind it."""
    if value < 0:
        out[place] = _MINUS
        place += 1
        value = -value
    digits, rest = 1, value // 10
    while rest > 0:
        digits += 1
        rest //= 10
    for back in range(digits):
        out[place + digits - 1 - back] = _ZERO + value % 10
        value //= 10
    return place + digits


@njit(nogil=True, cache=True)
def format_rows(labels: Any, counts: Any, keys: Any, out: Any) -> int:
    """Write rows as text; returns the bytes written."""
    place = 0
    for b in range(labels.size):
        out[place] = _ZERO + labels[b]
        place += 1
        for n in range(counts.shape[1]):
            out[place] = _TAB
            place += 1
            if counts[b, n] != _MISSING_COUNT:
                place = _write_integer(np.int64(counts[b, n]), out, place)
        for t in range(keys.shape[1]):
            out[place] = _TAB
            place += 1
            if keys[b, t] >= 0:
                for shift in range(28, -4, -4):
                    nibble = (keys[b, t] >> shift) & 15
                    out[place] = nibble + (_ZERO if nibble < 10 else _LETTER)
                    place += 1
        out[place] = _NEWLINE
        place += 1
    return place
