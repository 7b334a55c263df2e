"""The byte formula fed with a batch's actual keys: what every rank hands to ``Comm`` for every other.

Shapes: W ranks, T tables, K keys of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embedding.all_reduce import part_multiple
from embedding.column_groups import deduplicates
from embedding.cost import LENGTH_BYTES
from embedding.jagged import Jagged
from embedding.placement import Placement, Plan, node_of_ranks
from embedding.reduce_way import ReduceWay, ring_bytes
from embedding.step_cost import HEADER_BYTES, ROW_HEADER_BYTES, ROWS, group_of

Bytes = NDArray[np.int64]
_WEIGHT_BYTES = 4
_FLAG_BYTES = 4


def batch_bytes(
    plan: Plan, batches: Sequence[Jagged], *, itemsize: int, exchange_itemsize: int | None = None
) -> dict[str, Bytes]:
    """Bytes of one step of a flat exchange.

    Args:
        plan: where rows lie.
        batches: [W] every rank's keys.
        itemsize: bytes of a number of a table.
        exchange_itemsize: bytes of a number of a vector between ranks; ``None``: ``itemsize``.

    Returns:
        By exchange (``input_dist``, ``output_dist``, ``grad_dist``): [W, W] from rank to rank, the diagonal 0; and
        ``all_reduce`` [W]: what each rank sends around the rings.
    """
    ranks = plan.ranks
    width = exchange_itemsize or itemsize
    sent = {name: np.zeros((ranks, ranks), np.int64) for name in ("input_dist", "output_dist")}
    reduced = 0
    if ranks > 1:
        jagged = any(batch.offsets is not None for batch in batches)
        weighted = any(batch.weights is not None for batch in batches)
        groups = [group_of(spec, placement) for spec, placement in zip(plan.specs, plan.placements, strict=True)]
        active = {group for group, p in zip(groups, plan.placements, strict=True) if p.kind != "replicated"}
        sent["input_dist"] += sum(ROW_HEADER_BYTES if parts == ROWS else HEADER_BYTES for parts, _ in active)
        for table, placement in enumerate(plan.placements):
            if placement.pooled:
                _add_pooled(sent, plan, table, batches, width, jagged=jagged, weighted=weighted)
            else:
                rows = sum(s.rows for s, group in zip(plan.specs, groups, strict=True) if group == groups[table])
                _add_rows(sent, plan, table, batches, width, 4 if rows < 2**31 else 8)
        for kind in {group for group in groups if group[0] == ROWS}:
            tables = [table for table, group in enumerate(groups) if group == kind]
            reduced += sum(ring_bytes(size, ranks) for size in _reduced(plan, tables, batches, itemsize))
    for matrix in sent.values():
        np.fill_diagonal(matrix, 0)
    return {**sent, "grad_dist": sent["output_dist"].T.copy(), "all_reduce": np.full(ranks, reduced)}


def capacity_bytes(
    plan: Plan,
    capacities: Sequence[int],
    *,
    exchange_itemsize: int,
    distinct: Sequence[int] | None = None,
    once: Sequence[int] | None = None,
    touched: int | None = None,
) -> dict[str, Bytes]:
    """Bytes of one step over lists of fixed capacity (``captured_exchange``), whatever the batch's keys are.

    By node (``plan.all_to_all``), what a rank hands to both communicators counts. Outward it gives each mate of its
    node a list for each node, and to each other node what its own node has for the ranks of its lane. Inward it gives
    each mate the lists of that lane's owners, and to each owner of its own lane elsewhere the node's distinct rows and
    one of padding. De-duplicated, every pair of ranks has a list of distinct rows and one of padding.

    Args:
        plan: where rows lie.
        capacities: [W] C_o, most rows that each rank sends to one other.
        exchange_itemsize: bytes of a number of a vector between ranks; replicated rows' gradients are float32.
        distinct: [W] most distinct rows that a node asks of each rank; ``None``: as many as lists have room for.
        once: [W] the same of a rank, where rows are de-duplicated.
        touched: R, replicated rows whose gradients are summed; ``None``: all.

    Returns:
        By exchange [W], what each rank sends (keys do not travel); ``all_reduce`` with the flag of lists that ran
        over, where rows go by node or are de-duplicated; and ``across`` [W], what of the exchanges goes to other nodes.
    """
    size = np.asarray(capacities, np.int64)
    node = np.array(node_of_ranks(plan.ranks, plan.nodes))
    same = node[:, None] == node[None, :]
    replicated = sum(placement.threshold for placement in plan.placements) if touched is None else touched
    reduced = ring_bytes(4 * replicated * plan.specs[0].dim, plan.ranks)
    if deduplicates(plan):
        size = (size if once is None else np.minimum(np.asarray(once, np.int64), size)) + 1
    if deduplicates(plan) or plan.all_to_all == "hierarchical":
        reduced += ring_bytes(_FLAG_BYTES, plan.ranks)
    if plan.all_to_all == "hierarchical":
        locals_ = plan.ranks // plan.nodes
        rooms = locals_ * size if distinct is None else np.minimum(np.asarray(distinct, np.int64), locals_ * size)
        lane = np.arange(plan.ranks) % locals_
        in_lane = lane[:, None] == lane[None, :]
        outward, inward = (plan.nodes - 1) * (same @ size), (~same & in_lane) @ (rooms + 1)
        outward_inside, inward_inside = (locals_ - 1) * plan.nodes * size, ~in_lane @ size
    else:
        outward, inward = (~same).sum(axis=1) * size, ~same @ size
        outward_inside, inward_inside = (same.sum(axis=1) - 1) * size, same @ size - size
    row_bytes = plan.specs[0].dim * exchange_itemsize
    return {
        "input_dist": np.zeros(plan.ranks, np.int64),
        "output_dist": (outward + outward_inside) * row_bytes,
        "grad_dist": (inward + inward_inside) * row_bytes,
        "all_reduce": np.full(plan.ranks, reduced),
        "across": (outward + inward) * row_bytes,
    }


def _add_pooled(
    sent: dict[str, Bytes],
    plan: Plan,
    table: int,
    batches: Sequence[Jagged],
    width: int,
    *,
    jagged: bool,
    weighted: bool,
) -> None:
    spec, placement = plan.specs[table], plan.placements[table]
    owners = placement.owners or (placement.owner,)
    for rank, batch in enumerate(batches):
        keys = len(keys_of(batch, table)) * (batch.keys.itemsize + _WEIGHT_BYTES * weighted)
        keys += LENGTH_BYTES * batch.num_rows * (jagged and spec.bag_keys is None)
        for owner in owners:
            sent["input_dist"][rank, owner] += keys
            sent["output_dist"][owner, rank] += batch.num_rows * spec.num_vectors * (spec.dim // len(owners)) * width


def _add_rows(
    sent: dict[str, Bytes], plan: Plan, table: int, batches: Sequence[Jagged], width: int, id_bytes: int
) -> None:
    for rank, batch in enumerate(batches):
        rows = asked_rows(keys_of(batch, table), plan.placements[table], plan.ranks)
        sent["input_dist"][rank] += rows * id_bytes
        sent["output_dist"][:, rank] += rows * plan.specs[table].dim * width


def _reduced(plan: Plan, tables: Sequence[int], batches: Sequence[Jagged], itemsize: int) -> tuple[int, int]:
    """Bytes of a group's all-reduces: marks of all replicated rows and gradients of touched ones, or of all."""
    dim, global_rows = plan.specs[tables[0]].dim, sum(batch.num_rows for batch in batches)
    multiple = part_multiple(node_of_ranks(plan.ranks, plan.nodes))
    marks = sum(plan.placements[table].threshold for table in tables)
    if ReduceWay.of(plan, tables).is_dense(marks, global_rows, dim, itemsize):
        return 0, -(-marks * (dim + 1) // multiple) * multiple * itemsize
    gradients = 0
    for table in tables:
        placement = plan.placements[table]
        if placement.threshold:
            touched = np.unique(np.concatenate([keys_of(batch, table) for batch in batches]))
            gradients += int(np.searchsorted(touched, placement.threshold)) * dim
    return marks, -(-gradients // multiple) * multiple * itemsize


def keys_of(batch: Jagged, table: int) -> NDArray[np.int64]:
    """The keys of one table."""
    begin, end = table * batch.num_rows, (table + 1) * batch.num_rows
    if batch.offsets is not None:
        begin, end = int(batch.offsets[begin]), int(batch.offsets[end])
    keys: NDArray[np.int64] = batch.keys[begin:end]
    return keys


def asked_rows(keys: NDArray[np.int64], placement: Placement, ranks: int) -> NDArray[np.int64]:
    """[W] rows that one rank asks of each owner for its keys of a table."""
    rows = keys[keys >= placement.threshold].astype(np.int64) - placement.threshold
    if placement.deduplicate:
        rows = np.unique(rows)
    if placement.kind == "table_wise":
        counts = np.zeros(ranks, np.int64)
        counts[placement.owner] = len(rows)
        return counts
    return np.bincount(rows % ranks, minlength=ranks)


def split_links(matrix: Bytes, node_of: Sequence[int]) -> tuple[int, int]:
    """Sums of a [W, W] matrix inside nodes and between them."""
    same = np.equal.outer(np.asarray(node_of), np.asarray(node_of))
    return int(matrix[same].sum()), int(matrix[~same].sum())
