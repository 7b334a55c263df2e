"""The search for the fastest plan: every table's options are costed, then put together.

Costs of tables add up but for three things: an exchange takes as long as its slowest rank, its start-up is paid once
for all tables in it, and memory is shared. So the search first takes each table's best option among some kinds alone
(a price on memory makes the choices smaller until they fit), costs those plans whole, and then improves the best one
table by table. It depends on nothing but its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from embedding.cost import TableCost, TableDemand, Workload
from embedding.links import LinkRates
from embedding.placement import AllToAll, Placement, Plan, TableSpec, column_part_bytes
from embedding.step_cost import StepCost, balanced_seconds, step_cost

_PRICES = (0.0, *(float(price) for price in np.geomspace(1e-16, 1e-4, 49)))
"""Seconds a byte: what a plan gives for less memory, rising until it fits."""
_BETTER = 0.999
"""A change must gain this much, or rounding would decide."""
_ROUNDS = 3
_NEAR_OPTIONS = 4
_NEAR_PLANS = 2.0
"""Plans of other families are offered where they are predicted to take at most so many times as long."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to place one table.

    Attributes:
        placement: owners not decided yet.
        cost: of a step.
        seconds: what it adds to a balanced plan.
        held: bytes that it puts on a rank on average.
    """

    placement: Placement
    cost: TableCost
    seconds: float
    held: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan with its cost."""

    plan: Plan
    options: tuple[Option, ...]
    cost: StepCost


Options: TypeAlias = Sequence[Sequence[Option]]
"""Of each table."""


def family_of(plan: Plan) -> tuple[AllToAll, bool]:
    """The exchange, and whether rows are replicated: a model may be wrong about one of them and right about the other.

    About placements of one family it errs alike.
    """
    return plan.all_to_all, any(placement.threshold for placement in plan.placements)


