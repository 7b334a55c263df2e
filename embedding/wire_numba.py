"""Compiled rounding to 16 bits and back, as integer arithmetic; references in ``wire.py``."""

from __future__ import annotations

import numba
import numpy as np

_SIGN = np.uint32(0x80000000)
_INFINITY = np.uint32(0x7F800000)
_HALF_END = np.uint32((127 + 16) << 23)
"""2^16: from here on there is no fp16."""
_HALF_NORMAL = np.uint32(113 << 23)
"""2^-14: from here on fp16 has all its digits."""
_REBIAS = np.uint32((127 - 15) << 23)
_HALF_INFINITY = np.uint32(0x7C00 << 13)
_LARGEST_HALF = np.uint32(0x7BFF)
_TO_HALF_STEPS = np.float32(2.0**24)
_FROM_HALF = np.float32(2.0**112)


@numba.njit(nogil=True, forceinline=True, cache=True)
def _half_bits(value):  # type: ignore[no-untyped-def]
    bits = np.float32(value).view(np.uint32)
    sign = bits & _SIGN
    bits ^= sign
    if bits >= _HALF_END:
        word = _LARGEST_HALF
        if bits >= _INFINITY:
            word = np.uint32(0x7C00) if bits == _INFINITY else np.uint32(0x7E00)
    elif bits >= _HALF_NORMAL:
        odd = (bits >> np.uint32(13)) & np.uint32(1)
        word = (bits - _REBIAS + np.uint32(0xFFF) + odd) >> np.uint32(13)
        word = min(np.uint32(word), _LARGEST_HALF)
    else:
        # fp16's smallest numbers are whole multiples of 2^-24.
        word = np.uint32(np.rint(np.float32(abs(value) * _TO_HALF_STEPS)))
    return np.uint16(word | (sign >> np.uint32(16)))


@numba.njit(nogil=True, forceinline=True, cache=True)
def _bfloat_bits(value):  # type: ignore[no-untyped-def]
    bits = np.float32(value).view(np.uint32)
    if bits & np.uint32(0x7FFFFFFF) > _INFINITY:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@numba.njit(parallel=True, nogil=True, cache=True)
def round_rows(values, scale, half, out):  # type: ignore[no-untyped-def]
    """See ``wire.round_rows``."""
    factor = values.dtype.type(scale)
    if half:
        for i in numba.prange(len(values)):
            out[i] = _half_bits(np.float32(values[i] * factor))
    else:
        for i in numba.prange(len(values)):
            out[i] = _bfloat_bits(np.float32(values[i] * factor))


@numba.njit(nogil=True, forceinline=True, cache=True)
def _half_value(word):  # type: ignore[no-untyped-def]
    # Arithmetic on 32-bit integers gives 64-bit ones, whose bits are no float32.
    magnitude = np.uint32((word & 0x7FFF) << 13)
    # The exponent is 112 too small; the product is exact, smallest numbers included.
    bits = np.float32(magnitude.view(np.float32) * _FROM_HALF).view(np.uint32)
    if magnitude >= _HALF_INFINITY:
        bits = np.uint32(magnitude | _INFINITY)
    return np.uint32(bits | ((word & 0x8000) << 16)).view(np.float32)


@numba.njit(parallel=True, nogil=True, cache=True)
def widen_rows(words, factor, half, out):  # type: ignore[no-untyped-def]
    """See ``wire.widen_rows``."""
    number = out.dtype.type(factor)
    if half:
        for i in numba.prange(len(words)):
            out[i] = out.dtype.type(_half_value(words[i])) * number
    else:
        for i in numba.prange(len(words)):
            out[i] = out.dtype.type(np.uint32(words[i] << 16).view(np.float32)) * number
