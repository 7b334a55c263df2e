"""From a config and its data to a plan: what is forced, what is counted, what is supposed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from dlrm.config import RunConfig
from dlrm.config_embedding import TableConfig
from dlrm.errors import ConfigError
from embedding.frequency import Frequency, RowCounts
from embedding.links import DEFAULT, LinkRates
from embedding.placement import places_of
from embedding.plan import Forced, Plan, TableSpec, allowed_placements, make_plans
from pipeline.dataset import Dataset
from pipeline.host_memory import available_memory
from pipeline.loader import Loader
from pipeline.manifest import TableInfo
from pipeline.statistics import read_frequencies

_MEMORY_FOR_TABLES = 0.8
"""Of the memory that is free: batches, gradients and the page cache need some."""
ITEMSIZES: Mapping[str, int] = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}
EXCHANGE_BYTES: Mapping[str, int | None] = {"fp32": None, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What counting some batches tells about the tables.

    Attributes:
        frequencies: of rows, by table.
        hotness: mean keys of a bag, by table.
        jagged: bags have different lengths.
        weighted: keys have weights.
        key_itemsize: bytes of a key.
        counts: the counters; ``None`` where nothing was counted.
    """

    frequencies: Mapping[str, Frequency] = field(default_factory=dict)
    hotness: Mapping[str, float] = field(default_factory=dict)
    jagged: bool = False
    weighted: bool = False
    key_itemsize: int = 4
    counts: RowCounts | None = None


def first_batches(config: RunConfig, dataset: Dataset, count: int) -> Loader:
    """The first ``count`` global batches of the first epoch in training order, or all it has; to be closed."""
    return Loader(
        dataset.split("train"),
        batch_size=config.data.batch_size,
        rank=0,
        ranks=1,
        seed=config.seed,
        shuffle=config.data.shuffle,
        window=config.data.shuffle_window,
        drop_last=False,
        prefetch=2,
        block=config.data.shuffle_block,
        stop_step=count,
        epochs=1,
    )


def calibrate(config: RunConfig, dataset: Dataset, *, threads: int = 1) -> Calibration:
    """Count the first ``embedding.calibration_batches`` batches of the first epoch, or all it has.

    Args:
        config: of the run.
        dataset: its training rows are counted.
        threads: that count, each another table.

    Raises:
        DataError: a row of them is wrong.
    """
    counts = RowCounts([table.rows for table in dataset.tables])
    jagged = False
    batches = first_batches(config, dataset, config.embedding.calibration_batches)
    with ThreadPoolExecutor(max(1, threads)) as pool, batches:
        for batch in batches:
            counts.add(batch.host.keys, pool.map)
            jagged = jagged or batch.host.keys.offsets is not None
        # All training rows, where preparation has counted them, tell more than some batches.
        frequencies = read_frequencies(dataset.path, dataset.manifest)
        if not frequencies:
            binned = pool.map(partial(_by_frequency, counts), range(len(dataset.tables)), dataset.tables)
            frequencies = {info.name: found for info, found in zip(dataset.tables, binned, strict=True)}
    names = [table.name for table in dataset.tables]
    return Calibration(
        frequencies=frequencies,
        hotness={name: counts.mean_hotness(table) for table, name in enumerate(names)},
        jagged=jagged,
        weighted=dataset.weighted,
        key_itemsize=np.dtype(dataset.key_dtype).itemsize,
        counts=counts,
    )


def _by_frequency(counts: RowCounts, table: int, info: TableInfo) -> Frequency:
    """As the plan meets the rows: in their own order, or the most frequent first where these will be listed."""
    if info.frequency_ordered:
        return counts.frequency(table)
    seen = counts.counts[table]
    return Frequency.from_counts(np.sort(seen[seen > 0])[::-1], info.rows)


def supposed(tables: Sequence[TableInfo], exponent: float, key_itemsize: int = 4) -> Calibration:
    """A power law for every table, where there is no data to count."""
    return Calibration(
        frequencies={table.name: Frequency.power_law(table.rows, exponent) for table in tables},
        key_itemsize=key_itemsize,
    )


def table_specs(config: RunConfig, tables: Sequence[TableInfo]) -> list[TableSpec]:
    """The tables as embeddings know them."""
    return [
        TableSpec(
            name=table.name,
            rows=table.rows,
            dim=config.model.embedding_dim,
            hotness=max(1, table.hotness),
            pooling=config.pooling(table.name),
        )
        for table in tables
    ]


