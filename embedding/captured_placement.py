"""A plan as captured steps need it: what lies where on this rank, and how much travels between each pair of ranks.

Shapes: T tables, W ranks, F places of the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import DeviceError
from embedding.column_groups import ColumnGroup, deduplicates, uncut
from embedding.pair_lists import PairLayout
from embedding.placement import Plan, TableSpec
from embedding.row_layout import rows_of
from embedding.table import Part, Shard, ShardStore, create_shards
from embedding.topology import start_of
from embedding.touched_rows import most_touched

SIGMAS = 10.0
"""A list holds what is expected and so many standard deviations."""

MOST_ROWS = 2**31 - 1
"""Rows and places are numbered by 32-bit integers."""

MORE = 1.25
"""How many times as long lists are made as one that ran over would have had to be."""

_PADDING = "(padding)"


@dataclass(frozen=True, slots=True)
class MostRows:
    """Most rows that a batch asks for; ``None``: not known, or nobody asks.

    Attributes:
        distinct: [W] distinct ones of each rank for a node (``node_rows``).
        once: [W] the same for a rank, where rows are de-duplicated.
        touched: replicated ones (``touched_rows.most_touched``).
    """

    distinct: Sequence[int] | None = None
    once: Sequence[int] | None = None
    touched: int | None = None

    def times(self, factor: float) -> MostRows:
        """So many times as much."""
        distinct, once = (
            None if own is None else [math.ceil(factor * rows) for rows in own] for own in (self.distinct, self.once)
        )
        return MostRows(distinct, once, None if self.touched is None else math.ceil(factor * self.touched))

    @classmethod
    def measure(
        cls,
        plan: Plan,
        keys: Sequence[Array],
        nodes: Sequence[Sequence[int]] | None,
        distinct_of: Callable[[Sequence[Sequence[int]]], tuple[int, ...]],
        sigmas: float,
    ) -> MostRows:
        """Look at one batch.

        Args:
            plan: placements of all tables.
            keys: of each table, those of the batch.
            nodes: the ranks of each node, where rows go by node.
            distinct_of: ``most_distinct`` of the batch by such groups of ranks.
            sigmas: standard deviations above what these keys show.
        """
        return cls(
            distinct=None if nodes is None else distinct_of(nodes),
            once=distinct_of([[rank] for rank in range(plan.ranks)]) if deduplicates(plan) else None,
            touched=most_touched(plan, keys, sigmas),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedPlacement:
    """What this rank holds.

    Attributes:
        store: replicated rows first, table by table, then this rank's own, then one row of padding.
        flat: the same, of which keys name rows by their numbers in the store.
        layout: what says where a key's row lies.
        frequent: H, replicated rows.
        frequent_start: [T] int64 of the host, store row of each table's first replicated row.
        own_start: [T] int64 of the host, store row of this rank's first own row of each table.
    """

    store: ShardStore
    flat: ShardStore
    layout: PairLayout
    frequent: int
    frequent_start: Array
    own_start: Array

    def shards(self) -> list[Shard]:
        """The store's shards of the device; those without rows and the padding are left out."""
        return [shard for shard in self.store.shards[:-1] if len(shard.rows)]


def place_tables(
    group: ColumnGroup,
    *,
    rank: int,
    device: Device,
    optimizer: OptimizerConfig,
    dtype: Any,
    seed: int | None,
    own_pads: bool,
    frequent_pads: bool,
    order: Sequence[int],
) -> CapturedPlacement:
    """Allocate and initialise what ``rank`` holds.

    Args:
        group: the tables, or parts of tables.
        rank: this one.
        device: holds it.
        optimizer: of the tables.
        dtype: of the tables: float32, float16 or bfloat16 as uint16.
        seed: of the run; ``None``: tables of zeros.
        own_pads: lists of own rows are filled up with the row of padding, otherwise with -1.
        frequent_pads: the same of what stands for rows that are not replicated, with row H.
        order: the ranks in the order of their chunks, ``rank`` last.

    Raises:
        DeviceError: there are too many rows.
    """
    specs, placements, ranks = group.plan.specs, group.plan.placements, group.plan.ranks
    threshold = np.array([placement.threshold for placement in placements], np.int64)
    frequent_start = np.cumsum(threshold) - threshold
    own = [rows_of(spec, placement, ranks, rank) for spec, placement in zip(specs, placements, strict=True)]
    held = np.array([len(rows) for rows in own], np.int64)
    pairs = zip(specs, placements, strict=True)
    most = np.array([max(len(rows_of(*pair, ranks, r)) for r in range(ranks)) for pair in pairs], np.int64)
    frequent = int(threshold.sum())
    total = frequent + int(held.sum())
    if total >= MOST_ROWS:
        raise DeviceError(f"tables: {total} rows on rank {rank}, but a GPU takes {MOST_ROWS - 1}; use more ranks")
    columns, dim = group.columns, group.dim
    replicas = [range(size) for size in threshold.tolist()]
    parts = [Part(*held, True) for held in zip(specs, replicas, columns, strict=True)]
    parts += [Part(*held) for held in zip(specs, own, columns, strict=True)]
    parts.append(Part.whole(TableSpec(name=_PADDING, rows=1, dim=dim)))
    own_start = frequent + np.cumsum(held) - held
    store = create_shards(parts, dim, device=device, optimizer=optimizer, dtype=dtype, seed=seed)
    xp, of = device.xp, group.features
    owner = [placement.owner if placement.kind == "table_wise" else -1 for placement in placements]
    pads = frequent - frequent_start if frequent_pads else np.full(len(specs), -1)
    layout = PairLayout(
        threshold=xp.asarray(threshold[of]),
        owner=xp.asarray(np.array(owner, np.int32)[of]),
        frequent_start=xp.asarray(frequent_start[of]),
        own_start=xp.asarray(own_start[of]),
        keys_of=xp.asarray(group.keys_of),
        place=xp.asarray(group.place),
        num_places=group.num_places,
        ranks=ranks,
        rank=rank,
        own_pad=total if own_pads else -1,
        frequent_pad=xp.asarray(pads.astype(np.int32)[of]),
        frequent=frequent,
        order=tuple(order),
        chunk_of=xp.asarray(np.argsort(order).astype(np.int32)),
        relay_row_start=xp.asarray((np.cumsum(most) - most)[of]),
        relay_pad=int(most.sum()),
        total_rows=total,
    )
    flat = ShardStore(store.shards, store.weight, store.state, xp.asarray(np.zeros(1, np.int64)))
    return CapturedPlacement(
        store=store, flat=flat, layout=layout, frequent=frequent, frequent_start=frequent_start, own_start=own_start,
    )  # fmt: skip


