"""Launches of the kernels that number distinct rows and sum their gradients; references in ``runs.py``."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlrm.nvrtc import load
from embedding.pair_lists import tiles_of
from embedding.pair_lists_cuda import SOURCE, THREADS
from embedding.row_sort import RowSort
from embedding.runs import Runs, UnitUpdate
from embedding.sorted_update_cuda import update_sorted

_DEFINES = (("KEY", "int"),)


def number_runs(rows: Any, runs: Runs) -> None:
    """See ``runs.number_runs``."""
    groups, chunks = len(runs.totals), tiles_of(runs.size)
    if groups == 0 or chunks == 0:
        return
    blocks = -(-groups * chunks // (THREADS // 32))
    shape = (np.uint32(runs.size), np.uint32(groups), np.uint32(chunks), runs.row_start, np.uint32(runs.pad))
    load(SOURCE, "count_runs", _DEFINES)(blocks, THREADS, rows, *shape, runs.counts)
    load(SOURCE, "add_tiles", _DEFINES)(
        groups, THREADS, runs.counts, np.uint32(chunks), np.int32(1), runs.room, runs.totals, runs.flag
    )
    load(SOURCE, "number_runs", _DEFINES)(
        blocks, THREADS, rows, *shape, runs.slot_start, runs.counts, runs.totals, runs.slots, runs.distinct
    )


def put_numbers(numbers: Any, places: Any, out: Any) -> None:
    """See ``runs.put_numbers``."""
    if count := len(places):
        load(SOURCE, "put_numbers", _DEFINES)(-(-count // THREADS), THREADS, numbers, places, np.int64(count), out)


def sum_runs(gradients: Any, sort: RowSort, sums: Any, unit: UnitUpdate) -> None:
    """See ``runs.sum_runs``: an update by SGD that adds up."""
    first = unit.zero
    update_sorted(
        "sgd", sums, [], first, unit.no_offsets, unit.no_offsets, unit.no_weights, unit.mean, first, len(gradients),
        gradients[:, None], unit.origins, unit.scalars, unit.guard, sort,
    )  # fmt: skip
