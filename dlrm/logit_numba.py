"""Compiled outer product of the layer with one output; the function of ``logit.py``."""

from __future__ import annotations

from typing import Any

from numba import njit, prange

from dlrm.gemm import ROWS_PER_CHUNK
from dlrm.gemm_numba import SERIAL_ELEMENTS


@njit(nogil=True, cache=True)
def _outer_rows(a: Any, b: Any, out: Any, begin: int, end: int) -> None:
    for i in range(begin, end):
        for j in range(b.size):
            out[i, j] = a[i] * b[j]


@njit(parallel=True, nogil=True, cache=True)
def outer(a: Any, b: Any, out: Any) -> None:
    """``out[i, j] = a[i] b[j]``; a [B], b [I], out [B, I]."""
    rows = a.size
    if out.size <= SERIAL_ELEMENTS:
        _outer_rows(a, b, out, 0, rows)
    else:
        for chunk in prange((rows + ROWS_PER_CHUNK - 1) // ROWS_PER_CHUNK):
            begin = chunk * ROWS_PER_CHUNK
            _outer_rows(a, b, out, begin, min(begin + ROWS_PER_CHUNK, rows))