def owner_shares(plan: Plan, rows: Sequence[Array], weights: Sequence[Array] | None = None) -> Array:
    """What part of each table's look-ups goes to each owner.

    Args:
        plan: placements of all tables.
        rows: of each table, rows that are looked up: the keys of some batches, or every row once.
        weights: how often each of them is; ``None``: as often as it stands there.

    Returns:
        [T, W] float64; what is left to 1 is of replicated rows. 0 of tables that are cut by columns.
    """
    shares = np.zeros((len(plan.specs), plan.ranks))
    for table, (placed, own) in enumerate(zip(plan.placements, rows, strict=True)):
        if (placement := uncut(placed)) is None:
            continue
        if placement.kind == "table_wise":
            shares[table, placement.owner] = 1.0
            continue
        beyond = np.asarray(own, np.int64) - placement.threshold
        times = np.ones(len(beyond)) if weights is None else np.asarray(weights[table], np.float64)
        travels = beyond >= 0
        by_owner = np.bincount(beyond[travels] % plan.ranks, times[travels], plan.ranks)
        shares[table] = by_owner / max(times.sum(), 1e-300)
    return shares


def pair_capacities(
    plan: Plan,
    rows: int,
    shares: Array | None,
    sigmas: float = SIGMAS,
    factor: float = 1.0,
    features: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """How many rows each rank can send to one other in a batch.

    Args:
        plan: placements of all tables.
        rows: most rows of one rank.
        shares: [T, W], see ``owner_shares``; ``None``: whatever the keys may be.
        sigmas: standard deviations above what is expected.
        factor: how many times as much there is to be.
        features: the table of each feature of one key a row; ``None``: every table is one.
    """
    capacities = []
    for rank in range(plan.ranks):
        most, mean, variance = 0, 0.0, 0.0
        for table in range(len(plan.specs)) if features is None else features:
            spec, placement = plan.specs[table], plan.placements[table]
            if placement.kind == "table_wise":
                share = float(placement.owner == rank)
            elif len(rows_of(spec, placement, plan.ranks, rank)) == 0:
                share = 0.0
            else:
                share = 1.0 if shares is None else min(1.0, float(shares[table, rank]))
            possible = placement.owner == rank if placement.kind == "table_wise" else placement.threshold < spec.rows
            most += rows * possible
            mean += rows * share
            variance += rows * share * (1 - share)
        wanted = factor * (mean + sigmas * math.sqrt(variance))
        capacities.append(min(most, max(0, math.ceil(wanted - 1e-6))))
    return tuple(capacities)


def longer(totals: Array, capacities: Sequence[int]) -> float:
    """How many times as long lists have to be to hold a quarter more than a batch needs.

    Args:
        totals: [W, W] rows of each owner for each rank.
        capacities: of each owner.
    """
    needed = totals.max(axis=1).tolist()
    return float(MORE * max(1.0, *(rows / max(1, had) for rows, had in zip(needed, capacities, strict=True))))


def node_rows(plan: Plan, keys: Array, nodes: Sequence[Sequence[int]], sigmas: float = SIGMAS) -> tuple[int, ...]:
    """How many distinct rows of each rank, of tables that are not cut by columns, a node may ask for in a batch.

    Args:
        plan: placements of all tables.
        keys: [T, G] of the host, a whole batch.
        nodes: the ranks of each node.
        sigmas: standard deviations above what these keys show; a count of distinct rows varies no more than its root.
    """
    starts = [start_of(keys.shape[1], plan.ranks, rank) for rank in range(plan.ranks + 1)]
    parts = [[keys[:, starts[rank] : starts[rank + 1]] for rank in ranks] for ranks in nodes]
    return most_distinct(plan, [np.concatenate(own, axis=1) for own in parts], sigmas)


def most_distinct(plan: Plan, by_node: Sequence[Array | Sequence[Array]], sigmas: float = SIGMAS) -> tuple[int, ...]:
    """``node_rows`` of the keys of each table that each node has."""
    most = np.zeros(plan.ranks)
    for own in by_node:
        found = np.zeros(plan.ranks)
        for table, placed in enumerate(plan.placements):
            if (placement := uncut(placed)) is None:
                continue
            beyond = np.unique(np.asarray(own[table], np.int64)) - placement.threshold
            if placement.kind == "table_wise":
                found[placement.owner] += len(beyond)
            else:
                found += np.bincount(beyond[beyond >= 0] % plan.ranks, minlength=plan.ranks)
        most = np.maximum(most, found)
    return tuple(np.ceil(most + sigmas * np.sqrt(most)).astype(np.int64).tolist())
