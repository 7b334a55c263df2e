"""The rows and the optimiser state that one rank holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.philox import uniform_rows
from embedding.plan import TableSpec
from embedding.sparse_optim import StateSpec, state_specs


@dataclass(frozen=True, slots=True)
class Table:
    """One table's rows. The arrays are views: write into them, they cannot be replaced.

    Attributes:
        spec: what the table is.
        weight: [rows, D].
        state: optimiser state by name: [rows, D], or [rows] for one number a row.
    """

    spec: TableSpec
    weight: Array
    state: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shard:
    """What a rank holds of one table. The arrays are views: write into them, they cannot be replaced.

    Attributes:
        table: the table's name.
        rows: which rows of the table.
        columns: which columns of the table.
        weight: [len(rows), len(columns)].
        state: optimiser state by name: the same shape, or [len(rows)] for one number a row.
        replicated: every rank holds the same; one of them saves it.
        touched: [len(rows)] bool, rows that were updated since the last clearing; ``None``: nobody asks.
    """

    table: str
    rows: range
    columns: range
    weight: Array
    state: dict[str, Array] = field(default_factory=dict)
    replicated: bool = False
    touched: Array | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Part of a table that is to be allocated.

    Attributes:
        spec: the whole table.
        rows: which rows of it.
        columns: which columns of it.
        replicated: every rank holds the same.
    """

    spec: TableSpec
    rows: range
    columns: range
    replicated: bool = False

    @classmethod
    def whole(cls, spec: TableSpec) -> Part:
        """All of a table."""
        return cls(spec, range(spec.rows), range(spec.dim))


@dataclass(frozen=True, slots=True)
class ShardStore:
    """Shards of this rank, one after the other in the same arrays, so that one kernel call reaches them all.

    Shapes: S shards, R rows of all of them together, D columns.

    Attributes:
        shards: the shards, views of what follows.
        weight: [R, D].
        state: [R, D] or [R, 1] by name, in the optimiser's order.
        row_start: [S] int64, first row of each shard.
    """

    shards: list[Shard]
    weight: Array
    state: dict[str, Array]
    row_start: Array


def create_shards(
    parts: Sequence[Part], dim: int, *, device: Device, optimizer: OptimizerConfig, dtype: Any, seed: int | None
) -> ShardStore:
    """Allocate parts of tables and fill them: weights uniform in +-1 / sqrt(rows), state as the optimiser starts.

    The values of a row depend on the seed, the table's name and the row alone.

    Args:
        parts: what this rank holds; each of ``dim`` columns.
        dim: D.
        device: where they lie.
        optimizer: decides the state.
        dtype: float32 or float64, on a GPU also float16 or bfloat16 (uint16); the state is float32 where that is
            narrower.
        seed: of the run; ``None``: nothing but speed matters, and everything is zero.
    """
    starts = [0, *np.cumsum([len(part.rows) for part in parts], dtype=np.int64).tolist()]
    weight = (device.zeros if seed is None else device.empty)((starts[-1], dim), dtype)
    layout = state_specs(optimizer)
    state_dtype = np.promote_types(dtype, np.float32)
    state = {item.name: _filled(item, starts[-1], dim, state_dtype, device, empty=seed is None) for item in layout}
    shards = []
    for part, begin in zip(parts, starts, strict=False):
        rows = slice(begin, begin + len(part.rows))
        if seed is not None:
            uniform_rows(
                seed,
                f"table.{part.spec.name}",
                len(part.rows),
                dim,
                dtype,
                start=part.rows.start,
                step=part.rows.step,
                first_column=part.columns.start,
                scale=1.0 / math.sqrt(part.spec.rows),
                out=weight[rows],
                device=device,
            )
        views = {item.name: state[item.name][rows, 0] if item.per_row else state[item.name][rows] for item in layout}
        shards.append(Shard(part.spec.name, part.rows, part.columns, weight[rows], views, part.replicated))
    return ShardStore(shards, weight, state, device.xp.asarray(starts[:-1], np.int64))


def with_touched(shards: Sequence[Shard], touched: Array | None) -> list[Shard]:
    """The shards of one store with their parts of what was touched.

    Args:
        shards: all of them, in the order in which they lie; those without rows may be missing.
        touched: [R] bool of the store, or ``None``.
    """
    if touched is None:
        return list(shards)
    ends = np.cumsum([len(shard.rows) for shard in shards], dtype=np.int64).tolist()
    return [
        replace(shard, touched=touched[end - len(shard.rows) : end]) for shard, end in zip(shards, ends, strict=True)
    ]


def _filled(item: StateSpec, rows: int, dim: int, dtype: Any, device: Device, *, empty: bool) -> Array:
    shape = (rows, 1 if item.per_row else dim)
    if empty or not item.start:
        return device.zeros(shape, dtype)
    array = device.empty(shape, dtype)
    array.fill(item.start)
    return array
