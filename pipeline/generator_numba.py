"""Compiled rows of a synthetic set: every row from (seed, row number) alone, integer and float32 arithmetic.

Rows are made in blocks of ``_LANES``, one operation for all of them after another, so that the compiler uses vector
instructions; each row's operations and their order are those of the reference.

Shapes: B rows, L lanes of a block, V 32-bit words of a Raw row, N dense columns, T tables, H key columns of all tables,
S segments of all tables' laws, E latent dimensions, W random words a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pipeline.generator import BYTES_MEAN, BYTES_SCALE, EXP2_SERIES, LOG2_E, STREAM, UNIT

_LANES = 256
_MASK = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_K0, _K1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_BYTES, _SUM = np.uint32(0x00FF00FF), np.uint32(0xFFFF)
_FIRST_FACTOR = np.uint32(0x9E3779B1)
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = EXP2_SERIES
_ONE, _SMALLEST, _LARGEST = np.float32(1), np.float32(-60), np.float32(60)


@njit(nogil=True, inline="always")
def _round(c0: Any, c1: Any, c2: Any, c3: Any, key0: Any, key1: Any) -> Any:
    product0, product1 = c0 * _M0, c2 * _M1
    return (
        (product1 >> _HIGH) ^ c1 ^ (key0 & _MASK),
        product1 & _MASK,
        (product0 >> _HIGH) ^ c3 ^ (key1 & _MASK),
        product0 & _MASK,
    )


@njit(nogil=True)
def _philox(numbers: Any, block: int, seed: Any, words: Any) -> None:
    """Four random words [4, L] of every row, Philox4x32-10 written out."""
    k0, k1 = seed & _MASK, seed >> _HIGH
    for lane in range(_LANES):
        row = np.uint64(numbers[lane])
        c0, c1, c2, c3 = row & _MASK, row >> _HIGH, np.uint64(block), np.uint64(STREAM)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + _K0, k1 + _K1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(2) * _K0, k1 + np.uint64(2) * _K1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(3) * _K0, k1 + np.uint64(3) * _K1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(4) * _K0, k1 + np.uint64(4) * _K1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(5) * _K0, k1 + np.uint64(5) * _K1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(6) * _K0, k1 + np.uint64(6) * _K1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(7) * _K0, k1 + np.uint64(7) * _K1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(8) * _K0, k1 + np.uint64(8) * _K1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(9) * _K0, k1 + np.uint64(9) * _K1)
        words[0, lane], words[1, lane], words[2, lane], words[3, lane] = c0, c1, c2, c3


@njit(nogil=True, inline="always")
def _bell(word: Any) -> Any:
    """Sum of the four bytes, brought to mean 0 and variance 1; they are added two and two side by side."""
    total = (word & _BYTES) + ((word >> np.uint32(8)) & _BYTES)
    total = np.uint32(total + (total >> np.uint32(16))) & _SUM
    return np.float32(np.int32(np.int32(total) - np.int32(BYTES_MEAN))) * BYTES_SCALE


@njit(nogil=True, inline="always")
def _hash(product: Any, salt: Any) -> Any:
    """Of a key times ``_FIRST_FACTOR``, which all salts share."""
    z = np.uint32(product ^ salt)
    z = np.uint32(np.uint32(z ^ (z >> np.uint32(16))) * np.uint32(0x7FEB352D))
    z = np.uint32(np.uint32(z ^ (z >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(z ^ (z >> np.uint32(16)))


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


@njit(nogil=True)
def _keys(
    choice: Any, place: Any, start: int, stop: int, limits: Any, aliases: Any, firsts: Any, sizes: Any, keys: Any
) -> None:
    """A key column [L] from two random words a row: which segment, and which key inside it."""
    count = np.uint64(stop - start)
    limits, aliases, firsts, sizes = limits[start:stop], aliases[start:stop], firsts[start:stop], sizes[start:stop]
    first = np.uint64(start)
    for lane in range(_LANES):
        product = np.uint64(choice[lane]) * count
        segment = product >> _HIGH
        other = np.uint64(aliases[segment]) - first
        segment = other if (product & _MASK) >= limits[segment] else segment
        keys[lane] = firsts[segment] + ((np.uint64(place[lane]) * sizes[segment]) >> _HIGH)


@njit(nogil=True)
def _dense(words: Any, factor: Any, columns: Any, logits: Any) -> None:
    """A dense column [L], and its part of the logits."""
    for lane in range(_LANES):
        x = _bell(words[lane])
        columns[lane] = np.float32(x).view(np.uint32)
        logits[lane] = logits[lane] + x * factor


@njit(nogil=True)
def _add_bells(keys: Any, salt: Any, mean: Any, scale: Any, sums: Any) -> None:
    """Sums [L] += what each key has of an effect or a latent coordinate."""
    for lane in range(_LANES):
        product = np.uint32(keys[lane] * _FIRST_FACTOR)
        sums[lane] = sums[lane] + (_bell(_hash(product, salt)) - mean) * scale


@njit(nogil=True)
def _add_one_hot(keys: Any, salts: Any, means: Any, scales: Any, sums: Any) -> None:
    """What the one key of a table has, into all sums of its row at once: E = 4.

    Written out, since a loop over coordinates inside that over lanes would keep the compiler from vector instructions.
    ``sums``: [(1 + 2 E) L], one array, so that it need not be told from others before every loop.
    """
    salt0, salt1, salt2 = np.uint32(salts[0]), np.uint32(salts[1]), np.uint32(salts[2])
    salt3, salt4 = np.uint32(salts[3]), np.uint32(salts[4])
    mean0, mean1, mean2, mean3, mean4 = means[0], means[1], means[2], means[3], means[4]
    scale0, scale1, scale2, scale3, scale4 = scales[0], scales[1], scales[2], scales[3], scales[4]
    for lane in range(_LANES):
        product = np.uint32(keys[lane] * _FIRST_FACTOR)
        sums[lane] = sums[lane] + (_bell(_hash(product, salt0)) - mean0) * scale0
        u = (_bell(_hash(product, salt1)) - mean1) * scale1
        sums[lane + _LANES] = sums[lane + _LANES] + u
        sums[lane + 5 * _LANES] = sums[lane + 5 * _LANES] + u * u
        u = (_bell(_hash(product, salt2)) - mean2) * scale2
        sums[lane + 2 * _LANES] = sums[lane + 2 * _LANES] + u
        sums[lane + 6 * _LANES] = sums[lane + 6 * _LANES] + u * u
        u = (_bell(_hash(product, salt3)) - mean3) * scale3
        sums[lane + 3 * _LANES] = sums[lane + 3 * _LANES] + u
        sums[lane + 7 * _LANES] = sums[lane + 7 * _LANES] + u * u
        u = (_bell(_hash(product, salt4)) - mean4) * scale4
        sums[lane + 4 * _LANES] = sums[lane + 4 * _LANES] + u
        sums[lane + 8 * _LANES] = sums[lane + 8 * _LANES] + u * u


@njit(nogil=True)
def _add_vector(vector: Any, total: Any, square: Any) -> None:
    """One coordinate [L] of a table's vector, into its sum and the sum of its squares."""
    for lane in range(_LANES):
        total[lane] = total[lane] + vector[lane]
        square[lane] = square[lane] + vector[lane] * vector[lane]


