"""Pseudo-random permutations that are computed where they are asked for, not drawn and kept.

A Feistel network: whatever its rounds do, it maps the numbers of 2b bits, or b and b + 1, one to one (M. Luby and
C. Rackoff, How to construct pseudorandom permutations, 1988). Numbers past the end are sent through again until they
fall inside (J. Black and P. Rogaway, Ciphers with arbitrary finite domains, 2002): less than twice on average.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ROUNDS = 6
"""Three of each half; each mixes by the finaliser of MurmurHash3 (A. Appleby, public domain)."""


def permute(start: int, keys: Any, size: int, out: Any) -> None:
    """Images of ``start .. start + n`` under the permutation of ``0 .. size - 1`` that ``keys`` name.

    Args:
        start: first position.
        keys: [r] uint32, r even: a key for each round.
        size: 2 .. 2^62.
        out: [n] int64; ``start + n <= size``.
    """
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    images = np.arange(start, start + len(out), dtype=np.uint64)
    outside = np.ones(len(out), np.bool_)
    while outside.any():
        value = images[outside]
        high, low = value >> low_bits, value & low_mask
        for turn in range(0, len(keys), 2):
            high ^= _mixed(low, keys[turn]) & high_mask
            low ^= _mixed(high, keys[turn + 1]) & low_mask
        images[outside] = high << low_bits | low
        outside = images >= np.uint64(size)
    out[:] = images


def _mixed(half: Any, key: Any) -> Any:
    """32 bits of a hash of half a number [n] uint64 (of at most 31 bits) and a key."""
    value = (half ^ np.uint64(key)) & np.uint64(0xFFFFFFFF)
    value ^= value >> np.uint64(16)
    value = value * np.uint64(0x85EBCA6B) & np.uint64(0xFFFFFFFF)
    value ^= value >> np.uint64(13)
    value = value * np.uint64(0xC2B2AE35) & np.uint64(0xFFFFFFFF)
    return value ^ value >> np.uint64(16)
