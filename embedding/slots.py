"""Bags of slots: one numbering for the replicated rows of a rank and for the rows that it received.

Slot s < H is replicated row s; slot H + i is received row i. Received rows lie owner after owner, in the order in
which they were asked for: by table, then by first occurrence (or each occurrence where nothing is de-duplicated).

Shapes: T tables, B bags a table, K keys, W ranks, H replicated rows of all tables, N rows asked for, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlrm.device import Array, Device
from embedding.sparse_optim import share_work

ALL, HERE, ELSEWHERE = 0, 1, 2
"""Which bags are pooled, or which rows' gradients are summed: bags of replicated rows alone need no exchange."""

SPREAD = -1
"""Owner of a table whose rows lie on all ranks in turn."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where rows lie. Row r >= threshold of table t has number ``base[owner, t] + place`` among its owner's rows.

    Attributes:
        threshold: [T] int64, rows below are replicated.
        owner: [T] int64, of all other rows; ``SPREAD``: rank (r - threshold) % W, place (r - threshold) // W.
        distinct: [T] bool, each distinct row is asked for once.
        frequent_start: [T] int64, slot of each table's row 0.
        base: [W, T] int64.
        frequent: H.
    """

    threshold: Array
    owner: Array
    distinct: Array
    frequent_start: Array
    base: Array
    frequent: int


def route_keys(
    keys: Array,
    offsets: Array,
    num_rows: int,
    layout: RowLayout,
    slots: Array,
    ids: Array,
    destination: Array,
    *,
    device: Device,
) -> Array:
    """Give every key its slot, and list the rows that have to be asked for.

    Args:
        keys: [K] int32 or int64, table-major, inside their tables.
        offsets: [T * B + 1] int64; empty for one key a bag.
        num_rows: B.
        layout: where rows lie.
        slots: [K] int32 or int64, written.
        ids: [K] int32 or int64; the first N are written: the owners' numbers of the rows, owner after owner.
        destination: [K] int32 scratch.
        device: where the arrays lie.

    Returns:
        [W] int64, rows asked of each owner; N together.
    """
    ranks, tables = layout.base.shape
    counts = np.zeros(ranks, np.int64)
    if len(keys) == 0:
        return counts
    ends = np.arange(1, tables + 1) * num_rows if len(offsets) == 0 else offsets[num_rows::num_rows]
    kernel = device.kernel(__name__, "route")
    operation = kernel if kernel is not None else route
    # Twice the keys, so that chains in the hash table stay short.
    sizes = np.where(layout.distinct, np.int64(2) << np.ceil(np.log2(np.diff(ends, prepend=0) + 1)).astype(np.int64), 0)
    operation(
        keys, ends, layout.threshold, layout.owner, layout.distinct, layout.frequent_start, layout.base,
        layout.frequent, slots, ids, destination, np.cumsum(sizes), counts,
    )  # fmt: skip
    return counts


