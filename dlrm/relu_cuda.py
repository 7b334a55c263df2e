"""Launches of the kernels that clear and sum gradients at a ReLU; reference in ``relu.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.interaction_cuda import row_stride
from dlrm.nvrtc import c_type, load

SOURCE = Path(__file__).with_name("relu.cu")
THREADS = 256
"""Of a block; the source has the same."""
BLOCKS = 4
"""Blocks of a multiprocessor that share the rows."""
MIN_ROWS = 16
"""Of a block."""


def blocks_of(rows: int, multiprocessors: int) -> int:
    """Blocks that share so many rows."""
    return max(1, min(-(-rows // MIN_ROWS), multiprocessors * BLOCKS))


def relu_and_sum(
    grad: Any, activation: Any | None, bits: Any | None, sums: Any | None, partials: Any | None, columns: int
) -> None:
    """See ``relu.relu_and_sum``; ``grad`` and ``activation`` are float32, float16 or bfloat16."""
    rows, each = len(grad), 16 // grad.dtype.itemsize
    matrices = [grad] if activation is None else [grad, activation]
    fits = columns % each == 0 and all(row_stride(matrix) % each == 0 for matrix in matrices)
    mask = 1 if activation is not None else 2 if bits is not None else 0
    defines = (
        ("NUMBER", c_type(grad)), ("EACH", each if fits else 1), ("MASK", mask), ("SUMMED", int(sums is not None)),
    )  # fmt: skip
    kernel = load(SOURCE, "relu_and_sum", defines)
    blocks = blocks_of(rows, kernel.multiprocessors)
    other = grad if activation is None else activation
    flags, flag_stride = (grad, 0) if bits is None else (bits, row_stride(bits))
    target = grad if partials is None else partials
    kernel(
        blocks, THREADS, grad, np.int64(row_stride(grad)), other, np.int64(row_stride(other)), flags,
        np.int64(flag_stride), np.int64(rows), np.int32(columns), target,
    )  # fmt: skip
    if sums is not None:
        load(SOURCE, "add_partials", defines)(
            -(-columns // 32), THREADS, target, np.int32(blocks), np.int32(columns), sums
        )
