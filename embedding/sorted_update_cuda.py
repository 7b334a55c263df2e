"""Launches of the sorted update's CUDA kernels; reference in ``sorted_update.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DeviceError
from dlrm.nvrtc import Defines, c_type, load
from embedding.row_sort import CHUNK, CHUNKS_OF_A_STRETCH, RowSort
from embedding.sparse_optim import KINDS
from embedding.sparse_optim_cuda import group_lanes

SOURCE = Path(__file__).with_name("sorted_update.cu")
THREADS = 256
SUM = {"MOST_AHEAD": 8, "SUM_BLOCKS": 3, "CACHED": 1}
"""How chunks are summed, see ``sorted_update.cu``; ``benchmarks/gpu_variants.py`` times others."""
SUMMED_BLOCKS = 8
"""Blocks of a multiprocessor that walk rows whose gradients have been summed."""
FINISH_BLOCKS = 4
"""Blocks of a multiprocessor that add up the runs which cross chunks."""


def update_sorted(
    kind: str,
    weight: Any,
    state: Sequence[Any],
    row_start: Any,
    keys: Any,
    offsets: Any,
    key_weights: Any,
    mean: Any,
    place: Any,
    num_rows: int,
    gradients: Any,
    origins: Any,
    scalars: Any,
    guard: Any,
    sort: RowSort,
) -> None:
    """See ``sorted_update.update_sorted``: the same bits every time. Once after each sort, which it uses up.

    Raises:
        DeviceError: rows are no whole number of four columns.
    """
    dim = weight.shape[1]
    num_keys = len(keys) if len(offsets) else len(row_start) * num_rows
    if num_keys == 0 or num_rows == 0:
        return
    bags = (("BAGS", int(len(offsets) > 0)), ("WEIGHTED", int(len(key_weights) > 0)))
    defines = (*_types(kind, weight, gradients), *bags, *SUM.items())
    first, second, *_ = (*state, weight, weight)  # what a kind does not have, it does not touch
    chunks = -(-num_keys // CHUNK)
    groups = THREADS // group_lanes(dim)
    ordered = (sort.rows[sort.order], sort.named[sort.order], sort.bags, sort.info, np.uint32(chunks))
    shards = (origins, np.uint32(len(origins)))
    places = (np.uint32(num_rows), np.uint32(gradients.shape[1]))
    tables, blocks = (weight, first, second), (scalars, guard)
    sum_chunks = load(SOURCE, "sum_chunks", defines)
    sum_chunks(
        min(-(-chunks // groups), sum_chunks.multiprocessors * SUM["SUM_BLOCKS"]), THREADS, *ordered, sort.partials,
        sort.open_runs, offsets, key_weights, mean, place, *shards, *places, gradients, *tables, *blocks,
    )  # fmt: skip
    warps = THREADS // 32
    load(SOURCE, "sum_stretches", defines)(
        -(-chunks // (CHUNKS_OF_A_STRETCH * warps)), THREADS, ordered[0], sort.info, np.uint32(chunks), sort.partials,
        *blocks,
    )  # fmt: skip
    finish = load(SOURCE, "finish_runs", defines)
    finish(
        min(-(-chunks // warps), finish.multiprocessors * FINISH_BLOCKS), THREADS, ordered[0], sort.info,
        np.uint32(chunks), sort.partials, sort.open_runs, *shards, *tables, *blocks,
    )  # fmt: skip


def update_summed(
    kind: str,
    weight: Any,
    state: Sequence[Any],
    sums: Any,
    touched: Any,
    origins: Any,
    scalars: Any,
    guard: Any,
) -> None:
    """See ``sorted_update.update_summed``.

    Raises:
        DeviceError: rows are no whole number of four columns.
    """
    count = len(touched)
    if count == 0:
        return
    first, second, *_ = (*state, weight, weight)
    kernel = load(SOURCE, "update_rows", (*_types(kind, weight, sums), ("BAGS", 0), ("WEIGHTED", 0), *SUM.items()))
    kernel(
        min(-(-count // THREADS), kernel.multiprocessors * SUMMED_BLOCKS), THREADS, sums, touched, np.uint32(count),
        origins, np.uint32(len(origins)), weight, first, second, scalars, guard,
    )  # fmt: skip


def _types(kind: str, weight: Any, gradients: Any) -> Defines:
    """The macros of a kind, its tables and gradients.

    Raises:
        DeviceError: rows are no whole number of four columns.
    """
    dim = weight.shape[1]
    if dim % 4:
        raise DeviceError(f"model.embedding_dim: {dim} is no multiple of 4, which the sparse update on a GPU needs")
    return (("DIM", dim), ("WEIGHT", c_type(weight)), ("GRAD", c_type(gradients)), ("KIND", KINDS.index(kind)))
