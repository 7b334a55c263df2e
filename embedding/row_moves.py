"""Copy rows from listed places to listed places: pack what is sent, and put where it belongs what has come.

Shapes: N rows of the source, M of the target, n moved, D columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dlrm.device import Array
from embedding.sparse_optim import widened
from embedding.wire import round_rows_reference


def move_rows(
    source: Array, source_rows: Array | None, target: Array, target_rows: Array | None, scale: float = 1.0
) -> None:
    """``target[target_rows[i]] = scale * source[source_rows[i]]`` for every i; a negative number: not this one.

    ``None`` stands for 0, 1, 2, ... Numbers are rounded to the nearest; those that are finite but
    beyond float16 become its largest.

    Args:
        source: [N, D] C-contiguous float32, float16, or bfloat16 as uint16.
        source_rows: [n] int32, or ``None``.
        target: [M, D] C-contiguous, of these types, too; other rows are left alone.
        target_rows: [n] int32 without repetition, or ``None``.
        scale: a power of two.
    """
    every = np.arange(listed_rows(source, source_rows, target, target_rows))
    begin, end = (every if rows is None else rows for rows in (source_rows, target_rows))
    kept = (begin >= 0) & (end >= 0)
    values = source[begin[kept]]
    if source.dtype != target.dtype or scale != 1.0:
        values = _rounded(widened(values) * np.float32(scale), target.dtype)
    target[end[kept]] = values


def listed_rows(source: Array, source_rows: Array | None, target: Array, target_rows: Array | None) -> int:
    """How many rows are moved: as many as are listed, or as there are."""
    if source_rows is not None:
        return len(source_rows)
    return min(len(source), len(target)) if target_rows is None else len(target_rows)


def _rounded(values: Array, dtype: Any) -> Array:
    if dtype == np.float32:
        return values
    words = np.empty(values.size, np.uint16)
    round_rows_reference(values.reshape(-1), 1.0, dtype == np.float16, words)
    return words.reshape(values.shape).view(dtype)
