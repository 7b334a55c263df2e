"""Compiled rows of a synthetic set: every row from (seed, row number) alone, integer and float32 arithmetic.

Shapes: B rows, V 32-bit words of a Raw row, N dense columns, T tables, H key columns of all tables, S segments of
all tables' laws, E latent dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pipeline.generator import BYTES_MEAN, BYTES_SCALE, EXP2_SERIES, LOG2_E, STREAM, UNIT

_MASK = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = EXP2_SERIES
_ONE, _SMALLEST, _LARGEST = np.float32(1), np.float32(-60), np.float32(60)


@njit(nogil=True, inline="always")
def _philox(row: Any, block: Any, seed: Any, words: Any, at: int) -> None:
    c0, c1, c2, c3 = row & _MASK, row >> _HIGH, np.uint64(block), np.uint64(STREAM)
    key0, key1 = seed & _MASK, seed >> _HIGH
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (product1 >> _HIGH) ^ c1 ^ key0, (product0 >> _HIGH) ^ c3 ^ key1
        c1, c3 = product1 & _MASK, product0 & _MASK
        key0, key1 = (key0 + np.uint64(0x9E3779B9)) & _MASK, (key1 + np.uint64(0xBB67AE85)) & _MASK
    words[at], words[at + 1], words[at + 2], words[at + 3] = c0, c1, c2, c3


@njit(nogil=True, inline="always")
def _bell(word: Any) -> Any:
    """Sum of the four bytes, brought to mean 0 and variance 1."""
    total = (word & np.uint64(255)) + ((word >> np.uint64(8)) & np.uint64(255))
    total += ((word >> np.uint64(16)) & np.uint64(255)) + (word >> np.uint64(24))
    return np.float32(np.int64(total) - BYTES_MEAN) * BYTES_SCALE


@njit(nogil=True, inline="always")
def _hash(key: Any, salt: Any) -> Any:
    z = ((key * np.uint64(0x9E3779B1)) & _MASK) ^ salt
    z = ((z ^ (z >> np.uint64(16))) * np.uint64(0x7FEB352D)) & _MASK
    z = ((z ^ (z >> np.uint64(15))) * np.uint64(0x846CA68B)) & _MASK
    return z ^ (z >> np.uint64(16))


@njit(nogil=True, inline="always")
def _exp2(y: Any) -> Any:
    y = min(max(y, _SMALLEST), _LARGEST)
    whole = np.floor(y)
    f = y - whole
    series = _E6 * f + _E5
    series = series * f + _E4
    series = series * f + _E3
    series = series * f + _E2
    series = series * f + _E1
    series = series * f + _E0
    return series * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(nogil=True, cache=True)
def generate_records(
    numbers: Any,
    seed: Any,
    hotness: Any,
    law_starts: Any,
    limits: Any,
    aliases: Any,
    firsts: Any,
    sizes: Any,
    salts: Any,
    means: Any,
    scales: Any,
    linear: Any,
    bias: Any,
    records: Any,
    logits: Any,
) -> None:
    """See ``pipeline.generator.generate_records``."""
    num_dense, num_latent = linear.size, salts.shape[1] - 1
    words = np.empty((2 + num_dense + 2 * (records.shape[1] - 1 - num_dense) + 3) // 4 * 4 + 4, np.uint64)
    vector = np.empty(num_latent, np.float32)
    total, squares = np.empty(num_latent, np.float32), np.empty(num_latent, np.float32)
    num_words = 1 + num_dense + 2 * (records.shape[1] - 1 - num_dense)
    for b in range(numbers.size):
        row = np.uint64(numbers[b])
        for block in range((num_words + 3) // 4):
            _philox(row, block, seed, words, 4 * block)
        logit = bias
        for n in range(num_dense):
            x = _bell(words[1 + n])
            records[b, 1 + n] = np.float32(x).view(np.uint32)
            logit = logit + x * linear[n]
        total[:] = np.float32(0)
        squares[:] = np.float32(0)
        column = 0
        for t in range(hotness.size):
            vector[:] = np.float32(0)
            start = law_starts[t]
            count = np.uint64(law_starts[t + 1] - start)
            for _ in range(hotness[t]):
                at = 1 + num_dense + 2 * column
                product = words[at] * count
                segment = start + np.int64(product >> _HIGH)
                if (product & _MASK) >= limits[segment]:
                    segment = aliases[segment]
                key = firsts[segment] + ((words[at + 1] * sizes[segment]) >> _HIGH)
                records[b, 1 + num_dense + column] = np.uint32(key)
                logit = logit + (_bell(_hash(key, salts[t, 0])) - means[t, 0]) * scales[t, 0]
                for e in range(num_latent):
                    value = (_bell(_hash(key, salts[t, 1 + e])) - means[t, 1 + e]) * scales[t, 1 + e]
                    vector[e] = vector[e] + value
                column += 1
            for e in range(num_latent):
                total[e] = total[e] + vector[e]
                squares[e] = squares[e] + vector[e] * vector[e]
        for e in range(num_latent):
            pairs = total[e] * total[e] - squares[e]
            logit = logit - pairs if e % 2 else logit + pairs
        logits[b] = logit
        u = np.float32(words[0] >> np.uint64(8)) * UNIT
        records[b, 0] = np.uint32(u * (_ONE + _exp2(-(logit * LOG2_E))) < _ONE)