def forced_placements(config: RunConfig, tables: Sequence[TableInfo]) -> dict[str, Forced]:
    """What the config says of each table; tables that it leaves to the plan are left out.

    Raises:
        ConfigError: it names a table that there is not.
    """
    known = {table.name for table in tables}
    if unknown := sorted(set(config.embedding.tables) - known):
        raise ConfigError(
            f"embedding.tables.{unknown[0]}: the data has no such table; it has {', '.join(sorted(known))}"
        )
    everywhere = None if config.embedding.placement == "auto" else config.embedding.placement
    forced = {}
    for table in tables:
        own = config.embedding.tables.get(table.name, TableConfig())
        rule = Forced(kind=own.placement or everywhere, threshold=own.threshold, deduplicate=own.deduplicate)
        if rule != Forced():
            forced[table.name] = rule
    return forced


def _switch(config: RunConfig, *, captured: bool) -> bool | None:
    """De-duplication of tables that do not say otherwise; ``None``: the plan chooses.

    Raises:
        ConfigError: GPUs are to do it for some tables alone.
    """
    switch = None if config.embedding.deduplicate == "auto" else config.embedding.deduplicate
    if not captured:
        return switch
    for name, table in config.embedding.tables.items():
        if table.deduplicate not in (None, switch is True):
            raise ConfigError(
                f"embedding.tables.{name}.deduplicate: {str(table.deduplicate).lower()}, but GPUs send rows of all "
                "tables in one exchange; set embedding.deduplicate for all of them"
            )
    return switch is True


def obeys(plan: Plan, config: RunConfig, tables: Sequence[TableInfo], *, captured: bool = False) -> bool:
    """Whether a plan that was made before has placements, exchange and memory as the config allows them.

    Memory only where the config limits it: what a machine has free differs from run to run.

    Args:
        plan: such as a checkpoint's, of these tables.
        config: of the run.
        tables: of its data.
        captured: the ranks are GPUs.

    Raises:
        ConfigError: something forced cannot be.
    """
    switch = _switch(config, captured=captured)
    if plan.nodes > 1 and config.embedding.all_to_all not in ("auto", plan.all_to_all):
        return False
    limit = config.embedding.memory_limit_mib
    if limit is not None:
        # As it was planned, before rows were listed: their unused homes are not counted.
        planned = replace(plan, placements=tuple(replace(place, listed=False) for place in plan.placements))
        if planned.memory().max() > limit * 2**20:
            return False
    forced = forced_placements(config, tables)
    for spec, placement in zip(plan.specs, plan.placements, strict=True):
        rule = forced.get(spec.name, Forced())
        bare = replace(placement, owner=0, owners=tuple(range(len(placement.owners))), listed=False)
        if bare not in allowed_placements(spec, rule, switch, plan.ranks, config.table_optimizer, captured=captured):
            return False
    return True


def memory_limit_bytes(config: RunConfig, local_ranks: int) -> int:
    """What each rank may hold: the config's limit, else its part of most of what this machine has free.

    Ranks of different machines have to agree on one (the least) before they plan.

    Args:
        config: of the run.
        local_ranks: ranks on this machine.
    """
    if config.embedding.memory_limit_mib is not None:
        return config.embedding.memory_limit_mib * 2**20
    return int(available_memory() * _MEMORY_FOR_TABLES) // local_ranks


def plan_tables(
    config: RunConfig,
    tables: Sequence[TableInfo],
    *,
    ranks: int,
    nodes: int = 1,
    calibration: Calibration | None = None,
    links: LinkRates = DEFAULT,
    memory_limit: int | None = None,
    captured: bool = False,
) -> Plan:
    """The plan of a run that is predicted to be fastest: the first of ``plan_several``."""
    return plan_several(
        config,
        tables,
        ranks=ranks,
        nodes=nodes,
        calibration=calibration,
        links=links,
        memory_limit=memory_limit,
        captured=captured,
    )[0]


