"""What a whole plan costs in a step: its tables put together. ``docs/plan.md`` derives the formulas.

Shapes: W ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from embedding.cost import TableCost, Workload
from embedding.exchange_cost import Shape
from embedding.links import LinkRates
from embedding.placement import AllToAll, Placement, TableSpec
from embedding.reduce_way import dense_is_faster

Floats = NDArray[np.float64]

HEADER_BYTES = 40
"""Of what a rank tells every other about its batch before it sends keys of pooled tables."""
ROW_HEADER_BYTES = 24
"""The same before it asks for rows."""
_FLAG_BYTES = 4
"""Of a captured step's note that a list ran over, which goes around where not all ranks count all rows."""
ROWS = 0
"""A group's number of column parts where rows travel, not pooled vectors."""
_GATHER_PASSES = 4
"""The same of a gradient that is brought side by side with others, and back."""
_RELAY_PASSES = 4
"""The same of a row that a lane relays: spread to who asked for it, and its gradients summed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """A whole plan's step.

    Attributes:
        inside: bytes between ranks of one node, all ranks together: keys, vectors, gradients, all_reduce.
        across: the same between nodes.
        messages_across: point-to-point messages between nodes.
        seconds: by part: keys, vectors, gradients, all_reduce, work.
    """

    inside: dict[str, float]
    across: dict[str, float]
    messages_across: int
    seconds: dict[str, float]

    @property
    def total_s(self) -> float:
        """Of exchange, look-up and update."""
        return sum(self.seconds.values())


def group_of(spec: TableSpec, placement: Placement) -> tuple[int, int]:
    """Tables of one group share their messages.

    Returns:
        ``ROWS``, or the column parts of a pooled table; and the keys of every bag where these are features of their
        own (``TableSpec.bag_keys``), else 0.
    """
    return (len(placement.owners) or 1) if placement.pooled else ROWS, spec.bag_keys or 0


class GroupLoad:
    """What the tables of one group send together.

    Attributes:
        keys: [W] bytes from one asker to each owner.
        vectors: [W] bytes from each owner to one asker.
        node: [W] bytes of gradients from one node to each owner, where they are summed inside it.
        travels: something is exchanged.
        once: each distinct row.
        touched: bytes of the group's all-reduces, the touched way.
        dense: the same the dense way.
    """

    def __init__(self, ranks: int) -> None:
        """Start empty."""
        self.keys, self.vectors, self.node = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
        self.travels, self.once, self.touched, self.dense = False, False, 0.0, 0.0

    def add(self, placement: Placement, share: Floats, cost: TableCost) -> None:
        """Add a table that is owned in these parts [W]."""
        self.touched += cost.reduce_touched
        self.dense += cost.reduce_dense
        if placement.kind != "replicated":
            self.travels, self.once = True, self.once or placement.deduplicate
            self.keys += share * cost.keys
            self.vectors += share * cost.vectors
            self.node += share * cost.node_gradients


GroupKey = tuple[int, int]
"""What ``group_of`` returns."""


def group_loads(
    specs: Sequence[TableSpec], placements: Sequence[Placement], costs: Sequence[TableCost], workload: Workload
) -> dict[GroupKey, GroupLoad]:
    """The loads of the groups; in captured steps all tables that are not cut by columns are one."""
    groups: dict[GroupKey, GroupLoad] = {}
    for spec, placement, cost in zip(specs, placements, costs, strict=True):
        group = (len(placement.owners), 0) if workload.captured else group_of(spec, placement)
        load = groups.setdefault(group, GroupLoad(workload.ranks))
        load.add(placement, owner_shares(placement, workload.ranks), cost)
    return groups


def dense_groups(groups: Mapping[GroupKey, GroupLoad], workload: Workload, links: LinkRates) -> frozenset[GroupKey]:
    """The groups whose replicated rows' gradients are summed the dense way."""
    start = {group: reduce_start_bytes(load.touched, workload, links) for group, load in groups.items()}
    return frozenset(group for group, load in groups.items() if dense_is_faster(load.touched, load.dense, start[group]))


def reduce_start_bytes(touched: float, workload: Workload, links: LinkRates) -> float:
    """What an all-reduce could send in the time that the touched way takes besides its bytes.

    Args:
        touched: its bytes.
        workload: of the step.
        links: rates.
    """
    shape = Shape(workload.ranks, workload.nodes)
    if workload.captured:
        return shape.reduced_in(gather_seconds(touched, links), links)
    return shape.reduce_start_bytes(links)


def gather_seconds(touched: float, links: LinkRates) -> float:
    """What it takes a captured step to bring so many bytes of gradients side by side, and their sums back."""
    return _GATHER_PASSES * touched / links.work.rows_bytes_per_s