class Search:
    """Everything that the plans of one model share."""

    def __init__(
        self,
        specs: Sequence[TableSpec],
        demands: Sequence[TableDemand],
        options: Sequence[Sequence[Placement]],
        *,
        workload: Workload,
        links: LinkRates,
        table_bytes: Sequence[int],
        gradient_bytes: Sequence[int],
        memory_limit_bytes: int | None,
        all_to_all: Sequence[AllToAll],
    ) -> None:
        """Cost every option.

        Args:
            specs: the tables.
            demands: of each.
            options: placements that each may have.
            workload: a step.
            links: rates.
            table_bytes: of each whole table.
            gradient_bytes: of a replicated row of each.
            memory_limit_bytes: of a rank; ``None``: no limit.
            all_to_all: what may be chosen.
        """
        self.specs, self.workload, self.links = tuple(specs), workload, links
        self._table_bytes, self._gradient_bytes = tuple(table_bytes), tuple(gradient_bytes)
        self._limit, self._modes = memory_limit_bytes, tuple(all_to_all)
        self.options = [
            [self._option(table, demand, placement) for placement in allowed]
            for table, (demand, allowed) in enumerate(zip(demands, options, strict=True))
        ]

    def best(self, starts: Iterable[tuple[str, Callable[[Option], bool]]]) -> tuple[list[Candidate], dict[str, float]]:
        """The fastest plan found, then the fastest of other families that come near it; seconds of what fits.

        Args:
            starts: names, and which options a starting plan may use; a table that has none of them may use all.

        Returns:
            Plans, by predicted time, none where nothing fits; and the seconds of every starting plan.
        """
        found: list[tuple[Candidate, Options]] = []
        seconds: dict[str, float] = {}
        for name, allowed in starts:
            own: Options = [[o for o in options if allowed(o)] or options for options in self.options]
            fitting = [c for mode in self._modes if (c := self.within_memory(own, (mode,))) is not None]
            found += [(candidate, own) for candidate in fitting]
            if fitting:
                seconds[name] = min(candidate.cost.total_s for candidate in fitting)
        if not found:
            return [], seconds
        found.sort(key=lambda pair: pair[0].cost.total_s)
        chosen = {family_of(best.plan): best for best in [self._improved(found[0][0], self.options, self._modes)]}
        for candidate, own in found:
            near = candidate.cost.total_s < _NEAR_PLANS * found[0][0].cost.total_s
            if near and family_of(candidate.plan) not in chosen:
                better = self._improved(candidate, own, (candidate.plan.all_to_all,))
                chosen.setdefault(family_of(better.plan), better)
        return sorted(chosen.values(), key=lambda candidate: candidate.cost.total_s), seconds

    def within_memory(self, options: Options, modes: Sequence[AllToAll]) -> Candidate | None:
        """The first choice of options that fits the memory as its price rises; ``None``: none does."""
        tried: set[tuple[Option, ...]] = set()
        for price in _PRICES if self._limit is not None else _PRICES[:1]:
            chosen = tuple(min(own, key=lambda o: o.seconds + price * o.held) for own in options)
            if chosen in tried:
                continue
            tried.add(chosen)
            candidate = self.assigned(chosen, modes)
            if candidate is not None:
                return candidate
        return None

    def smallest(self) -> Plan:
        """The plan that holds least, fit or not."""
        # Of what holds as much on average, rows lie evenly, and a whole table on one rank.
        least = [min(own, key=lambda o: (o.held, o.placement.kind == "table_wise")) for own in self.options]
        return self._owned(tuple(least), by_size=True)

    def assigned(self, options: tuple[Option, ...], modes: Sequence[AllToAll]) -> Candidate | None:
        """Decide owners and costs; ``None`` where a rank cannot hold its part."""
        for by_size in (False, True):  # evenly by time alone where memory allows it
            plan = self._owned(options, by_size=by_size)
            if self._fits(plan):
                costs = [option.cost for option in options]
                steps = {
                    mode: step_cost(self.specs, plan.placements, costs, self.workload, self.links, mode)
                    for mode in modes
                }
                mode = min(modes, key=lambda name: steps[name].total_s)
                return Candidate(replace(plan, all_to_all=mode), options, steps[mode])
        return None

    def _improved(self, best: Candidate, options: Options, modes: Sequence[AllToAll]) -> Candidate:
        """Change one table's option at a time as long as that helps."""
        for _ in range(_ROUNDS):
            before = best
            for table, own in enumerate(options):
                for option in near_options(own, best.options[table]):
                    candidate = self.assigned((*best.options[:table], option, *best.options[table + 1 :]), modes)
                    if candidate is not None and candidate.cost.total_s < _BETTER * best.cost.total_s:
                        best = candidate
            if best is before:
                break
        return best

    def _option(self, table: int, demand: TableDemand, placement: Placement) -> Option:
        cost = demand.cost(placement)
        ranks = self.workload.ranks
        row_bytes = self._table_bytes[table] // self.specs[table].rows
        held = (
            placement.threshold * (row_bytes + self._gradient_bytes[table])
            + row_bytes * (self.specs[table].rows - placement.threshold) / ranks
        )
        if placement.kind == "column_wise":
            parts = len(placement.owners)
            held = self.specs[table].rows * column_part_bytes(row_bytes, parts) * parts / ranks
        return Option(placement, cost, balanced_seconds(cost, self.workload, self.links), held)

    def _owned(self, options: tuple[Option, ...], *, by_size: bool) -> Plan:
        """Spread whole tables and column parts over the ranks."""
        items: list[tuple[int, float, float]] = []
        for table, option in enumerate(options):
            parts = {"table_wise": 1, "column_wise": len(option.placement.owners)}.get(option.placement.kind, 0)
            size = option.held * self.workload.ranks
            if not parts:
                continue
            items += [(table, option.seconds / parts, size / parts if by_size else 0.0)] * parts
        owners = spread(
            [item[1] for item in items], [item[2] for item in items], self.workload.ranks, apart=[i[0] for i in items]
        )
        owners_of: list[list[int]] = [[] for _ in options]
        for (table, _, _), owner in zip(items, owners, strict=True):
            owners_of[table].append(owner)
        placements = []
        for option, own in zip(options, owners_of, strict=True):
            placement = option.placement
            if placement.kind == "table_wise":
                placement = replace(placement, owner=own[0])
            elif placement.kind == "column_wise":
                placement = replace(placement, owners=tuple(own))
            placements.append(placement)
        return Plan(
            specs=self.specs,
            placements=tuple(placements),
            ranks=self.workload.ranks,
            nodes=self.workload.nodes,
            table_bytes=self._table_bytes,
            gradient_bytes=self._gradient_bytes,
        )

    def _fits(self, plan: Plan) -> bool:
        if self._limit is None:
            return True
        return int(plan.memory().max()) <= self._limit


