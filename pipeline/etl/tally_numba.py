"""Compiled half of ``pipeline.etl.tally``: counting into hash tables, and adding sorted counts up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_U = np.uint64
_FACTOR = _U(0x9E3779B1)  # 2^32 / golden ratio: Fibonacci hashing (Knuth, TAOCP 3, 6.4)
_LOW = _U(0xFFFFFFFF)
_32 = _U(32)


@njit(nogil=True, cache=True)
def count(values: Any, missing_as: int, entries: Any, used: int) -> tuple[int, int, int]:
    """See ``tally.count``."""
    mask = _U(len(entries) - 1)
    shift = _32
    while (_U(1) << (_32 - shift)) < _U(len(entries)):
        shift -= _U(1)
    most = len(entries) * 3 // 5
    missing = 0
    for place in range(len(values)):
        value = values[place]
        if value < 0:
            if missing_as < 0:
                missing += 1
                continue
            value = missing_as
        key = _U(value)
        slot = ((key * _FACTOR) & _LOW) >> shift
        while True:
            entry = entries[slot]
            if entry == _U(0):
                if used >= most:
                    return place, used, missing
                entries[slot] = key << _32 | _U(1)
                used += 1
                break
            if entry >> _32 == key:
                entries[slot] = entry + _U(1)
                break
            slot = (slot + _U(1)) & mask
    return len(values), used, missing


@njit(nogil=True, cache=True)
def rehash(old: Any, new: Any) -> None:
    """See ``tally.rehash``."""
    mask = _U(len(new) - 1)
    shift = _32
    while (_U(1) << (_32 - shift)) < _U(len(new)):
        shift -= _U(1)
    for entry in old:
        if entry != _U(0):
            slot = (((entry >> _32) * _FACTOR) & _LOW) >> shift
            while new[slot] != _U(0):
                slot = (slot + _U(1)) & mask
            new[slot] = entry


@njit(nogil=True, cache=True)
def pack(entries: Any) -> int:
    """See ``tally.pack``."""
    kept = 0
    for place in range(len(entries)):
        if entries[place] != _U(0):
            entries[kept] = entries[place]
            kept += 1
    return kept


@njit(nogil=True, cache=True)
def add_up(entries: Any, least: int, values: Any, counts: Any) -> int:
    """See ``tally.add_up``."""
    kept = 0
    place = 0
    while place < len(entries):
        value = entries[place] >> _32
        total = np.int64(0)
        while place < len(entries) and entries[place] >> _32 == value:
            total += np.int64(entries[place] & _LOW)
            place += 1
        if total >= least:
            values[kept] = value
            counts[kept] = total
            kept += 1
    return kept


@njit(nogil=True, cache=True)
def order_by_count(values: Any, counts: Any, steps: Any, starts: Any, out: Any) -> None:
    """See ``tally.order_by_count``."""
    for place in range(len(values)):
        count_here = counts[place]
        low, high = 0, len(steps) - 1
        if steps[high] != count_here:
            while low < high:
                middle = (low + high) // 2
                if steps[middle] > count_here:
                    low = middle + 1
                else:
                    high = middle
        else:
            low = high
        out[starts[low]] = values[place]
        starts[low] += 1
