"""Compiled permutations; references in ``permutation.py``."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np


@numba.njit(nogil=True, cache=True, inline="always")
def _mixed(half: Any, key: Any) -> Any:
    value = np.uint32(half) ^ key
    value ^= value >> np.uint32(16)
    value = np.uint32(value * np.uint32(0x85EBCA6B))
    value ^= value >> np.uint32(13)
    value = np.uint32(value * np.uint32(0xC2B2AE35))
    return np.uint64(value ^ value >> np.uint32(16))


@numba.njit(nogil=True, cache=True)
def permute(start: int, keys: Any, size: int, out: Any) -> None:
    """See ``permutation.permute``."""
    bits = 2
    while (size - 1) >> bits:
        bits += 1
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    for i in range(len(out)):
        value = np.uint64(start + i)
        while True:
            high, low = value >> low_bits, value & low_mask
            for turn in range(0, len(keys), 2):
                high ^= _mixed(low, keys[turn]) & high_mask
                low ^= _mixed(high, keys[turn + 1]) & low_mask
            value = high << low_bits | low
            if value < np.uint64(size):
                break
        out[i] = value
