"""Elementary functions in float64 without a call or a branch: loops around them become vector instructions.

Each is right to a few units in the last place (tests/pipeline/test_elementary.py compares with NumPy). The caller needs
``error_model="numpy"``, so that a division asks for no branch.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_SQRT_HALF_BITS = np.int64(np.float64(math.sqrt(0.5)).view(np.int64))
_TWO_OVER_LN2 = 2.0 / math.log(2.0)
_LN2 = math.log(2.0)
_TURN = 2.0 * math.pi
# Inverse odd numbers and inverse factorials: multiplying is faster than dividing.
_L3, _L5, _L7, _L9, _L11, _L13, _L15, _L17, _L19 = (1.0 / n for n in range(3, 20, 2))
_F2, _F3, _F4, _F5, _F6, _F7, _F8, _F9, _F10, _F11, _F12, _F13, _F14, _F15, _F16 = (
    1.0 / math.factorial(n) for n in range(2, 17)
)


@njit(nogil=True, inline="always")
def log2(x: float) -> float:
    """log2 of a normal number above 0.

    x = 2^e m with m in sqrt(1/2) .. sqrt(2), and ln m = 2 artanh s, s = (m - 1) / (m + 1), to s^19.
    """
    bits = np.float64(x).view(np.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> np.int64(52)
    m = np.int64(bits - (exponent << np.int64(52))).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    series = (((_L19 * q + _L17) * q + _L15) * q + _L13) * q + _L11
    series = ((((series * q + _L9) * q + _L7) * q + _L5) * q + _L3) * q + 1.0
    return exponent + series * s * _TWO_OVER_LN2


@njit(nogil=True, inline="always")
def exp2(y: float) -> float:
    """2^y for abs(y) below 1000: 2^round(y) times the Taylor series of the rest, to its 12th power."""
    whole = np.int64(math.floor(y + 0.5))
    f = (y - whole) * _LN2
    series = ((((_F12 * f + _F11) * f + _F10) * f + _F9) * f + _F8) * f + _F7
    series = ((((series * f + _F6) * f + _F5) * f + _F4) * f + _F3) * f + _F2
    series = (series * f + 1.0) * f + 1.0
    return series * np.int64((whole + np.int64(1023)) << np.int64(52)).view(np.float64)


@njit(nogil=True, inline="always")
def sin_cos(turns: float) -> tuple[float, float]:
    """Sine and cosine of 2 pi turns, for turns in 0 .. 1: Taylor series within an eighth of a turn of an axis."""
    quarter = np.int64(math.floor(turns * 4.0 + 0.5))
    f = (turns - quarter * 0.25) * _TURN
    q = f * f
    sine = ((-_F15 * q + _F13) * q - _F11) * q + _F9
    sine = (((sine * q - _F7) * q + _F5) * q - _F3) * q * f + f
    cosine = (((_F16 * q - _F14) * q + _F12) * q - _F10) * q + _F8
    cosine = (((cosine * q - _F6) * q + _F4) * q - _F2) * q + 1.0
    swapped = quarter & np.int64(1) == 1
    along, across = (cosine, sine) if swapped else (sine, cosine)
    sine_sign = -1.0 if quarter & np.int64(2) else 1.0
    cosine_sign = -1.0 if (quarter + np.int64(1)) & np.int64(2) else 1.0
    return along * sine_sign, across * cosine_sign