def near_options(options: Sequence[Option], present: Option) -> list[Option]:
    """The fastest option of each kind, and those whose thresholds lie next to the present one."""
    best: dict[tuple[str, bool], Option] = {}
    for option in options:
        kind = (option.placement.kind, option.placement.deduplicate)
        if kind not in best or option.seconds < best[kind].seconds:
            best[kind] = option
    same = [
        option
        for option in options
        if option.placement.kind == "hybrid" and option.placement.deduplicate == present.placement.deduplicate
    ]
    same.sort(key=lambda option: abs(np.log(option.placement.threshold / max(1, present.placement.threshold))))
    return [o for o in dict.fromkeys([*best.values(), *same[:_NEAR_OPTIONS]]) if o != present]


def spread(
    costs: Sequence[float], sizes: Sequence[float], ranks: int, *, apart: Sequence[int] | None = None
) -> list[int]:
    """The rank of each item, so that both totals spread evenly.

    Greedy: the item with the largest share of either total comes first and goes to the rank whose larger share stays
    smallest (ties: smaller sum of shares, then lower rank). The result depends on nothing but the arguments.

    Args:
        costs: of each item.
        sizes: of each item.
        ranks: W.
        apart: [items] group of each item, such as the table of a column part: items of one group go to different
            ranks as long as there are any.
    """
    total_cost, total_size = float(sum(costs)) or 1.0, float(sum(sizes)) or 1.0
    shares = [(cost / total_cost, size / total_size) for cost, size in zip(costs, sizes, strict=True)]
    loads = np.zeros((ranks, 2))
    number = np.arange(ranks)
    groups = range(len(costs)) if apart is None else apart
    taken: dict[int, list[int]] = {}
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-max(shares[i]), -sum(shares[i]), i)):
        after = loads + shares[item]
        used = taken.setdefault(groups[item], [])
        crowded = np.bincount(used, minlength=ranks)
        owner = int(np.lexsort((number, after.sum(axis=1), after.max(axis=1), crowded))[0])
        owners[item] = owner
        used.append(owner)
        loads[owner] = after[owner]
    return owners


def _kinds(*allowed: str, deduplicate: bool | None = None) -> Callable[[Option], bool]:
    def is_allowed(option: Option) -> bool:
        placement = option.placement
        return placement.kind in allowed and (
            deduplicate is None or placement.kind == "replicated" or placement.deduplicate == deduplicate
        )

    return is_allowed


STARTS: Sequence[tuple[str, Callable[[Option], bool]]] = (
    ("table_wise", _kinds("table_wise", deduplicate=False)),
    ("table_wise de-duplicated", _kinds("table_wise", deduplicate=True)),
    ("row_wise", _kinds("row_wise", deduplicate=False)),
    ("row_wise de-duplicated", _kinds("row_wise", deduplicate=True)),
    ("column_wise", _kinds("column_wise")),
    ("replicated", _kinds("replicated")),
    ("hybrid", _kinds("hybrid", "replicated", "row_wise", deduplicate=False)),
    ("hybrid de-duplicated", _kinds("hybrid", "replicated", "row_wise", deduplicate=True)),
    ("table_wise and replicated", _kinds("table_wise", "replicated", deduplicate=False)),
    ("any rows", _kinds("hybrid", "replicated", "row_wise")),
    ("any", lambda option: True),  # noqa: ARG005
)
"""Plans that a search starts from, and that its result is compared with."""
