"""Whatever changes from step to step, as the kernels read it: two small blocks in device memory.

A captured graph replays its launches with the arguments that it was captured with, so that nothing which changes may be
an argument. ``scalars`` is what the host sends before every step; ``guard`` lives on the device, where one step hands
it to the next. Both are float32; some places hold integers, which ``view(np.int32)`` reaches. ``kernels.cuh`` has the
same places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlrm.device import Array

SIZE = 32
"""Places of either block."""

LR, INVERSE_ROWS = 0, 1
"""Learning rate; 1 / G, real rows of the global batch."""
VALID_ROWS = 2
"""Integer: rows of this rank's batch that count; those behind them get no gradient."""
STEP_LOW, STEP_HIGH, SEED_LOW, SEED_HIGH = 4, 5, 6, 7
"""Integers: step of the run and seed, as low and high words."""
SPARSE, DENSE = 8, 16
"""First of eight constants of the tables' optimiser and of the dense one."""

LOSS_SCALE, UNSCALE = 0, 1
"""Factor of all gradients, and its inverse."""
NOT_FINITE, OVERFLOW = 2, 3
"""Integers: not 0 when this step's gradients are not finite, and when an exchange ran over; writes then stay out."""
GOOD_STEPS, SKIPPED_STEPS = 4, 5
"""Integers: steps since the loss scale changed, and steps that were skipped."""


def write_scalars(
    block: Array,
    *,
    lr: float,
    global_rows: int,
    valid_rows: int,
    step: int,
    seed: int,
    sparse: Sequence[float] = (),
    dense: Sequence[float] = (),
) -> Array:
    """Fill the host's copy of ``scalars``.

    Args:
        block: [SIZE] float32 of the host, written.
        lr: learning rate.
        global_rows: G.
        valid_rows: rows of this rank that count.
        step: t, from 1.
        seed: of the run, below 2^64.
        sparse: up to eight constants of the tables' optimiser (``embedding.sparse_optim.constants``).
        dense: up to eight constants of the dense optimiser (``dlrm.optim.constants``).

    Returns:
        ``block``.
    """
    integers = block.view(np.uint32)
    block[...] = 0
    block[LR], block[INVERSE_ROWS] = lr, 1.0 / max(1, global_rows)
    integers[VALID_ROWS] = valid_rows
    integers[STEP_LOW], integers[STEP_HIGH] = step & 0xFFFFFFFF, step >> 32
    integers[SEED_LOW], integers[SEED_HIGH] = seed & 0xFFFFFFFF, seed >> 32
    block[SPARSE : SPARSE + len(sparse)] = sparse
    block[DENSE : DENSE + len(dense)] = dense
    return block


def write_guard(block: Array, loss_scale: float) -> Array:
    """Fill the host's copy of ``guard`` for a run's first step; returns ``block``."""
    block[...] = 0
    block[LOSS_SCALE], block[UNSCALE] = loss_scale, 1.0 / loss_scale
    return block


def is_blocked(guard: Array) -> bool:
    """Whether weights and state have to stay as they are."""
    return bool((guard.view(np.int32)[[NOT_FINITE, OVERFLOW]] != 0).any())
