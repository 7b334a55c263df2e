"""Compiled half of ``pipeline.etl.lookup``: categories to numbers through a hash table."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_U = np.uint64
_FACTOR = _U(0x9E3779B1)
_LOW = _U(0xFFFFFFFF)
_32 = _U(32)


@njit(nogil=True, cache=True)
def fill(values: Any, first: int, skipped: int, entries: Any) -> None:
    """See ``lookup.fill``."""
    slots = _U(len(entries))
    for place in range(len(values)):
        number = first + place
        if number == skipped:
            continue
        key = _U(values[place])
        slot = (((key * _FACTOR) & _LOW) * slots) >> _32
        while entries[slot] != _U(0):
            slot += _U(1)
            if slot == slots:
                slot = _U(0)
        entries[slot] = key << _32 | _U(number)


@njit(nogil=True, cache=True)
def find(values: Any, entries: Any, missing: int, absent: int, out: Any) -> None:
    """See ``lookup.find``."""
    slots = _U(len(entries))
    for place in range(len(values)):
        value = values[place]
        if value < 0:
            out[place] = missing
            continue
        key = _U(value)
        slot = (((key * _FACTOR) & _LOW) * slots) >> _32
        number = np.int64(absent)
        while True:
            entry = entries[slot]
            if entry == _U(0):
                break
            if entry >> _32 == key:
                number = np.int64(entry & _LOW)
                break
            slot += _U(1)
            if slot == slots:
                slot = _U(0)
        out[place] = number
