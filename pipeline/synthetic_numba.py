"""Compiled generator of synthetic rows; every row depends on (seed, row number) alone, never on threads.

Shapes: B rows of a chunk, V 32-bit words of a Raw row, N dense columns, T tables, H key columns of all tables,
E latent dimensions, R rows of all tables together.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange

from pipeline.elementary_numba import exp2, log2, sin_cos

_BLOCK = 64  # rows that share a thread's scratch arrays, which stay in its cache
_MEAN_ABS_NORMAL = math.sqrt(2.0 / math.pi)
_MINUS_2_LN2 = -2.0 * math.log(2.0)
_LOG2_E = 1.0 / math.log(2.0)


@njit(nogil=True, inline="always")
def _mix(state: Any) -> Any:
    """SplitMix64's output function. Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@njit(nogil=True, inline="always")
def _uniform(start: Any, draw: int) -> float:
    """Draw number ``draw`` of the row whose stream starts at ``start``: uniform in [0, 1), 53 bits."""
    state = _mix(start + np.uint64(draw + 1) * np.uint64(0x9E3779B97F4A7C15))
    return np.float64(np.int64(state >> np.uint64(11))) * 2.0**-53


@njit(nogil=True, inline="always")
def _stream(seed: Any, row: int) -> Any:
    """Start of a row's stream of draws."""
    return _mix(seed ^ _mix(np.uint64(row) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)))


@njit(nogil=True, cache=True, error_model="numpy")
def _start_rows(seed: Any, first_row: int, num_rows: int, starts: Any) -> None:
    """Starts [block] of the streams of rows ``first_row ..``; behind row ``num_rows - 1`` comes row 0."""
    for b in range(starts.size):
        starts[b] = _stream(seed, (first_row + b) % num_rows)


@njit(nogil=True, cache=True, error_model="numpy")
def _draw_dense(starts: Any, linear: Any, curved: Any, values: Any, totals: Any) -> None:
    """Write N normal values of each row (draws 1 .. N, rounded up to pairs), and the teacher's dense part.

    Args:
        starts: [block] uint64.
        linear: [N] float64.
        curved: [N] float64.
        values: [N, block] float32, written.
        totals: [block] float64, written.
    """
    totals[:] = 0.0
    other = np.empty(starts.size)
    for n in range(0, linear.size, 2):  # Box-Muller gives two normals at once
        for b in range(starts.size):
            radius = math.sqrt(_MINUS_2_LN2 * log2(1.0 - _uniform(starts[b], n + 1)))
            sine, cosine = sin_cos(_uniform(starts[b], n + 2))
            values[n, b] = radius * cosine
            other[b] = radius * sine
        if n + 1 < linear.size:
            values[n + 1] = other
    for n in range(linear.size):
        for b in range(starts.size):
            x = np.float64(values[n, b])
            totals[b] += linear[n] * x + curved[n] * (abs(x) - _MEAN_ABS_NORMAL)


@njit(nogil=True, cache=True, error_model="numpy")
def _draw_keys(starts: Any, draw: int, hotness: Any, table_rows: Any, spans: Any, inverses: Any, keys: Any) -> None:
    """Write the keys [H, block] of rows: each the one whose interval holds its draw (``key_probabilities``)."""
    column = 0
    for t in range(hotness.size):
        span, inverse, last = spans[t], inverses[t], np.float64(table_rows[t])
        for _ in range(hotness[t]):
            for b in range(starts.size):
                u = _uniform(starts[b], draw + column)
                # F's inverse, exp(u ln(rows + 1)) for exponent 1.
                power = u * span * _LOG2_E if inverse == 0.0 else inverse * log2(1.0 + u * span)
                keys[column, b] = np.int32(min(max(exp2(power), 1.0), last)) - 1
            column += 1


@njit(nogil=True, cache=True)
def _sum_effects(keys: Any, hotness: Any, starts: Any, parameters: Any, vectors: Any) -> Any:
    """Write each table's latent vector [E, T] of a row with keys [H]; returns the sum of the tables' effects."""
    total = 0.0
    column = 0
    for t in range(hotness.size):
        vectors[:, t] = 0.0
        shrink = 1.0 / math.sqrt(float(hotness[t]))
        for _ in range(hotness[t]):
            row = starts[t] + keys[column]
            total += parameters[row, 0] * shrink
            for e in range(vectors.shape[0]):
                vectors[e, t] += parameters[row, 1 + e] * shrink
            column += 1
    return total