def route(
    keys: Array,
    ends: Array,
    threshold: Array,
    owner: Array,
    distinct: Array,
    frequent_start: Array,
    base: Array,
    frequent: int,
    slots: Array,
    ids: Array,
    destination: Array,  # noqa: ARG001 the compiled form's scratch
    hash_ends: Array,  # noqa: ARG001
    counts: Array,
) -> None:
    """The plain form of the compiled ``route``: ``route_keys`` with the end of each table's keys [T]."""
    ranks = len(base)
    asked: list[list[int]] = [[] for _ in range(ranks)]
    waiting: list[tuple[int, int, int]] = []
    begin = 0
    for table, end in enumerate(ends.tolist()):
        seen: dict[int, tuple[int, int]] = {}
        for k in range(begin, end):
            row = int(keys[k]) - int(threshold[table])
            if row < 0:
                slots[k] = frequent_start[table] + keys[k]
                continue
            if not distinct[table] or row not in seen:
                spread = owner[table] == SPREAD
                to = row % ranks if spread else int(owner[table])
                seen[row] = to, len(asked[to])
                asked[to].append(int(base[to, table]) + (row // ranks if spread else row))
            waiting.append((k, *seen[row]))
        begin = end
    counts[:] = [len(rows) for rows in asked]
    starts = np.cumsum(counts) - counts
    ids[: int(counts.sum())] = [row for rows in asked for row in rows]
    for k, to, index in waiting:
        slots[k] = frequent + starts[to] + index


def slots_of_tables(
    tables: range, num_rows: int, slots: Array, offsets: Array, key_weights: Array
) -> tuple[Array, Array, Array]:
    """Views of the slots, offsets and weights of some tables, as ``pool_slots`` and ``sum_slots`` take them.

    Args:
        tables: consecutive ones.
        num_rows: B.
        slots: [K], table-major.
        offsets: [T * B + 1] int64; empty for one key a bag.
        key_weights: [K] float32; empty for none.
    """
    begin, end = tables.start * num_rows, tables.stop * num_rows
    if len(offsets):  # they count from the first table's first key
        return slots, offsets[begin : end + 1], key_weights
    return slots[begin:end], offsets, key_weights[begin:end]


def pool_slots(
    frequent: Array,
    received: Array,
    slots: Array,
    offsets: Array,
    key_weights: Array,
    mean: Array,
    place: Array,
    num_rows: int,
    out: Array,
    *,
    device: Device,
    side: int = ALL,
) -> None:
    """Pool each bag of slots, as ``lookup.gather_pool`` pools bags of keys.

    Args:
        frequent: [H, D] float32 or float64, replicated rows.
        received: [N, D], same dtype.
        slots: [K] int32 or int64, table-major.
        offsets: [T * B + 1] int64; empty for one key a bag.
        key_weights: [K] float32; empty for none.
        mean: [T] bool: mean pooling, otherwise sum.
        place: [T] int64, where each table's vector goes.
        num_rows: B.
        out: [B or more, F, D] C-contiguous; other places are left alone.
        device: where the arrays lie.
        side: ``HERE``: only bags all of whose rows are replicated, an empty one among them; ``ELSEWHERE``: the others.
    """
    kernel = device.kernel(__name__, "pool_slots")
    operation = kernel if kernel is not None else pool_slots_reference
    operation(frequent, received, slots, offsets, key_weights, mean, place, num_rows, out, side)


def pool_slots_reference(
    frequent: Array,
    received: Array,
    slots: Array,
    offsets: Array,
    key_weights: Array,
    mean: Array,
    place: Array,
    num_rows: int,
    out: Array,
    side: int,
) -> None:
    """The plain form of ``pool_slots``."""
    if len(offsets) == 0:
        offsets = np.arange(len(place) * num_rows + 1)
    lengths = np.diff(offsets)
    bags = np.repeat(np.arange(len(lengths)), lengths)
    keys = slice(offsets[0], offsets[-1])
    slots, key_weights = slots[keys], key_weights[keys]
    pooled_here = np.bincount(bags, slots >= len(frequent), len(lengths)) == 0
    chosen = np.ones(len(lengths), np.bool_) if side == ALL else pooled_here == (side == HERE)
    used = chosen[bags]  # rows that have not arrived are not looked at
    bags, slots, key_weights = bags[used], slots[used], key_weights[used] if len(key_weights) else key_weights
    rows = np.concatenate([frequent, received])[slots]
    if len(key_weights):
        rows = rows * key_weights[:, None].astype(rows.dtype)
    pooled = np.zeros((len(lengths), out.shape[2]), out.dtype)
    np.add.at(pooled, bags, rows)
    divisors = np.where(np.repeat(mean, num_rows), np.maximum(1, lengths), 1).astype(out.dtype)
    table, row = np.nonzero(chosen.reshape(len(place), num_rows))
    out[row, place[table]] = (pooled / divisors[:, None])[chosen]


def sum_slots(
    gradients: Array,
    slots: Array,
    offsets: Array,
    key_weights: Array,
    mean: Array,
    place: Array,
    num_rows: int,
    compact: Array,
    frequent: int,
    frequent_sum: Array,
    received_sum: Array,
    *,
    device: Device,
    side: int = ALL,
    fresh: bool = True,
) -> None:
    """Sum each slot's gradient over its occurrences in this rank's bags, in their order.

    An occurrence contributes as to ``sparse_optim.update_rows``. The result does not depend on the number of threads.

    Args:
        gradients: [B or more, F, D] C-contiguous.
        slots: [K] int32 or int64, table-major; no two tables share one.
        offsets: [T * B + 1] int64; empty for one key a bag.
        key_weights: [K] float32; empty for none.
        mean: [T] bool.
        place: [T] int64, where each table's gradient lies.
        num_rows: B.
        compact: [H] int32, row of ``frequent_sum`` for each replicated row; empty: its own number.
        frequent: H.
        frequent_sum: [H or fewer, D], overwritten.
        received_sum: [N, D], overwritten.
        device: where the arrays lie.
        side: ``HERE``: only gradients of replicated rows; ``ELSEWHERE``: only the others.
        fresh: ``False``: the sums hold other tables' already, and these are added.
    """
    if fresh:
        frequent_sum.fill(0)
        received_sum.fill(0)
    if len(slots) == 0:
        return
    kernel = device.kernel(__name__, "add_slots")
    work = [None] * 4 if kernel is None else share_work(offsets, len(place), num_rows, device.threads)
    operation = kernel if kernel is not None else add_slots
    operation(
        gradients, slots, offsets, key_weights, mean, place, num_rows, compact, frequent, frequent_sum, received_sum,
        side, *work,
    )  # fmt: skip


def add_slots(
    gradients: Array,
    slots: Array,
    offsets: Array,
    key_weights: Array,
    mean: Array,
    place: Array,
    num_rows: int,
    compact: Array,
    frequent: int,
    frequent_sum: Array,
    received_sum: Array,
    side: int,
    tables: Array | None,  # noqa: ARG001 the compiled form's work
    parts: Array | None,  # noqa: ARG001
    of_parts: Array | None,  # noqa: ARG001
    worker_end: Array | None,  # noqa: ARG001
) -> None:
    """The plain form of the compiled ``add_slots``: ``sum_slots`` into sums that are 0."""
    if len(offsets) == 0:
        offsets = np.arange(len(place) * num_rows + 1)
    lengths = np.diff(offsets)
    bags = np.repeat(np.arange(len(lengths)), lengths)
    keys = slice(offsets[0], offsets[-1])
    slots, key_weights = slots[keys], key_weights[keys]
    table = bags // num_rows
    factor = np.ones(len(slots), gradients.dtype)
    if len(key_weights):
        factor *= key_weights
    factor /= np.where(mean[table], lengths[bags], 1).astype(gradients.dtype)
    rows = gradients[bags % num_rows, place[table]] * factor[:, None]
    own = slots < frequent
    if side != ELSEWHERE:
        targets = compact[slots[own]] if len(compact) else slots[own]
        np.add.at(frequent_sum, targets, rows[own])
    if side != HERE:
        np.add.at(received_sum, slots[~own] - frequent, rows[~own])


def mark_slots(slots: Array, frequent: int, marks: Array, *, device: Device) -> None:
    """Mark the replicated rows among the slots.

    Args:
        slots: [K] int32 or int64.
        frequent: H.
        marks: [H]; 1 is written for each row that is looked up.
        device: where the arrays lie.
    """
    kernel = device.kernel(__name__, "mark_slots")
    if kernel is not None:
        kernel(slots, frequent, marks)
        return
    marks[slots[slots < frequent]] = 1
