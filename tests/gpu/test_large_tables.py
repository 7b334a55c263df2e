"""The full Criteo Terabyte shape in half precision: 187.8 million rows of 128 columns, 48 GB, most of it never touched.

A GPU needs that much memory free; without one the tables are address space whose pages come as they are touched.
"""

from __future__ import annotations

import importlib
import math
import mmap
from typing import Any

import numpy as np
import pytest

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.scalars import SIZE, write_guard, write_scalars
from embedding.row_sort import COUNT, RowSort
from embedding.sparse_optim import constants
from pipeline.generated import SHAPES

DIM, NUM_ROWS = 128, 24
MAP_NORESERVE = 0x4000
"""Linux: pages are not counted against the machine's memory before they are touched."""


def zeros(machine: Any, shape: tuple[int, int], dtype: Any) -> Any:
    """Zeros on the machine; skips the test where there is no room."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not machine.emulated:
        cupy = importlib.import_module("cupy")
        cupy.get_default_memory_pool().free_all_blocks()
        free, _ = cupy.cuda.runtime.memGetInfo()
        if free < size + 2**31:
            pytest.skip(f"tables of {size / 1e9:.0f} GB do not fit the {free / 1e9:.0f} GB that are free on the GPU")
        return cupy.zeros(shape, dtype)
    try:
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        pytest.skip(f"{size / 1e9:.0f} GB of address space cannot be had: {error}")
    return np.frombuffer(room, dtype).reshape(shape)


def rows_of(machine: Any, array: Any, rows: np.ndarray) -> np.ndarray:
    """Some rows, one by one: whatever indexes many at once may have limits of its own."""
    return np.stack([machine.host(array[int(row)]) for row in rows])


class Full:
    """Keys at the ends of Terabyte's tables and anywhere in them, and rows that are not zero where they point."""

    def __init__(self, machine: Any, rng: np.random.Generator) -> None:
        rows = np.array(SHAPES["criteo-terabyte"])
        self.row_start = np.cumsum(rows) - rows
        self.total = int(rows.sum())
        keys = rng.integers(0, rows[:, None], (len(rows), NUM_ROWS))
        keys[:, 0], keys[:, 1] = rows - 1, 0
        self.keys = keys.astype(np.int32)
        self.named = np.unique(keys + self.row_start[:, None])
        self.place = np.arange(1, len(rows) + 1)
        self.weight = zeros(machine, (self.total, DIM), np.float16)
        self.values = rng.standard_normal((len(self.named), DIM)).astype(np.float16)
        for row, values in zip(self.named, machine.array(self.values), strict=True):
            self.weight[int(row)] = values

    def at(self) -> np.ndarray:
        """Which of ``named`` each key is: [T, B]."""
        return np.searchsorted(self.named, self.keys + self.row_start[:, None])

    def mistaken(self) -> np.ndarray:
        """Rows that an index or an offset of too few bits would reach instead, and neighbours."""
        wrapped = [(self.named * DIM * width % 2**bits) // (DIM * width) for width in (1, 2) for bits in (31, 32)]
        rows = np.concatenate([*wrapped, self.named - 1, self.named + 1])
        rows = np.unique(rows[(rows >= 0) & (rows < self.total)])
        return rows[~np.isin(rows, self.named)]


def test_rows_far_into_the_tables_are_found(machine: Any, rng: np.random.Generator) -> None:
    from embedding.lookup_cuda import gather_pool

    full = Full(machine, rng)
    tables = len(full.row_start)
    expected = np.full((NUM_ROWS, tables + 1, DIM), np.nan, np.float16)
    expected[:, 1:] = full.values[full.at()].transpose(1, 0, 2)
    no_weights, mean = np.empty(0, np.float32), np.zeros(tables, bool)
    for offsets in (np.empty(0, np.int64), np.arange(tables * NUM_ROWS + 1)):
        out = machine.array(np.full_like(expected, np.nan))
        named = [machine.array(x) for x in (full.row_start, full.keys.ravel(), offsets, no_weights, mean, full.place)]
        gather_pool(full.weight, *named, NUM_ROWS, out)
        np.testing.assert_array_equal(machine.host(out), expected)


def test_rows_far_into_the_tables_are_updated(machine: Any, rng: np.random.Generator) -> None:
    from embedding.row_sort_cuda import sort_rows
    from embedding.sorted_update_cuda import update_sorted

    full = Full(machine, rng)
    tables, lr, scale = len(full.row_start), 0.05, 64.0
    gradients = (scale * rng.standard_normal((NUM_ROWS, tables + 1, DIM))).astype(np.float16)
    totals = zeros(machine, (full.total, 1), np.float32)
    optimizer = OptimizerConfig(kind="rowwise_adagrad", eps=1e-3)
    scalars = write_scalars(
        np.empty(SIZE, np.float32), lr=0.0, global_rows=1, valid_rows=1, step=1, seed=3,
        sparse=constants(optimizer, lr, 1).tolist(),
    )  # fmt: skip
    guard = write_guard(np.empty(SIZE, np.float32), scale)
    host = RowSort.create(HostDevice(1, compiled=False), tables * NUM_ROWS, full.total, DIM, weighted=False)
    moved = {name: machine.array(getattr(host, name)) for name in ("bags", "info", "counts", "totals", "open_runs")}
    pairs = {name: tuple(machine.array(array) for array in getattr(host, name)) for name in ("rows", "named")}
    sort = RowSort(**moved, **pairs, order=host.order, partials=machine.array(host.partials))
    nothing = np.empty(0, np.int64), np.empty(0, np.float32)
    named = [machine.array(x) for x in (full.row_start, full.keys.ravel(), *nothing)]
    sort_rows(*named, NUM_ROWS, full.total, sort)
    assert int(machine.host(sort.info)[COUNT]) == tables * NUM_ROWS
    in_order = machine.host(sort.rows[sort.order])
    np.testing.assert_array_equal(in_order, np.sort((full.keys + full.row_start[:, None]).ravel()))

    origins = np.array([(table, 0, 1, 0) for table in range(tables)], np.int64)
    rest = [machine.array(x) for x in (np.zeros(tables, bool), full.place, gradients, origins, scalars, guard)]
    update_sorted(
        "rowwise_adagrad", full.weight, [totals], *named, rest[0], rest[1], NUM_ROWS, *rest[2:], sort
    )  # fmt: skip

    sums = np.zeros(full.values.shape)
    np.add.at(sums, full.at(), gradients[:, 1:].transpose(1, 0, 2).astype(np.float64) / scale)
    squares = (sums**2).mean(1)
    exact = full.values - lr * sums / (np.sqrt(squares) + 1e-3)[:, None]
    found = rows_of(machine, full.weight, full.named).astype(np.float64)
    # One spacing of half precision, and what float32 has lost before.
    limit = np.maximum(np.abs(exact) * 2.0**-10, 2.0**-24) * 1.01 + 1e-5
    assert (np.abs(found - exact) <= limit).all()
    np.testing.assert_allclose(rows_of(machine, totals, full.named)[:, 0], squares, rtol=1e-4)
    others = full.mistaken()
    assert not rows_of(machine, full.weight, others).any()
    assert not rows_of(machine, totals, others).any()