def plan_several(
    config: RunConfig,
    tables: Sequence[TableInfo],
    *,
    ranks: int,
    nodes: int = 1,
    calibration: Calibration | None = None,
    links: LinkRates = DEFAULT,
    memory_limit: int | None = None,
    captured: bool = False,
) -> list[Plan]:
    """The plans that a run may follow, the one that is predicted to be fastest first (``embedding.plan.make_plans``).

    Args:
        config: of the run.
        tables: of its data.
        ranks: W.
        nodes: contiguous ranks share one of so many.
        calibration: what is known of the rows; ``None``: nothing.
        links: rates.
        memory_limit: bytes that a rank may hold; ``None``: the config's limit, or none.
        captured: the ranks are GPUs, whose steps send every occurrence of a row unless they are told otherwise.

    Raises:
        ConfigError: something forced cannot be, or no plan fits the memory.
    """
    known = calibration or Calibration()
    embedding = config.embedding
    itemsize = ITEMSIZES[config.table_precision]
    exchanged = EXCHANGE_BYTES[embedding.exchange_precision]
    switch = _switch(config, captured=captured)
    if captured:
        exchanged = min(ITEMSIZES[config.precision], exchanged or 4)
    if memory_limit is None and embedding.memory_limit_mib is not None:
        memory_limit = embedding.memory_limit_mib * 2**20
    return make_plans(
        table_specs(config, tables),
        ranks,
        nodes,
        batch_size=config.data.batch_size,
        optimizer=config.table_optimizer,
        placements=forced_placements(config, tables),
        frequencies=known.frequencies,
        hotness=known.hotness,
        itemsize=itemsize,
        exchange_itemsize=exchanged,
        key_itemsize=known.key_itemsize,
        jagged=known.jagged,
        weighted=known.weighted,
        links=links,
        memory_limit_bytes=memory_limit,
        deduplicate="auto" if switch is None else switch,
        all_to_all=embedding.all_to_all,
        captured=captured,
    )


def simulate(
    config: RunConfig,
    tables: Sequence[TableInfo],
    *,
    num_dense: int,
    calibration: Calibration,
    links: LinkRates,
    ranks_per_node: int,
    flops: float,
    ranks: Sequence[int],
) -> list[dict[str, Any]]:
    """Predicted step time of the same global batch on more and more ranks (``docs/plan.md`` has the formula).

    Args:
        config: of the run.
        tables: of its data.
        num_dense: dense columns.
        calibration: what is known of the rows.
        links: rates.
        ranks_per_node: L.
        flops: floating-point operations that a rank does in a second in the dense part.
        ranks: numbers of ranks to look at.

    Returns:
        One row per number of ranks; times in milliseconds, bytes between nodes in MB a rank, memory in MiB.

    Raises:
        ConfigError: as ``plan_tables``.
    """
    from embedding.exchange_cost import Shape  # with NumPy, as all of this file

    rows = []
    weights = dense_weights(config, num_dense, places_of(table_specs(config, tables), 0)[1])
    itemsize = 8 if config.precision == "fp64" else 4
    for count in ranks:
        nodes = -(-count // ranks_per_node)
        plan = plan_tables(
            config, tables, ranks=count, nodes=nodes, calibration=calibration, links=links,
            captured=config.device == "cuda",
        )  # fmt: skip
        share = config.data.batch_size / count
        # Forward one multiplication and one addition a weight and row, backward twice that.
        compute = 6.0 * weights * share / flops
        reduce = Shape(count, nodes).reduce_seconds(weights * itemsize, links) if count > 1 else 0.0
        parts = dict(plan.seconds)
        embedding = sum(parts.values())
        step = embedding + compute + reduce
        rows.append(
            {
                "ranks": count,
                "nodes": nodes,
                "rows_per_rank": share,
                "all_to_all": plan.all_to_all,
                **{f"{name}_ms": 1e3 * seconds for name, seconds in parts.items()},
                "dense_ms": 1e3 * compute,
                "dense_all_reduce_ms": 1e3 * reduce,
                "step_ms": 1e3 * step,
                "overlapped_ms": 1e3 * max(embedding, compute + reduce),
                "samples_per_s": config.data.batch_size / step,
                "across_mb_per_rank": sum(p.across_bytes for p in plan.predictions) / count / 1e6,
                "memory_mib_per_rank": float(plan.memory().max()) / 2**20,
            }
        )
    return rows


def dense_weights(config: RunConfig, num_dense: int, num_vectors: int) -> int:
    """Weights and biases of both MLPs; ``num_vectors`` without the bottom one's."""
    places = num_vectors + (num_dense > 0)
    bottom = (num_dense, *config.model.bottom_mlp) if num_dense else ()
    top_in = places * (places - 1) // 2 + (config.model.embedding_dim if num_dense else 0)
    top = (top_in, *config.model.top_mlp)
    return sum((size + 1) * out for sizes in (bottom, top) for size, out in itertools.pairwise(sizes))