@njit(nogil=True, cache=True)
def _interact(vectors: Any, scales: Any, partners: Any, totals: Any) -> None:
    """Write sum over pairs i < j of scales[i, j] <u_i, u_j> for the rows of a block.

    The innermost loops run over rows, so that they become vector instructions without reordering any row's sum.

    Args:
        vectors: [E, T, block] float64.
        scales: [T, T] float64.
        partners: [block] float64, scratch: sum over i < j of scales[i, j] u_i.
        totals: [block] float64, written.
    """
    totals[:] = 0.0
    for e in range(vectors.shape[0]):
        for j in range(1, vectors.shape[1]):
            partners[:] = 0.0
            for i in range(j):
                scale = scales[i, j]
                for b in range(partners.size):
                    partners[b] += scale * vectors[e, i, b]
            for b in range(partners.size):
                totals[b] += partners[b] * vectors[e, j, b]


@njit(nogil=True, cache=True, parallel=True)
def generate_rows(
    seed: Any,
    first_row: int,
    key_shift: int,
    num_rows: int,
    hotness: Any,
    table_rows: Any,
    spans: Any,
    inverses: Any,
    starts: Any,
    parameters: Any,
    scales: Any,
    linear: Any,
    curved: Any,
    bias: float,
    words: Any,
    floats: Any,
    parts: Any,
) -> None:
    """Write Raw rows (int32 label, float32 dense, int32 keys) and what the teacher says about them.

    Args:
        seed: uint64.
        first_row: number of the first row.
        key_shift: 0, or what the control adds to a row's number (modulo ``num_rows``) before it draws the keys
            that it writes, while the label keeps its own.
        num_rows: rows of the whole set.
        hotness: [T] int64.
        table_rows: [T] int64.
        spans: [T] float64, width of the power law's range.
        inverses: [T] float64, 1 / (1 - exponent); 0: exponent 1.
        starts: [T] int64, first row of each table in ``parameters``.
        parameters: [R, 1 + E] float32, effect and latent vector of each table row side by side.
        scales: [T, T] float64, weight of each pair of tables, above the diagonal.
        linear: [N] float64, weights of x.
        curved: [N] float64, weights of abs(x) - E abs(x).
        bias: logit's constant.
        words: [B, V] int32, written.
        floats: [B, V] float32, the same bytes.
        parts: [B, 3] float64, written: the logit, its additive part, its dense part.
    """
    num_dense = linear.size
    first_key = 1 + num_dense
    key_draw = 2 + num_dense  # behind the label's draw (0) and the dense columns' pairs
    endless = 2**63 - 1
    for block in prange((words.shape[0] + _BLOCK - 1) // _BLOCK):
        # A last block is drawn whole; the rows past the end are not kept.
        vectors = np.empty((parameters.shape[1] - 1, hotness.size, _BLOCK))
        partners, dense_parts, interactions = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
        row_starts = np.empty(_BLOCK, np.uint64)
        dense = np.empty((num_dense, _BLOCK), np.float32)
        keys = np.empty((words.shape[1] - first_key, _BLOCK), np.int32)
        first, stop = block * _BLOCK, min((block + 1) * _BLOCK, words.shape[0])
        _start_rows(seed, first_row + first, endless, row_starts)
        _draw_dense(row_starts, linear, curved, dense, dense_parts)
        _draw_keys(row_starts, key_draw, hotness, table_rows, spans, inverses, keys)
        for b in range(_BLOCK):
            effects = _sum_effects(keys[:, b], hotness, starts, parameters, vectors[:, :, b])
            if first + b < stop:
                parts[first + b, 2] = dense_parts[b]
                parts[first + b, 1] = dense_parts[b] + effects
        _interact(vectors, scales, partners, interactions)
        for b in range(first, stop):
            parts[b, 0] = bias + parts[b, 1] + interactions[b - first]
            words[b, 0] = _uniform(row_starts[b - first], 0) < 1.0 / (1.0 + math.exp(-parts[b, 0]))
            floats[b, 1:first_key] = dense[:, b - first]
        if key_shift:
            _start_rows(seed, first_row + first + key_shift, num_rows, row_starts)
            _draw_keys(row_starts, key_draw, hotness, table_rows, spans, inverses, keys)
        for b in range(first, stop):
            words[b, first_key:] = keys[:, b - first]
