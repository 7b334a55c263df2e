"""Launches of the loss's CUDA kernels; reference in ``loss.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import c_type, load

SOURCE = Path(__file__).with_name("loss.cu")
THREADS = 256
"""Of a block, a row each; the source has the same."""


def partials_of(capacity: int) -> int:
    """How many float64 numbers ``loss_and_gradient`` needs as ``partials`` for up to ``capacity`` rows."""
    return max(1, -(-capacity // THREADS))


def loss_and_gradient(
    logits: Any, labels: Any, grad_out: Any, loss: Any, scalars: Any, guard: Any, partials: Any
) -> None:
    """See ``loss.loss_and_gradient``; ``partials`` [``partials_of(B)`` or more] float64 is room to work in."""
    num_rows = logits.size
    blocks = -(-num_rows // THREADS)
    defines = (("LABEL", c_type(labels)), ("GRAD", c_type(grad_out)))
    rows = load(SOURCE, "loss_rows", defines)
    rows(blocks, THREADS, logits, labels, grad_out, np.int64(num_rows), scalars, guard, partials)
    load(SOURCE, "sum_losses", defines)(1, THREADS, partials, np.int32(blocks), scalars, loss)