class _Adding:
    """Adds up what a step sends."""

    def __init__(self, workload: Workload, links: LinkRates, all_to_all: AllToAll) -> None:
        self._work, self._links, self._mode = workload, links, all_to_all
        self._shape = Shape(workload.ranks, workload.nodes)
        self.seconds = dict.fromkeys(("keys", "vectors", "gradients", "all_reduce"), 0.0)
        self.inside, self.across, self.messages = dict(self.seconds), dict(self.seconds), 0
        self.relay_s = self.gather_s = 0.0

    def exchange(self, group: GroupKey, load: GroupLoad) -> None:
        """Keys there, vectors back, gradients there."""
        (parts, bag_keys), work, shape, links = group, self._work, self._shape, self._links
        mode = self._mode if parts == ROWS or work.captured else "flat"  # pooled vectors travel flat
        # Gradients that were rounded on the way cannot be summed there; those of captured steps are rounded after it.
        exact = work.captured or work.exchange_itemsize == work.itemsize
        summed = load.node if mode == "hierarchical" and shape.nodes > 1 and exact else None
        header, started = ROW_HEADER_BYTES, 2
        if parts != ROWS:
            header, started = HEADER_BYTES, 2 + (work.jagged and not bag_keys) + work.weighted
        phases = [("vectors", load.vectors, 1, None), ("gradients", load.vectors, 1, summed)]
        if not work.captured:
            phases.append(("keys", load.keys + header, started, None))
        for phase, size, count, crossing in phases:
            self.seconds[phase] += shape.seconds(size, links, mode, count=count, summed=crossing)
            self.inside[phase] += shape.inside_bytes(size) + shape.lane_bytes(size, mode)
            self.across[phase] += (
                shape.across_bytes(size) if crossing is None else float(crossing.sum()) * (shape.nodes - 1)
            )
            self.messages += count * shape.messages(mode)
        if mode == "hierarchical":
            relayed = shape.across_bytes(load.vectors) / work.ranks
            ids = shape.across_bytes(load.keys) / work.ranks / work.id_itemsize
            self.relay_s += _RELAY_PASSES * relayed / links.work.rows_bytes_per_s + ids * links.work.deduplicate_s
        if work.captured and (mode == "hierarchical" or load.once):
            self.all_reduce(_FLAG_BYTES, 1)

    def all_reduce(self, size: float, count: int) -> None:
        """All-reduces of ``size`` bytes together."""
        self.seconds["all_reduce"] += self._shape.reduce_seconds(size, self._links, count=count)
        near, far = self._shape.reduce_bytes(size)
        self.inside["all_reduce"] += near
        self.across["all_reduce"] += far


def step_cost(
    specs: Sequence[TableSpec],
    placements: Sequence[Placement],
    costs: Sequence[TableCost],
    workload: Workload,
    links: LinkRates,
    all_to_all: AllToAll,
    *,
    dense: Collection[GroupKey] | None = None,
) -> StepCost:
    """Put the tables of a plan together: tables of one exchange share its messages, its slowest rank decides.

    Args:
        specs: the tables.
        placements: of each table, owners decided.
        costs: of each table under it.
        workload: of the step.
        links: rates.
        all_to_all: of rows; pooled vectors travel flat.
        dense: groups whose replicated rows are summed the dense way; ``None``: where that is faster.
    """
    ranks = workload.ranks
    owner_s, asker_s = np.zeros(ranks), sum(cost.asker_s for cost in costs)
    for placement, cost in zip(placements, costs, strict=True):
        owner_s += owner_shares(placement, ranks) * cost.owner_s
    adding = _Adding(workload, links, all_to_all)
    if ranks > 1:
        groups = group_loads(specs, placements, costs, workload)
        if dense is None:
            dense = dense_groups(groups, workload, links)
        for group, load in groups.items():
            if load.travels:
                adding.exchange(group, load)
            if load.touched and group in dense:
                adding.all_reduce(load.dense, 1)
            elif load.touched:
                adding.all_reduce(load.touched, 1 if workload.captured else 2)
                adding.gather_s += gather_seconds(load.touched, links) * workload.captured
    seconds = adding.seconds
    # Work beside an exchange counts as far as it lasts longer.
    beside = (
        ("vectors", sum(cost.beside_vectors_s for cost in costs)),
        ("gradients", sum(cost.beside_gradients_s for cost in costs)),
    )
    rest = sum(max(0.0, work - seconds[name]) for name, work in beside)
    seconds["work"] = asker_s + adding.relay_s + adding.gather_s + float(owner_s.max()) + rest
    return StepCost(inside=adding.inside, across=adding.across, messages_across=adding.messages, seconds=seconds)


def balanced_seconds(cost: TableCost, workload: Workload, links: LinkRates) -> float:
    """What one table adds to a step whose owners are evenly loaded: bytes and work, no start-up of messages."""
    if workload.ranks == 1:
        return cost.asker_s + cost.owner_s
    shape = Shape(workload.ranks, workload.nodes)
    started = replace(
        links,
        **{name: replace(getattr(links, name), latency_s=0.0) for name in ("inside", "across", "inside_reduce",
                                                                           "across_reduce")},
    )  # fmt: skip
    load = np.full(workload.ranks, (cost.keys + 2 * cost.vectors) / workload.ranks)
    reduced = cost.reduce_touched
    if workload.captured:
        reduced = min(cost.reduce_dense, reduced + reduce_start_bytes(reduced, workload, links))
    exchange = shape.seconds(load, started, "flat") + shape.reduce_seconds(reduced, started)
    return exchange + cost.asker_s + cost.owner_s / workload.ranks


def owner_shares(placement: Placement, ranks: int) -> Floats:
    """[W] part of a table's traffic that each rank answers as owner."""
    if placement.kind == "table_wise":
        share = np.zeros(ranks)
        share[placement.owner] = 1.0
        return share
    if placement.kind == "column_wise":
        return np.bincount(placement.owners, minlength=ranks) / len(placement.owners)
    return np.full(ranks, 1.0 / ranks)