@njit(nogil=True)
def _add_pairs(total: Any, square: Any, odd: bool, logits: Any) -> None:
    """One coordinate's part [L] of the pairs of tables."""
    for lane in range(_LANES):
        pairs = total[lane] * total[lane] - square[lane]
        logits[lane] = logits[lane] - pairs if odd else logits[lane] + pairs


@njit(nogil=True)
def _labels(logits: Any, words: Any, labels: Any) -> None:
    """Labels [L]."""
    for lane in range(_LANES):
        u = np.float32(np.uint32(words[lane] >> np.uint32(8))) * UNIT
        labels[lane] = u * (_ONE + _exp2(-(logits[lane] * LOG2_E))) < _ONE


@njit(nogil=True)
def _transpose(columns: Any, records: Any) -> None:
    """Rows [B, V] of columns [V, L], both of which a near cache holds; the lanes behind the last row go nowhere."""
    for lane in range(records.shape[0]):
        for word in range(records.shape[1]):
            records[lane, word] = columns[word, lane]


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
    num_blocks = (1 + num_dense + 2 * (records.shape[1] - 1 - num_dense) + 3) // 4
    rows, vectors = np.zeros(_LANES, np.int64), np.empty((num_latent, _LANES), np.float32)
    words = np.empty((4 * num_blocks, _LANES), np.uint32)
    columns = np.empty((records.shape[1], _LANES), np.uint32)
    sums = np.empty((1 + 2 * num_latent) * _LANES, np.float32)
    logit, parts = sums[:_LANES], sums[_LANES:].reshape(2 * num_latent, _LANES)
    totals, squares = parts[:num_latent], parts[num_latent:]
    for first in range(0, numbers.size, _LANES):
        count = min(_LANES, numbers.size - first)
        rows[:count] = numbers[first : first + count]
        for block in range(num_blocks):
            _philox(rows, block, seed, words[4 * block : 4 * block + 4])
        logit[:] = bias
        parts[:] = np.float32(0)
        for n in range(num_dense):
            _dense(words[1 + n], linear[n], columns[1 + n], logit)
        column = 0
        for t in range(hotness.size):
            start, stop = law_starts[t], law_starts[t + 1]
            if hotness[t] == 1 and num_latent == 4:
                at, keys = 1 + num_dense + 2 * column, columns[1 + num_dense + column]
                _keys(words[at], words[at + 1], start, stop, limits, aliases, firsts, sizes, keys)
                _add_one_hot(keys, salts[t], means[t], scales[t], sums)
                column += 1
                continue
            vectors[:] = np.float32(0)
            for _ in range(hotness[t]):
                at, keys = 1 + num_dense + 2 * column, columns[1 + num_dense + column]
                _keys(words[at], words[at + 1], start, stop, limits, aliases, firsts, sizes, keys)
                _add_bells(keys, np.uint32(salts[t, 0]), means[t, 0], scales[t, 0], logit)
                for e in range(num_latent):
                    _add_bells(keys, np.uint32(salts[t, 1 + e]), means[t, 1 + e], scales[t, 1 + e], vectors[e])
                column += 1
            for e in range(num_latent):
                _add_vector(vectors[e], totals[e], squares[e])
        for e in range(num_latent):
            _add_pairs(totals[e], squares[e], e % 2 == 1, logit)
        _labels(logit, words[0], columns[0])
        _transpose(columns, records[first : first + count])
        logits[first : first + count] = logit[:count]
