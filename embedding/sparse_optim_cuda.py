"""Launches of the sparse update's CUDA kernels; references in ``sparse_optim.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DeviceError
from dlrm.nvrtc import c_type, device_limits, load
from embedding.lookup_cuda import share_tables

SOURCE = Path(__file__).with_name("sparse_optim.cu")
SGD_THREADS = 512
BAG_BLOCKS = 4
"""Blocks of a multiprocessor that walk the bags."""
MOST_HOT_ROWS = 32
"""A lane notes in the bits of one word which rows it has met."""


def sgd_one_hot(
    weight: Any, row_start: Any, keys: Any, place: Any, num_rows: int, gradients: Any, scalars: Any, guard: Any
) -> None:
    """See ``sparse_optim.sgd_one_hot``; ``weight`` is float32. Sums are in no defined order.

    Raises:
        DeviceError: the tables are not float32, or rows are no whole number of 16-byte pieces.
    """
    dim, num_tables = weight.shape[1], len(row_start)
    _check(weight)
    if num_tables == 0 or num_rows == 0:
        return
    groups = SGD_THREADS // group_lanes(dim)
    _, shared_limit = device_limits()
    hot = min(MOST_HOT_ROWS, (shared_limit - 4 * groups) // (groups * 4 * dim))
    defines = (("DIM", dim), ("KEY", c_type(keys)), ("GRAD", c_type(gradients)), ("HOT", hot))
    kernel = load(SOURCE, "sgd_one_hot", defines)
    blocks, workers = share_tables(num_tables, num_rows, SGD_THREADS // 32 * 16, kernel.multiprocessors)
    shape = (np.int64(num_rows), np.int32(num_tables), np.int32(gradients.shape[1]), np.int32(workers))
    kernel(
        blocks, SGD_THREADS, weight, row_start, keys, place, *shape, gradients, scalars, guard,
        shared_bytes=groups * (4 * dim * hot + 4),
    )  # fmt: skip


def sgd_bags(
    weight: Any,
    row_start: Any,
    keys: Any,
    offsets: Any,
    key_weights: Any,
    mean: Any,
    place: Any,
    num_rows: int,
    gradients: Any,
    scalars: Any,
    guard: Any,
) -> None:
    """See ``sparse_optim.sgd_bags``; ``weight`` is float32. Sums are in no defined order.

    Raises:
        DeviceError: the tables are not float32, or rows are no whole number of 16-byte pieces.
    """
    dim, num_bags = weight.shape[1], len(row_start) * num_rows
    _check(weight)
    if num_bags == 0:
        return
    weighted = int(len(key_weights) > 0)
    types = (("KEY", c_type(keys)), ("GRAD", c_type(gradients)))
    kernel = load(SOURCE, "sgd_bags", (("DIM", dim), *types, ("HOT", 1), ("WEIGHTED", weighted)))
    blocks = min(-(-num_bags * group_lanes(dim) // SGD_THREADS), kernel.multiprocessors * BAG_BLOCKS)
    shape = (np.uint32(num_rows), np.uint32(num_bags), np.int32(gradients.shape[1]))
    kernel(
        blocks, SGD_THREADS, weight, row_start, keys, offsets, key_weights, mean, place, *shape, gradients, scalars,
        guard,
    )  # fmt: skip


def _check(weight: Any) -> None:
    if weight.dtype != np.float32 or weight.shape[1] % 4:
        raise DeviceError(
            f"embedding: tables of {weight.shape[1]} columns in {weight.dtype.name} cannot be updated by atomic "
            "additions, which take float32 and a multiple of 4; set deterministic: true"
        )


def group_lanes(dim: int) -> int:
    """Lanes that share a row of ``dim`` columns, each with whole pieces of four."""
    lanes = 32
    while dim % (4 * lanes):
        lanes //= 2
    return lanes
