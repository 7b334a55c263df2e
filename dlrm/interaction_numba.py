"""Compiled dot interaction: a small product a sample, from the first-level cache, in blocks that stay in registers.

Shapes: B rows, F vectors a row, D embedding dim, P pairs. Only the lower triangle is computed. A sample belongs to
one thread and its sums have a fixed order, so that results do not depend on the threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from dlrm.blocks_numba import LANES_32, combine_4x1, combine_4x2, dots_4x4

_ROWS_PER_CHUNK = 16


@njit(nogil=True, cache=True)
def _add_tail(v: Any, begin: int, rows: Any, columns: Any, block: Any) -> None:
    """Add the dots of the columns that fill no vector register."""
    for a in range(4):
        for b in range(4):
            for d in range(begin, v.shape[1]):
                block[a, b] += v[rows[a], d] * v[columns[b], d]


@njit(nogil=True, cache=True)
def _forward_sample(v: Any, out: Any, first: int, block: Any, lanes: int) -> None:
    num_vectors, dim = v.shape
    last = num_vectors - 1
    whole = dim - dim % lanes
    base = 0
    if first:
        base = dim
        for d in range(dim):
            out[d] = v[0, d]
    for i in range(0, num_vectors, 4):
        # Places beyond the last are computed as the last, and not written.
        rows = (i, min(i + 1, last), min(i + 2, last), min(i + 3, last))
        for j in range(0, i + 1, 4):
            columns = (j, min(j + 1, last), min(j + 2, last), min(j + 3, last))
            dots_4x4(v, whole, rows, columns, block)
            if whole < dim:
                _add_tail(v, whole, rows, columns, block)
            for row in range(max(i, 1), min(i + 4, num_vectors)):
                begin = base + row * (row - 1) // 2 + j
                a = row - i
                if j < i:  # off the diagonal, as most blocks are: whole rows of four
                    dot0, dot1, dot2, dot3 = block[a, 0], block[a, 1], block[a, 2], block[a, 3]
                    out[begin], out[begin + 1], out[begin + 2], out[begin + 3] = dot0, dot1, dot2, dot3
                else:
                    for b in range(a):
                        out[begin + b] = block[a, b]


@njit(parallel=True, nogil=True, cache=True)
def interaction_forward(vectors: Any, out: Any, first: int) -> None:
    """The operation of the same name in ``interaction.py``."""
    rows = vectors.shape[0]
    lanes = LANES_32 * 4 // vectors.itemsize
    for chunk in prange((rows + _ROWS_PER_CHUNK - 1) // _ROWS_PER_CHUNK):
        block = np.empty((4, 4), vectors.dtype)
        begin = chunk * _ROWS_PER_CHUNK
        for b in range(begin, min(begin + _ROWS_PER_CHUNK, rows)):
            _forward_sample(vectors[b], out[b], first, block, lanes)


@njit(nogil=True, cache=True)
def _spread_pairs(pairs: Any, g: Any, num_vectors: int) -> None:
    """Write the pairs' gradients into both triangles of g; its diagonal stays zero."""
    begin = 0
    for i in range(num_vectors):
        for j in range(i):
            value = pairs[begin + j]
            g[i, j] = value
            g[j, i] = value
        begin += i


@njit(nogil=True, cache=True)
def _combine_tail(g: Any, v: Any, begin: int, grad: Any) -> None:
    """``grad = g v`` in the columns that fill no vector register."""
    num_vectors, dim = v.shape
    for i in range(num_vectors):
        for d in range(begin, dim):
            total = v.dtype.type(0)
            for j in range(num_vectors):
                total += g[i, j] * v[j, d]
            grad[i, d] = total


@njit(nogil=True, cache=True)
def _backward_sample(v: Any, grad_out: Any, grad: Any, first: int, g: Any, spare: Any, lanes: int) -> None:
    num_vectors, dim = v.shape
    whole = dim - dim % lanes
    _spread_pairs(grad_out[first * dim :], g, num_vectors)
    for i in range(0, num_vectors, 4):
        d = 0
        while d + 2 * lanes <= whole:
            combine_4x2(g, v, i, d, grad, spare)
            d += 2 * lanes
        if d < whole:
            combine_4x1(g, v, i, d, grad, spare)
    if whole < dim:
        _combine_tail(g, v, whole, grad)
    if first:
        for d in range(dim):
            grad[0, d] += grad_out[d]


@njit(parallel=True, nogil=True, cache=True)
def interaction_backward(vectors: Any, grad_out: Any, grad_vectors: Any, first: int) -> None:
    """The operation of the same name in ``interaction.py``."""
    rows, num_vectors, dim = vectors.shape
    lanes = LANES_32 * 4 // vectors.itemsize
    for chunk in prange((rows + _ROWS_PER_CHUNK - 1) // _ROWS_PER_CHUNK):
        # Three more rows, zero, so that blocks of four need no tail.
        g = np.zeros((num_vectors + 3, num_vectors), vectors.dtype)
        spare = np.empty((1, dim), vectors.dtype)
        begin = chunk * _ROWS_PER_CHUNK
        for b in range(begin, min(begin + _ROWS_PER_CHUNK, rows)):
            _backward_sample(vectors[b], grad_out[b], grad_vectors[b], first, g, spare, lanes)
