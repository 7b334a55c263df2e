"""Which rank holds which rows of which table: the choice of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.errors import ConfigError
from embedding.cost import TableDemand, Workload
from embedding.frequency import Frequency, candidate_thresholds, hugectr_threshold
from embedding.links import DEFAULT, LinkRates
from embedding.placement import (
    COLUMN_MULTIPLE,
    AllToAll,
    Kind,
    Placement,
    Plan,
    Pooling,
    Prediction,
    TableSpec,
    node_of_ranks,
    owned_rows,
    plan_from_values,
)
from embedding.plan_search import STARTS, Candidate, Search, spread
from embedding.sparse_optim import bytes_per_row
from embedding.step_cost import dense_groups, group_loads, reduce_start_bytes, step_cost

__all__ = [
    "Forced",
    "Kind",
    "Placement",
    "Plan",
    "Pooling",
    "Prediction",
    "TableSpec",
    "check_memory",
    "hugectr_threshold",
    "make_plan",
    "make_plans",
    "node_of_ranks",
    "owned_rows",
    "plan_from_values",
    "plan_table_wise",
]


def plan_table_wise(
    specs: Sequence[TableSpec],
    ranks: int,
    *,
    bytes_per_row: Sequence[int] | None = None,
    memory_limit_bytes: int | None = None,
) -> Plan:
    """Give every table to one rank, so that look-up cost and memory both spread evenly (``spread``).

    Args:
        specs: the tables in manifest order.
        ranks: W.
        bytes_per_row: memory of a row of each table with its optimiser state; ``None``: 4 bytes a number.
        memory_limit_bytes: what one rank may hold.

    Raises:
        ConfigError: there are no ranks, or a rank would hold more than the limit.
    """
    if ranks < 1:
        raise ConfigError(f"ranks: {ranks}; at least 1 is needed")
    row_bytes = [4 * spec.dim for spec in specs] if bytes_per_row is None else list(bytes_per_row)
    sizes = [spec.rows * width for spec, width in zip(specs, row_bytes, strict=True)]
    owners = spread([spec.lookup_cost for spec in specs], sizes, ranks)
    plan = Plan(
        specs=tuple(specs),
        placements=tuple(Placement(kind="table_wise", owner=owner) for owner in owners),
        ranks=ranks,
        table_bytes=tuple(sizes),
    )
    if memory_limit_bytes is not None:
        check_memory(plan, memory_limit_bytes)
    return plan


def check_memory(plan: Plan, limit: int) -> None:
    """Check what every rank of a plan would hold.

    Raises:
        ConfigError: a rank would hold more than ``limit`` bytes; names its largest table, the need and the remedy.
    """
    for rank, held in enumerate(plan.memory().tolist()):
        if held > limit:
            parts = [plan.held_bytes(table, rank) for table in range(len(plan.specs))]
            largest = max(range(len(parts)), key=parts.__getitem__)
            raise ConfigError(
                f"rank {rank}: {_mib(held)} MiB of tables (the largest is '{plan.specs[largest].name}' with "
                f"{_mib(parts[largest])} MiB) exceed {_mib(limit)} MiB; use more ranks, a smaller "
                f"embedding_dim, an optimiser with less state{_remedy(plan, largest)}, or raise "
                "embedding.memory_limit_mib"
            )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _remedy(plan: Plan, table: int) -> str:
    placement = plan.placements[table]
    if placement.kind == "row_wise" or plan.ranks == 1:
        return ""
    lower = ", a lower threshold" if placement.kind == "hybrid" else ""
    return f"{lower}, placement row_wise for '{plan.specs[table].name}'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forced:
    """What the config says of one table.

    Attributes:
        kind: ``None``: the plan chooses.
        threshold: of ``hybrid``; ``None``: the plan chooses. 0 means ``row_wise``, all rows ``replicated``.
        deduplicate: ``None``: the plan chooses.
    """

    kind: Kind | None = None
    threshold: int | None = None
    deduplicate: bool | None = None


def make_plan(specs: Sequence[TableSpec], ranks: int, nodes: int = 1, **arguments: Any) -> Plan:
    """The plan that is predicted to be fastest: the first of ``make_plans``."""
    return make_plans(specs, ranks, nodes, **arguments)[0]


def make_plans(
    specs: Sequence[TableSpec],
    ranks: int,
    nodes: int = 1,
    *,
    batch_size: int,
    optimizer: OptimizerConfig,
    placements: Mapping[str, Forced | Kind] | None = None,
    frequencies: Mapping[str, Frequency | np.ndarray[Any, Any]] | None = None,
    hotness: Mapping[str, float] | None = None,
    itemsize: int = 4,
    exchange_itemsize: int | None = None,
    key_itemsize: int = 4,
    jagged: bool = False,
    weighted: bool = False,
    links: LinkRates = DEFAULT,
    memory_limit_bytes: int | None = None,
    deduplicate: Literal["auto"] | bool = "auto",
    all_to_all: Literal["auto"] | AllToAll = "auto",
    captured: bool = False,
) -> list[Plan]:
    """Place every table where a step is predicted to be fastest and every rank can hold its part.

    The result depends on nothing but the arguments; ``plans_on_first_rank`` makes it one and the same on all ranks.

    Args:
        specs: the tables in manifest order.
        ranks: W.
        nodes: contiguous ranks share one of so many.
        batch_size: G.
        optimizer: of the tables; decides their state's memory.
        placements: what is forced, by table; other tables are placed freely.
        frequencies: of rows, by table: counts by row number, or binned. A table without any counts as looked up
            evenly.
        hotness: mean keys of a bag, by table; left out: ``spec.hotness``.
        itemsize: bytes of a number of a table.
        exchange_itemsize: bytes of a number of a vector between ranks; ``None``: ``itemsize``.
        key_itemsize: bytes of a key.
        jagged: bags have different lengths.
        weighted: keys have weights.
        links: rates.
        memory_limit_bytes: what a rank may hold of tables, state and gradients of replicated rows.
        deduplicate: of tables whose ``placements`` say nothing about it.
        all_to_all: ``auto``: whichever is predicted to be faster.
        captured: steps have fixed sizes (``captured_exchange``), and no table is cut by columns but where it is
            forced, as rows travel in any case.

    Returns:
        The plan that is predicted to be fastest, then plans of other families (another exchange, other kinds) that
        are predicted to be nearly as fast, by predicted time.

    Raises:
        ConfigError: a forced placement cannot be, or no plan fits the memory.
    """
    if ranks < 1 or not 1 <= nodes <= ranks or batch_size < 1:
        what = f"plan: {ranks} ranks on {nodes} nodes, batch {batch_size}"
        raise ConfigError(f"{what}; each is at least 1, nodes <= ranks")
    given = (placements or {}).items()
    forced = {name: rule if isinstance(rule, Forced) else Forced(kind=rule) for name, rule in given}
    if unknown := sorted(set(forced) - {spec.name for spec in specs}):
        raise ConfigError(f"placement of table '{unknown[0]}': there is no such table; name one of the data set's")
    workload = Workload(
        ranks=ranks,
        nodes=nodes,
        batch_size=batch_size,
        itemsize=itemsize,
        exchange_itemsize=exchange_itemsize or itemsize,
        key_itemsize=key_itemsize,
        id_itemsize=4 if sum(spec.rows for spec in specs) < 2**31 else 8,
        jagged=jagged,
        weighted=weighted,
        captured=captured,
    )
    demands = [
        TableDemand(spec, _frequency(spec, frequencies), (hotness or {}).get(spec.name, spec.hotness), workload, links)
        for spec in specs
    ]
    rule = (None if deduplicate == "auto" else deduplicate, ranks, optimizer)
    options = [allowed_placements(spec, forced.get(spec.name, Forced()), *rule, captured=captured) for spec in specs]
    search = Search(
        specs,
        demands,
        options,
        workload=workload,
        links=links,
        table_bytes=[spec.rows * bytes_per_row(optimizer, spec.dim, itemsize) for spec in specs],
        gradient_bytes=[gradient_row_bytes(spec.dim, itemsize) for spec in specs],
        memory_limit_bytes=memory_limit_bytes,
        all_to_all=(all_to_all,) if all_to_all != "auto" else ("flat", "hierarchical") if nodes > 1 else ("flat",),
    )
    found, seconds = search.best(STARTS)
    if not found:
        smallest = search.smallest()
        assert memory_limit_bytes is not None
        check_memory(smallest, memory_limit_bytes)
        raise ConfigError(
            f"plan: no placement of these tables fits {memory_limit_bytes / 2**20:.0f} MiB a rank; use more ranks or "
            "raise embedding.memory_limit_mib"
        )
    return [_predicted(candidate, workload, links, seconds) for candidate in found]


def allowed_placements(
    spec: TableSpec,
    forced: Forced,
    deduplicate: bool | None,
    ranks: int,
    optimizer: OptimizerConfig,
    *,
    captured: bool = False,
) -> list[Placement]:
    """The placements that one table may have, owners not decided.

    Args:
        spec: the table.
        forced: what the config says of it.
        deduplicate: what the config says of all.
        ranks: W.
        optimizer: of the tables.
        captured: as ``make_plans`` has it.

    Raises:
        ConfigError: the forced placement cannot be.
    """
    if forced.threshold is not None and forced.kind not in (None, "hybrid"):
        raise ConfigError(f"table '{spec.name}': threshold {forced.threshold} goes with hybrid, not {forced.kind}")
    if forced.threshold is not None and not 0 <= forced.threshold <= spec.rows:
        raise ConfigError(
            f"table '{spec.name}': threshold {forced.threshold} lies outside its {spec.rows} rows; "
            f"set 0 .. {spec.rows}, or leave it out"
        )
    rule = forced.deduplicate if forced.deduplicate is not None else deduplicate
    switches = (False, True) if rule is None else (rule,)
    kind, threshold = forced.kind, forced.threshold
    if kind is None and ranks == 1:
        return [Placement(kind="table_wise")]  # nothing to exchange, nothing to choose
    found: list[Placement] = []
    if kind == "column_wise" or (kind is None and not captured):
        multiple = COLUMN_MULTIPLE if captured else 1
        found += _column_wise(spec, ranks, optimizer, multiple, forced=kind is not None)
    if kind in (None, "replicated"):
        found.append(Placement(kind="replicated", threshold=spec.rows))
    thresholds = candidate_thresholds(spec.rows) if threshold is None else [threshold]
    for switch in switches:
        if kind in (None, "table_wise"):
            found.append(Placement(kind="table_wise", deduplicate=switch))
        if kind in (None, "row_wise"):
            found.append(Placement(kind="row_wise", deduplicate=switch))
        if kind in (None, "hybrid"):
            found += [_at_threshold(spec, rows, switch) for rows in thresholds or [spec.rows]]
    return list(dict.fromkeys(found))


def _at_threshold(spec: TableSpec, threshold: int, deduplicate: bool) -> Placement:
    """Hybrid, or what it is at its ends; a table of one row is hybrid at an end only."""
    if threshold == 0:
        return Placement(kind="row_wise", deduplicate=deduplicate)
    if threshold == spec.rows:
        return Placement(kind="replicated", threshold=threshold)
    return Placement(kind="hybrid", threshold=threshold, deduplicate=deduplicate)


def _column_wise(
    spec: TableSpec, ranks: int, optimizer: OptimizerConfig, multiple: int, *, forced: bool
) -> list[Placement]:
    """Columns cut into as many parts as there are ranks, or the most that divide them."""
    if optimizer.kind == "rowwise_adagrad":
        if forced:
            raise ConfigError(
                f"table '{spec.name}': column_wise does not go with 'rowwise_adagrad', whose step needs the mean over "
                "a whole row, and no owner of columns sees one; use 'adagrad' or another placement"
            )
        return []
    cuts = range(1, min(ranks, spec.dim) + 1)
    parts = max((count for count in cuts if spec.dim % (count * multiple) == 0), default=1)
    if parts == 1 and ranks > 1:
        if forced:
            raise ConfigError(
                f"table '{spec.name}': column_wise cannot cut dim {spec.dim} into equal parts"
                f"{f' of a multiple of {multiple} columns' * (multiple > 1)} for up to {ranks} ranks; use row_wise, "
                "or a dim with a divisor among them"
            )
        return []
    return [Placement(kind="column_wise", owners=tuple(range(parts)))]


def gradient_row_bytes(dim: int, itemsize: int) -> int:
    """Memory of a replicated row besides weight and state: its summed gradient with room to grow, place and marks."""
    return dim * itemsize * 5 // 4 + 8


def _frequency(spec: TableSpec, given: Mapping[str, Frequency | np.ndarray[Any, Any]] | None) -> Frequency:
    found = (given or {}).get(spec.name)
    if found is None:
        return Frequency.power_law(spec.rows, 0.0)
    if isinstance(found, Frequency):
        if found.rows != spec.rows:
            raise ConfigError(f"table '{spec.name}': frequencies of {found.rows} rows, but it has {spec.rows}")
        return found
    return Frequency.from_counts(found, spec.rows)


def _predicted(best: Candidate, workload: Workload, links: LinkRates, seconds: Mapping[str, float]) -> Plan:
    plan = best.plan
    groups = group_loads(plan.specs, plan.placements, [option.cost for option in best.options], workload)
    dense = dense_groups(groups, workload, links)
    predictions = []
    for spec, placement, option in zip(plan.specs, plan.placements, best.options, strict=True):
        alone = step_cost([spec], [placement], [option.cost], workload, links, plan.all_to_all, dense=dense)
        predictions.append(
            Prediction(
                frequent_share=option.cost.frequent_share,
                touched_rows=option.cost.touched_rows,
                inside_bytes=sum(alone.inside.values()),
                across_bytes=sum(alone.across.values()),
            )
        )
    return replace(
        plan,
        reduce_start_bytes=reduce_start_bytes(sum(load.touched for load in groups.values()), workload, links),
        batch_size=workload.batch_size,
        predictions=tuple(predictions),
        step_seconds=best.cost.total_s,
        seconds=tuple(best.cost.seconds.items()),
        alternatives=tuple(seconds.items()),
    )
