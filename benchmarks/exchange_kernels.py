"""The kernels of tables over several GPUs on one of them, with lists of the length that a rank has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cupy
import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.cuda import CudaDevice
from embedding import pair_lists_cuda, row_moves_cuda, row_sort_cuda, runs_cuda
from embedding.captured_placement import owner_shares, pair_capacities, place_tables
from embedding.column_groups import column_groups
from embedding.pair_lists import PairLists
from embedding.placement import Placement, Plan, TableSpec
from embedding.row_sort import RowSort
from embedding.runs import Runs, UnitUpdate

RANKS, DIM, CHUNKS = 2, 128, 16
NODE_ROWS = 1 << 20

Timed = tuple[str, Callable[[], None], float]
"""A name, what runs, and the bytes that have to cross the memory's pins."""


def exchange_cases(rows: Sequence[int], keys: Sequence[Any], batch: int, device: CudaDevice) -> Iterator[Timed]:
    """Lists, packing, handing on and summing for two ranks of ``batch`` rows each; the tables are spread by rows.

    Args:
        rows: of each table.
        keys: of each table, [2 * batch].
        batch: rows of a rank.
        device: the GPU.
    """
    yield from _lists(rows, keys, batch, device)
    yield from _moves(len(rows), batch)
    yield from _sums(np.concatenate(keys)[: len(rows) * batch // RANKS], device)


def _lists(rows: Sequence[int], keys: Sequence[Any], batch: int, device: CudaDevice) -> Iterator[Timed]:
    specs = tuple(TableSpec(name=f"c{i}", rows=size, dim=DIM) for i, size in enumerate(rows))
    placements = tuple(
        Placement(kind="hybrid", threshold=min(1000, size - 1)) if size > 1 else Placement(kind="row_wise")
        for size in rows
    )
    plan = Plan(specs=specs, placements=placements, ranks=RANKS)
    [group] = column_groups(plan, range(len(specs)), 1)
    placed = place_tables(
        group, rank=0, device=device, optimizer=OptimizerConfig(), dtype=np.float32, seed=None,
        own_pads=False, frequent_pads=False, order=(1, 0),
    )  # fmt: skip
    lists = PairLists.create(
        device, placed.layout, batch, pair_capacities(plan, batch, owner_shares(plan, keys)), own=True
    )
    given = cupy.asarray(np.concatenate(keys))
    total, own = RANKS * len(rows) * batch, len(rows) * batch

    def run() -> None:
        pair_lists_cuda.count_pairs(given, RANKS * batch, placed.layout, lists)
        pair_lists_cuda.list_pairs(given, RANKS * batch, placed.layout, lists)

    # Keys twice; local, frequent and own; the lists as long as they are made.
    yield (
        "lists of what travels, and of what lies here",
        run,
        8 * total + 12 * own + 4.0 * (len(lists.asked) + len(lists.given)),
    )
    weight, length = placed.store.weight, int(device.to_host(lists.totals)[0, 1])
    out = cupy.empty((length, DIM), np.float16)
    named = lists.given[:length]
    distinct = int(cupy.unique(named).size)

    def pack() -> None:
        row_moves_cuda.move_rows(weight, named, out, None)

    yield f"pack {length} listed rows, float32 to float16", pack, length * (4 + 2 * DIM) + 4.0 * DIM * distinct


def _moves(tables: int, batch: int) -> Iterator[Timed]:
    """What hands rows on inside a node, and puts them into the vectors."""
    rng, count = np.random.default_rng(2), tables * batch // RANKS // CHUNKS * CHUNKS
    source, target = cupy.zeros((count, DIM), np.float16), cupy.empty((count, DIM), np.float16)
    turned = np.arange(count).reshape(CHUNKS, -1)[rng.permutation(CHUNKS)].reshape(-1)
    index = cupy.asarray(turned.astype(np.int32))
    vectors = cupy.empty((batch * (tables + 1), DIM), np.float16)
    places = cupy.asarray(np.sort(rng.permutation(len(vectors))[:count]).astype(np.int32))
    moved = count * (4.0 + 4 * DIM)
    yield "hand chunks on by lane", lambda: row_moves_cuda.move_rows(source, index, target, None), moved
    yield "scatter rows into the vectors", lambda: row_moves_cuda.move_rows(source, None, vectors, places), moved
    yield "gather their gradients", lambda: row_moves_cuda.move_rows(vectors, places, target, None), moved


def _sums(keys: np.ndarray, device: CudaDevice) -> Iterator[Timed]:
    """What sums a node's gradients by row."""
    pad, count = NODE_ROWS, len(keys)
    named = cupy.asarray((keys % NODE_ROWS).astype(np.int32))
    sort = RowSort.create(device, count, pad + 1, DIM, weighted=False)
    distinct = len(np.unique(keys % NODE_ROWS))
    slots, flag = sort.rows[1 - sort.order], device.zeros(1, np.int32)
    runs, unit = Runs.create(device, count, pad, [distinct], slots, flag), UnitUpdate.create(device)
    gradients, sums = cupy.ones((count, DIM), np.float16), cupy.zeros((distinct + 1, DIM), np.float32)
    by_slot = RowSort(
        (sort.rows[1], sort.rows[0]), sort.named, sort.bags, sort.order, sort.info, sort.counts, sort.totals,
        sort.partials, sort.open_runs,
    )  # fmt: skip

    def number() -> None:
        row_sort_cuda.sort_rows(runs.row_start, named, unit.no_offsets, unit.no_weights, count, pad + 1, sort)
        runs_cuda.number_runs(sort.rows[sort.order][:count], runs)

    def everything() -> None:
        number()
        sums.fill(0)
        runs_cuda.sum_runs(gradients, by_slot, sums, unit)

    yield f"sort {count} rows and number {distinct}", number, 4.0 * (count + 2 * count + distinct)
    yield "the same, and sum their gradients", everything, count * (8.0 + 2 * DIM) + 4.0 * DIM * distinct
