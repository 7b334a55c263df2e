"""Launches of the dense optimisers' CUDA kernels, formulas and references in ``optim.py``.

All take flat arrays that start at 16 bytes: ``parameters`` [N] float32, changed; ``gradients`` [N] float32, float16 or
bfloat16, times the loss scale; the state [N] float32, changed; ``weights`` [N] float16 or bfloat16, written, the
copy of the parameters that the products read, or ``None``; ``scalars`` and ``guard``: see ``dlrm.scalars``. The
learning rate is ``scalars[LR]``, the other constants begin at ``scalars[DENSE]`` (``optim.constants``). Nothing is
written when ``guard`` says that a gradient is not finite or an exchange ran over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import Defines, c_type, load
from dlrm.optim import LOSS_SCALE_LIMITS, STATE_NAMES

SOURCE = Path(__file__).with_name("optim.cu")
THREADS = 256
KINDS = tuple(STATE_NAMES)
"""The source knows a kind by its number here."""
CHECK_BLOCKS = 2
"""Blocks of a multiprocessor that look for numbers that are not finite."""
NOTHING: Defines = (("KIND", 0), ("GRAD", "float"), ("COPY", "half_t"), ("WITH_COPY", 0))


def sgd(parameters: Any, gradients: Any, weights: Any | None, scalars: Any, guard: Any) -> None:
    """See ``optim.sgd``."""
    _step("sgd", parameters, gradients, (), weights, scalars, guard)


def momentum(parameters: Any, gradients: Any, velocity: Any, weights: Any | None, scalars: Any, guard: Any) -> None:
    """See ``optim.momentum``."""
    _step("momentum", parameters, gradients, (velocity,), weights, scalars, guard)


def adagrad(parameters: Any, gradients: Any, accumulator: Any, weights: Any | None, scalars: Any, guard: Any) -> None:
    """See ``optim.adagrad``."""
    _step("adagrad", parameters, gradients, (accumulator,), weights, scalars, guard)


def adam(parameters: Any, gradients: Any, m: Any, v: Any, weights: Any | None, scalars: Any, guard: Any) -> None:
    """See ``optim.adam``."""
    _step("adam", parameters, gradients, (m, v), weights, scalars, guard)


def ftrl(parameters: Any, gradients: Any, n: Any, z: Any, weights: Any | None, scalars: Any, guard: Any) -> None:
    """See ``optim.ftrl``; at rate 0 nothing moves."""
    _step("ftrl", parameters, gradients, (n, z), weights, scalars, guard)


def _step(
    kind: str, parameters: Any, gradients: Any, state: tuple[Any, ...], weights: Any | None, scalars: Any, guard: Any
) -> None:
    copy = ("half_t", 0) if weights is None else (c_type(weights), 1)
    types = (("GRAD", c_type(gradients)), ("COPY", copy[0]), ("WITH_COPY", copy[1]))
    defines = (("KIND", KINDS.index(kind)), *types)
    kernel = load(SOURCE, "dense_step", defines)
    first, second, *_ = (*state, parameters, parameters)  # what a kind does not have, it does not touch
    target = parameters if weights is None else weights
    blocks = -(-parameters.size // (4 * THREADS))
    count = np.int64(parameters.size)
    kernel(blocks, THREADS, parameters, gradients, first, second, target, count, scalars, guard)


def check_finite(gradients: Any, guard: Any) -> None:
    """See ``optim.check_finite``; ``gradients`` [N] float32, float16 or bfloat16 start at 16 bytes."""
    kernel = load(SOURCE, "check_finite", (("KIND", 0), ("GRAD", c_type(gradients)), *NOTHING[2:]))
    blocks = min(-(-gradients.size // (4 * THREADS)), kernel.multiprocessors * CHECK_BLOCKS)
    kernel(blocks, THREADS, gradients, np.int64(gradients.size), guard)


def begin_step(guard: Any) -> None:
    """See ``optim.begin_step``."""
    load(SOURCE, "begin_step", NOTHING)(1, 1, guard)


def end_step(guard: Any, growth_interval: int, dynamic: bool) -> None:
    """See ``optim.end_step``."""
    smallest, largest = (np.float32(limit) for limit in LOSS_SCALE_LIMITS)
    kernel = load(SOURCE, "end_step", NOTHING)
    kernel(1, 1, guard, np.int32(growth_interval), np.int32(dynamic), smallest, largest)
