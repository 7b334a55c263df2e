"""Compiled passes over activations; the functions of ``gemm.py``.

A chunk of rows belongs to one thread, and chunks are added in order, so that results do not depend on the
threads. Small arrays stay on the calling thread: waking the others costs more than the pass.
"""

from __future__ import annotations

from typing import Any

from numba import njit, prange

from dlrm.gemm import ROWS_PER_CHUNK

SERIAL_ELEMENTS = 32_768


@njit(nogil=True, cache=True)
def _bias_relu_rows(wide: Any, bias: Any, begin: int, end: int) -> None:
    zero = bias.dtype.type(0)
    for b in range(begin, end):
        row = wide[b, : bias.size]
        for o in range(bias.size):
            value = row[o] + bias[o]
            # Written so that a NaN stays NaN; max(zero, value) would drop it.
            row[o] = zero if value <= zero else value  # noqa: FURB136


@njit(parallel=True, nogil=True, cache=True)
def bias_relu(wide: Any, bias: Any) -> None:
    """``wide[:, :O] = max(wide[:, :O] + bias, 0)``; wide [B, >= O], bias [O]."""
    rows = wide.shape[0]
    chunks = (rows + ROWS_PER_CHUNK - 1) // ROWS_PER_CHUNK
    if rows * bias.size <= SERIAL_ELEMENTS:
        _bias_relu_rows(wide, bias, 0, rows)
    else:
        for chunk in prange(chunks):
            begin = chunk * ROWS_PER_CHUNK
            _bias_relu_rows(wide, bias, begin, min(begin + ROWS_PER_CHUNK, rows))


@njit(nogil=True, cache=True)
def _mask_and_sum_rows(grad: Any, activation: Any, sums: Any, begin: int, end: int) -> None:
    zero = sums.dtype.type(0)
    sums[:] = zero
    for b in range(begin, end):
        row = grad[b, : sums.size]
        active = activation[b, : sums.size]
        for o in range(sums.size):
            value = zero if active[o] <= zero else row[o]
            row[o] = value
            sums[o] += value


@njit(parallel=True, nogil=True, cache=True)
def mask_and_sum(grad: Any, activation: Any, grad_bias: Any, partials: Any) -> None:
    """``grad[activation <= 0] = 0`` in the first O columns, ``grad_bias = grad.sum(0)``."""
    rows = grad.shape[0]
    width = grad_bias.size
    chunks = (rows + ROWS_PER_CHUNK - 1) // ROWS_PER_CHUNK
    if rows * width <= SERIAL_ELEMENTS:
        for chunk in range(chunks):
            begin = chunk * ROWS_PER_CHUNK
            sums = partials[chunk * width : (chunk + 1) * width]
            _mask_and_sum_rows(grad, activation, sums, begin, min(begin + ROWS_PER_CHUNK, rows))
    else:
        for chunk in prange(chunks):
            begin = chunk * ROWS_PER_CHUNK
            sums = partials[chunk * width : (chunk + 1) * width]
            _mask_and_sum_rows(grad, activation, sums, begin, min(begin + ROWS_PER_CHUNK, rows))
    grad_bias[:] = 0
    for chunk in range(chunks):
        for o in range(width):
            grad_bias[o] += partials[chunk * width + o]
