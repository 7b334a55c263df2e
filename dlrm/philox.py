"""Random initial values that depend on (seed, tensor name, row, column) alone: Philox4x32-10.

A tensor comes out the same in any number of pieces, on any rank, thread or machine: the generator is
integer arithmetic, and the logarithm, sine and cosine below are sums of IEEE products in a fixed order
(the libraries' own differ in the last bit between machines, and between the ends and the middle of an array).

Shapes: R rows, C columns, U = ceil(C / 4) counters a row.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 3.3;
Box and Muller, "A Note on the Generation of Random Normal Deviates" (1958).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlrm.device import Array, Device, HostDevice

ROUNDS = 10
MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85

LOG_2 = math.log(2.0)
SQRT_HALF = math.sqrt(0.5)
TWO_PI = 2.0 * math.pi
# Highest power first, for Horner's rule. Twice the area tangent in z = s^2, |s| <= 0.172; sine and cosine in
# x^2, |x| <= pi / 4: each series is cut where its next term is below half a unit in the last place.
LOG_SERIES = tuple(2.0 / (2 * k + 1) for k in range(11, -1, -1))
SIN_SERIES = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9, -1, -1))
COS_SERIES = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9, -1, -1))

_BLOCK_WORDS = 1 << 18
_HOST = HostDevice()


def tensor_id(name: str) -> int:
    """The 32-bit number of a tensor: CRC-32 of its name, such as ``bottom.0.weight``."""
    return zlib.crc32(name.encode())


def philox4x32(counter: tuple[Array, Array, Array, Array], seed: int) -> tuple[Array, Array, Array, Array]:
    """The block function: four words of each counter.

    Args:
        counter: four uint64 arrays that hold 32-bit words.
        seed: key, 64 bits (low word, high word).

    Returns:
        Four uint64 arrays that hold 32-bit words.
    """
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = counter
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(ROUNDS):
        product0 = c0 * np.uint64(MULTIPLIER_0)
        product1 = c2 * np.uint64(MULTIPLIER_1)
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(key0),
            product1 & low,
            (product0 >> shift) ^ c3 ^ np.uint64(key1),
            product0 & low,
        )
        key0 = (key0 + WEYL_0) & 0xFFFFFFFF
        key1 = (key1 + WEYL_1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform_rows(
    seed: int,
    name: str,
    rows: int,
    columns: int,
    dtype: Any,
    *,
    start: int = 0,
    step: int = 1,
    first_column: int = 0,
    scale: float = 1.0,
    out: Array | None = None,
    device: Device | None = None,
) -> Array:
    """Uniform values ``scale * ((u + 0.5) / 2^31 - 1)``, so in (-scale, scale).

    Args:
        seed: 0 <= seed < 2^64.
        name: the tensor's name, such as ``table.C1``.
        rows: R, how many rows.
        columns: C.
        dtype: of the result; computed in float64, then rounded.
        start: first row of the tensor.
        step: distance between the rows.
        first_column: first column of the tensor.
        scale: half width of the interval.
        out: [R, C] to write into.
        device: ``None``: the host with its compiled kernel.

    Returns:
        [R, C], ``out`` if given: columns ``first_column ..`` of rows ``start, start + step, ..`` of the tensor, the
        same values that the whole tensor has there.
    """
    device = device or _HOST
    if out is None:
        out = device.empty((rows, columns), dtype)
    kernel = device.kernel(__name__, "uniform_rows")
    if kernel is not None:
        place = (np.uint64(start), np.uint64(step), first_column)
        kernel(np.uint64(seed), np.uint64(tensor_id(name)), *place, float(scale), out)
        return out
    for begin, words in _word_blocks(seed, name, rows, columns, start, step, first_column):
        own = words[:, first_column % 4 : first_column % 4 + columns]
        out[begin : begin + len(words)] = ((own + 0.5) / 2.0**31 - 1.0) * scale
    return out


def normal_rows(
    seed: int,
    name: str,
    rows: int,
    columns: int,
    dtype: Any,
    *,
    start: int = 0,
    scale: float = 1.0,
    out: Array | None = None,
    device: Device | None = None,
) -> Array:
    """Normal values of mean 0 and standard deviation ``scale``, by Box and Muller's transform.

    Args:
        seed: 0 <= seed < 2^64.
        name: the tensor's name, such as ``bottom.0.weight``.
        rows: R, how many rows.
        columns: C.
        dtype: of the result; computed in float64, then rounded.
        start: first row of the tensor.
        scale: standard deviation.
        out: [R, C] to write into.
        device: ``None``: the host with its compiled kernel.

    Returns:
        [R, C], ``out`` if given: rows ``start .. start + R`` of the tensor.
    """
    device = device or _HOST
    if out is None:
        out = device.empty((rows, columns), dtype)
    kernel = device.kernel(__name__, "normal_rows")
    if kernel is not None:
        kernel(np.uint64(seed), np.uint64(tensor_id(name)), np.uint64(start), float(scale), out)
        return out
    for begin, words in _word_blocks(seed, name, rows, columns, start):
        radius = np.sqrt(-2.0 * _log((words[:, 0::2] + 0.5) / 2.0**32))
        cosine, sine = _cos_sin_turns((words[:, 1::2] + 0.5) / 2.0**32)
        values = np.empty(words.shape)
        values[:, 0::2] = radius * cosine * scale
        values[:, 1::2] = radius * sine * scale
        out[begin : begin + len(words)] = values[:, :columns]
    return out


def _word_blocks(
    seed: int, name: str, rows: int, columns: int, start: int, step: int = 1, first_column: int = 0
) -> Any:
    """Yield (first row, words [R', 4 U] uint64) in pieces that keep the temporaries small."""
    blocks = np.arange(first_column // 4, -(-(first_column + columns) // 4), dtype=np.uint64)[None, :]
    counters = blocks.size
    piece = max(1, _BLOCK_WORDS // max(1, 4 * counters))
    for begin in range(0, rows, piece):
        row = np.arange(begin, min(begin + piece, rows), dtype=np.uint64)[:, None] * np.uint64(step) + np.uint64(start)
        shape = (len(row), counters)
        words = philox4x32(
            (
                np.broadcast_to(blocks, shape),
                np.broadcast_to(row & np.uint64(0xFFFFFFFF), shape),
                np.broadcast_to(row >> np.uint64(32), shape),
                np.full(shape, tensor_id(name), np.uint64),
            ),
            seed,
        )
        yield begin, np.stack(words, axis=-1).reshape(len(row), 4 * counters)


def _horner(series: Sequence[float], x: Array) -> Array:
    total = np.full_like(x, series[0])
    for coefficient in series[1:]:
        total = total * x + coefficient
    return total


def _log(x: Array) -> Array:
    """Natural logarithm of x > 0: x = 2^e (1 + f), log(1 + f) = 2 artanh(f / (2 + f))."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < SQRT_HALF
    mantissa = np.where(small, mantissa * 2.0, mantissa)
    exponent = exponent.astype(np.float64) - small
    f = mantissa - 1.0
    s = f / (2.0 + f)
    return exponent * LOG_2 + s * _horner(LOG_SERIES, s * s)


def _cos_sin_turns(turns: Array) -> tuple[Array, Array]:
    """Cosine and sine of 2 pi t, 0 <= t < 1; the quarter turns are taken off before pi comes in, so exactly."""
    quarter = np.floor(4.0 * turns + 0.5)
    x = TWO_PI * (turns - 0.25 * quarter)
    square = x * x
    sine = x * _horner(SIN_SERIES, square)
    cosine = _horner(COS_SERIES, square)
    swap = quarter.astype(np.int64) % 2 == 1
    turn = quarter.astype(np.int64) % 4
    result_cosine = np.where(swap, sine, cosine)
    result_sine = np.where(swap, cosine, sine)
    return (
        np.where((turn == 1) | (turn == 2), -result_cosine, result_cosine),
        np.where(turn >= 2, -result_sine, result_sine),
    )
