"""Launches of the random initial values' CUDA kernels: the values of ``philox.py``, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import Defines, c_type, load
from dlrm.philox import COS_SERIES, LOG_2, LOG_SERIES, SIN_SERIES, SQRT_HALF, TWO_PI

SOURCE = Path(__file__).with_name("philox.cu")
THREADS = 256
BLOCKS = 16
"""Blocks of a multiprocessor that walk the rows."""


def constants() -> Defines:
    """The macros of the source: float64 numbers exactly, in hexadecimal."""
    series = {"LOG_SERIES": LOG_SERIES, "SIN_SERIES": SIN_SERIES, "COS_SERIES": COS_SERIES}
    numbers = {"LOG_2": (LOG_2,), "SQRT_HALF": (SQRT_HALF,), "TWO_PI": (TWO_PI,)}
    return tuple((name, ",".join(value.hex() for value in values)) for name, values in (series | numbers).items())


def uniform_rows(seed: Any, tensor: Any, start: Any, step: Any, first_column: int, scale: float, out: Any) -> None:
    """Fill out[R, C] with uniform values in (-scale, scale).

    Args:
        seed: of the run, uint64.
        tensor: ``philox.tensor_id`` of the tensor, uint64.
        start: first row of the tensor, uint64.
        step: distance between the rows, uint64.
        first_column: first column of the tensor.
        scale: half width of the interval.
        out: [R, C] float32, float16 or bfloat16, written; columns lie side by side.
    """
    _fill("uniform_rows", out, seed, tensor, start, step, np.int64(first_column), np.float64(scale))


def normal_rows(seed: Any, tensor: Any, start: Any, scale: float, out: Any) -> None:
    """Fill out[R, C] with normal values of standard deviation ``scale``; arguments as of ``uniform_rows``."""
    _fill("normal_rows", out, seed, tensor, start, np.float64(scale))


def _fill(name: str, out: Any, *numbers: Any) -> None:
    rows, columns = out.shape
    if rows == 0 or columns == 0:
        return
    kernel = load(SOURCE, name, (*constants(), ("OUT", c_type(out))))
    items = rows * (-(-columns // 4) + 1)
    blocks = min(-(-items // THREADS), kernel.multiprocessors * BLOCKS)
    stride = out.strides[0] // out.dtype.itemsize if rows > 1 else columns
    kernel(blocks, THREADS, *numbers, np.int64(rows), np.int64(columns), np.int64(stride), out)
