"""Launches of the look-up's CUDA kernels; references in ``lookup.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DeviceError
from dlrm.nvrtc import Defines, c_type, load

SOURCE = Path(__file__).with_name("lookup.cu")
COPY_THREADS = 1024
POOL = {"POOL_THREADS": 448, "POOL_BLOCKS": 2, "AHEAD": 8, "TASK": 128, "PREFETCH": 0}
"""How bags are pooled, see ``lookup.cu``; ``benchmarks/gpu_variants.py`` times others."""


def gather_pool(
    weight: Any,
    row_start: Any,
    keys: Any,
    offsets: Any,
    key_weights: Any,
    mean: Any,
    place: Any,
    num_rows: int,
    out: Any,
) -> None:
    """See ``lookup.gather_pool``; ``weight`` and ``out`` are float32, float16 or bfloat16, sums are float32."""
    num_tables, num_places = len(row_start), out.shape[1]
    if num_tables == 0 or num_rows == 0:
        return
    defines = table_defines(weight, keys, out)
    if len(offsets) == 0 and len(key_weights) == 0:
        kernel = load(SOURCE, "copy_rows", defines)
        blocks, workers = share_tables(num_tables, num_rows, COPY_THREADS // 32 * 16, kernel.multiprocessors)
        sizes = (np.int64(num_rows), np.int32(num_tables), np.int32(num_places), np.int32(workers))
        kernel(blocks, COPY_THREADS, weight, row_start, keys, place, *sizes, out)
        return
    if len(offsets) == 0:
        raise DeviceError("lookup: weighted keys come without offsets; give the kernel the bags' offsets")
    kernel = load(SOURCE, "pool_bags", (*defines, ("WEIGHTED", int(len(key_weights) > 0)), *POOL.items()))
    shape = (np.int32(num_rows), np.int32(num_tables), np.int32(num_places))
    blocks = kernel.multiprocessors * POOL["POOL_BLOCKS"]
    kernel(blocks, POOL["POOL_THREADS"], weight, row_start, keys, offsets, key_weights, mean, place, *shape, out)


def table_defines(weight: Any, keys: Any, out: Any) -> Defines:
    """The macros that name a look-up's element types.

    Raises:
        DeviceError: rows are no whole number of 16-byte pieces.
    """
    dim = weight.shape[1]
    multiple = 16 // weight.dtype.itemsize
    if dim % multiple:
        raise DeviceError(
            f"model.embedding_dim: {dim} is no multiple of {multiple}, which {weight.dtype.name} tables on a GPU need"
        )
    return (("DIM", dim), ("WEIGHT", c_type(weight)), ("KEY", c_type(keys)), ("OUT", c_type(out)))


def share_tables(num_tables: int, num_rows: int, rows_at_once: int, multiprocessors: int) -> tuple[int, int]:
    """How many blocks, and workers as a multiple of T, each with one table's share of the batch.

    Workers are few, so that a table's frequent rows are met by few first-level caches, but come out nearly even.

    Args:
        num_tables: T.
        num_rows: B.
        rows_at_once: rows that a block works on at a time.
        multiprocessors: of the GPU, one block each.

    Returns:
        blocks of the grid, workers.
    """
    useful = max(1, -(-num_rows // rows_at_once))

    def share_of_time_used(parts: int) -> float:
        workers = num_tables * parts
        return workers / (-(-workers // multiprocessors) * multiprocessors)

    candidates = range(1, min(useful, max(16, -(-multiprocessors // num_tables))) + 1)
    # The fewest parts within 2 % of the best.
    best = max(map(share_of_time_used, candidates))
    parts = next(parts for parts in candidates if share_of_time_used(parts) >= best - 0.02)
    return min(multiprocessors, num_tables * parts), num_tables * parts
