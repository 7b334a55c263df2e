"""Gradients at a ReLU: cleared where it was off, and summed over the rows, in one pass.

Shapes: B rows, O columns of a matrix that may be wider.
"""

from __future__ import annotations

import numpy as np

from dlrm.device import Array


def relu_and_sum(
    grad: Array, activation: Array | None, bits: Array | None, sums: Array | None, partials: Array | None, columns: int
) -> None:
    """``grad[:, :O] = 0`` where the ReLU was off, then ``sums = grad[:, :O].sum(0)``.

    Args:
        grad: [B, >= O], changed in place.
        activation: [B, >= O], the ReLU's output: off where it is not above 0, but not where it is NaN. ``None``: ask
            ``bits``, and without them leave ``grad`` as it is.
        bits: [B, >= O / 8] uint8: on where bit c % 8, the lowest first, of byte c // 8 is set.
        sums: [O] float32, written; ``None``: not wanted.
        partials: scratch of a device, float32: O numbers for every ``MIN_ROWS`` rows or part of them.
        columns: O.
    """
    del partials
    live = grad[:, :columns]
    if activation is not None:
        live[activation[:, :columns] <= 0] = 0
    elif bits is not None:
        column = np.arange(columns)
        live[(bits[:, column // 8] >> (column % 8).astype(np.uint8) & 1) == 0] = 0
    if sums is not None:
        sums[:columns] = live.sum(0, dtype=np.float64)
