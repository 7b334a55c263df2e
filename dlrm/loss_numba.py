"""Compiled loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange

_ROWS_PER_CHUNK = 512


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def bce_with_logits(logits: Any, labels: Any, global_rows: int, grad_out: Any) -> float:
    """The operation of the same name in ``loss.py``; chunks of fixed size are added in order."""
    rows = logits.shape[0]
    chunks = (rows + _ROWS_PER_CHUNK - 1) // _ROWS_PER_CHUNK
    sums = np.zeros(chunks)
    for chunk in prange(chunks):
        begin = chunk * _ROWS_PER_CHUNK
        total = 0.0
        for b in range(begin, min(begin + _ROWS_PER_CHUNK, rows)):
            x = np.float64(logits[b])
            y = np.float64(labels[b])
            decay = math.exp(-abs(x))
            total += max(x, 0.0) - x * y + math.log1p(decay)
            grad_out[b] = ((decay if x < 0.0 else 1.0) / (1.0 + decay) - y) / global_rows
        sums[chunk] = total
    loss = 0.0
    for chunk in range(chunks):
        loss += sums[chunk]
    return loss / global_rows
