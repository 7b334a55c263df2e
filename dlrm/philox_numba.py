"""Compiled Philox4x32-10: the functions of ``philox.py``, bit for bit (no contraction, no reassociation)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange

from dlrm.philox import (
    COS_SERIES,
    LOG_2,
    LOG_SERIES,
    MULTIPLIER_0,
    MULTIPLIER_1,
    ROUNDS,
    SIN_SERIES,
    SQRT_HALF,
    TWO_PI,
    WEYL_0,
    WEYL_1,
)

_M0 = np.uint64(MULTIPLIER_0)
_M1 = np.uint64(MULTIPLIER_1)
_W0 = np.uint64(WEYL_0)
_W1 = np.uint64(WEYL_1)
_SHIFT = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


@njit(nogil=True, cache=True)
def _words(block: Any, row: Any, tensor: Any, seed: Any) -> Any:
    # All words stay in 64-bit registers: one type for numba, one widening multiplication a round and half.
    c0, c1, c2, c3 = block, row & _LOW, row >> _SHIFT, tensor
    key0, key1 = seed & _LOW, seed >> _SHIFT
    for _ in range(ROUNDS):
        product0 = c0 * _M0
        product1 = c2 * _M1
        c0 = (product1 >> _SHIFT) ^ c1 ^ key0
        c1 = product1 & _LOW
        c2 = (product0 >> _SHIFT) ^ c3 ^ key1
        c3 = product0 & _LOW
        key0 = (key0 + _W0) & _LOW
        key1 = (key1 + _W1) & _LOW
    return c0, c1, c2, c3


@njit(nogil=True, cache=True, error_model="numpy")
def _unit(word: Any, half_range: float) -> float:
    return (np.float64(word) + 0.5) / half_range


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def uniform_rows(seed: Any, tensor: Any, start: Any, step: Any, first_column: int, scale: float, out: Any) -> None:
    """Fill out[R, C] with uniform values in (-scale, scale)."""
    rows, columns = out.shape
    for r in prange(rows):
        row = start + np.uint64(r) * step
        for block in range(first_column // 4, (first_column + columns + 3) // 4):
            u0, u1, u2, u3 = _words(np.uint64(block), row, tensor, seed)
            column = 4 * block - first_column
            if column >= 0:
                out[r, column] = (_unit(u0, 2147483648.0) - 1.0) * scale
            if 0 <= column + 1 < columns:
                out[r, column + 1] = (_unit(u1, 2147483648.0) - 1.0) * scale
            if 0 <= column + 2 < columns:
                out[r, column + 2] = (_unit(u2, 2147483648.0) - 1.0) * scale
            if column + 3 < columns:
                out[r, column + 3] = (_unit(u3, 2147483648.0) - 1.0) * scale


@njit(nogil=True, cache=True, error_model="numpy")
def _log(x: float) -> float:
    mantissa, exponent = math.frexp(x)
    if mantissa < SQRT_HALF:
        mantissa *= 2.0
        exponent -= 1
    f = mantissa - 1.0
    s = f / (2.0 + f)
    square = s * s
    total = LOG_SERIES[0]
    for k in range(1, len(LOG_SERIES)):
        total = total * square + LOG_SERIES[k]
    return exponent * LOG_2 + s * total


@njit(nogil=True, cache=True)
def _cos_sin_turns(turns: float) -> Any:
    quarter = math.floor(4.0 * turns + 0.5)
    x = TWO_PI * (turns - 0.25 * quarter)
    square = x * x
    sine = SIN_SERIES[0]
    for k in range(1, len(SIN_SERIES)):
        sine = sine * square + SIN_SERIES[k]
    sine *= x
    cosine = COS_SERIES[0]
    for k in range(1, len(COS_SERIES)):
        cosine = cosine * square + COS_SERIES[k]
    turn = int(quarter) % 4
    if turn == 0:
        return cosine, sine
    if turn == 1:
        return -sine, cosine
    if turn == 2:
        return -cosine, -sine
    return sine, -cosine


@njit(nogil=True, cache=True)
def _normal_pair(word0: Any, word1: Any, scale: float) -> Any:
    radius = math.sqrt(-2.0 * _log(_unit(word0, 4294967296.0)))
    cosine, sine = _cos_sin_turns(_unit(word1, 4294967296.0))
    return radius * cosine * scale, radius * sine * scale


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def normal_rows(seed: Any, tensor: Any, start: Any, scale: float, out: Any) -> None:
    """Fill out[R, C] with normal values of standard deviation ``scale``."""
    rows, columns = out.shape
    for r in prange(rows):
        row = start + np.uint64(r)
        for block in range((columns + 3) // 4):
            u0, u1, u2, u3 = _words(np.uint64(block), row, tensor, seed)
            n0, n1 = _normal_pair(u0, u1, scale)
            n2, n3 = _normal_pair(u2, u3, scale)
            column = 4 * block
            out[r, column] = n0
            if column + 1 < columns:
                out[r, column + 1] = n1
            if column + 2 < columns:
                out[r, column + 2] = n2
            if column + 3 < columns:
                out[r, column + 3] = n3
