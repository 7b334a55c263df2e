"""One plan for all ranks of a run: measured, counted and chosen once, the same everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.config import RunConfig
from dlrm.device import Device
from dlrm.errors import ConfigError
from embedding.comm import Comm, broadcast_bytes
from embedding.jagged import Jagged
from embedding.links import DEFAULT, LinkRates, probe, rates_from_values
from embedding.plan import Plan, plan_from_values
from embedding.plan_trial import Trial, plans_on_first_rank
from embedding.topology import Topology
from pipeline.checkpoint import Checkpoint
from pipeline.dataset import Dataset
from pipeline.frequency_orders import FrequencyOrders, FrequentLists, may_list, saved_lists
from pipeline.loader import Loader
from pipeline.planning import (
    calibrate,
    forced_placements,
    memory_limit_bytes,
    obeys,
    plan_several,
    plan_tables,
    table_specs,
)

LINKS_NAME = "links.json"
_TRIAL_BATCHES = 2


def agree_plan(
    config: RunConfig,
    dataset: Dataset,
    *,
    comm: Comm,
    topology: Topology,
    device: Device,
    saved: Checkpoint | None = None,
    local_ranks: int | None = None,
) -> tuple[Plan, FrequentLists]:
    """The plan of a run, and the frequent rows of tables that are not numbered by frequency (collective).

    A resumed run keeps plan and lists of its checkpoint where ranks, nodes and tables are the same, nothing else is
    forced now and ``embedding.memory_limit_mib`` has room for it, so that it goes on bit for bit. Otherwise rank 0
    counts the first batches and decides, by link rates that are measured where they are not yet known in the run's
    folder; where kinds of plans are predicted to be about as fast, some steps of each are timed. Measured times differ
    from run to run, and with them plans and the order of sums: with ``deterministic`` nothing is measured, and rates
    that are supposed of any machine decide.

    Args:
        config: of the run.
        dataset: of the run.
        comm: all ranks.
        topology: their nodes.
        device: that the look-ups run on.
        saved: the checkpoint to go on from.
        local_ranks: ranks that share this machine's memory; ``None``: those of this rank's node, and for
            one rank no limit but the config's.

    Raises:
        ConfigError: something forced cannot be, or no plan fits the memory.
        CheckpointError: the checkpoint lacks a list of its plan, or it is damaged.
    """
    specs = tuple(table_specs(config, dataset.tables))
    if saved is not None and "plan" in saved.meta:
        plan = plan_from_values(saved.meta["plan"])
        same = (plan.ranks, plan.nodes, plan.specs) == (comm.size, topology.num_nodes, specs)
        if same and obeys(plan, config, dataset.tables):
            return plan, saved_lists(saved, plan)
    if comm.size == 1:
        room = None if local_ranks is None else memory_limit_bytes(config, local_ranks)
        return plan_tables(config, dataset.tables, ranks=1, memory_limit=room), {}
    limit = np.array([memory_limit_bytes(config, local_ranks or topology.local_size)], np.int64)
    comm.all_reduce(limit, "min").wait()
    # Nothing is left to weigh where every placement and exchange is forced and no gradients are all-reduced.
    weighed = leaves_places(config, dataset) or "auto" in {config.embedding.deduplicate, config.embedding.all_to_all}
    weighed = weighed or replicates(config, dataset)
    links = DEFAULT
    if weighed:
        links = link_rates(config, comm, topology, lambda: probe(comm, topology, device), DEFAULT)
    orders = FrequencyOrders()

    def make() -> list[Plan]:
        known = calibrate(config, dataset) if weighed or may_list(config, dataset) else None
        plans = plan_several(
            config,
            dataset.tables,
            ranks=comm.size,
            nodes=topology.num_nodes,
            calibration=known,
            links=links,
            memory_limit=int(limit[0]),
        )
        return orders.mark(plans, dataset.tables, known)

    plans = plans_on_first_rank(comm, make)
    orders.share(plans, comm)
    if len(plans) == 1 or config.deterministic or not config.embedding.trial_steps:
        return plans[0], orders.lists_of(plans[0])
    trial = Trial(
        comm=comm,
        topology=topology,
        device=device,
        optimizer=config.table_optimizer,
        dtype=np.float64 if config.precision == "fp64" else np.float32,
        first=int(dataset.num_dense > 0),
        exchange_precision=config.embedding.exchange_precision,
        batches=_first_batches(config, dataset, comm),
        steps=config.embedding.trial_steps,
        lists_of=orders.lists_of,
    )
    plan = trial.fastest(plans)
    return plan, orders.lists_of(plan)


def _first_batches(config: RunConfig, dataset: Dataset, comm: Comm) -> list[tuple[Jagged, int]]:
    """This rank's keys of the first batches, and the batches' rows."""
    with Loader(
        dataset.split("train"),
        batch_size=config.data.batch_size,
        rank=comm.rank,
        ranks=comm.size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        window=config.data.shuffle_window,
        drop_last=False,
        prefetch=_TRIAL_BATCHES,
        block=config.data.shuffle_block,
        stop_step=_TRIAL_BATCHES,
        epochs=1,
    ) as batches:
        return [(batch.host.keys, batch.global_rows) for batch in batches]


def leaves_places(config: RunConfig, dataset: Dataset) -> bool:
    """Whether a table's placement, or a threshold, is left to the plan."""
    forced = forced_placements(config, dataset.tables).values()
    open_ = any(rule.kind is None or (rule.kind == "hybrid" and rule.threshold is None) for rule in forced)
    return len(forced) < len(dataset.tables) or open_


def replicates(config: RunConfig, dataset: Dataset) -> bool:
    """Whether rows of a table are forced to be replicated, whose gradients can be summed in two ways."""
    forced = forced_placements(config, dataset.tables).values()
    return any(choice.kind in ("replicated", "hybrid") and choice.threshold != 0 for choice in forced)


def link_rates(
    config: RunConfig,
    comm: Comm,
    topology: Topology,
    measure: Callable[[], LinkRates],
    supposed: LinkRates,
    carrier: str | None = None,
) -> LinkRates:
    """The rates in the run's folder where they are of such ranks, else measured and left there (collective).

    Args:
        config: of the run.
        comm: all ranks.
        topology: their nodes.
        measure: finds the rates; collective.
        supposed: with ``deterministic``, where nothing may be measured.
        carrier: what is measured between GPUs; ``None``: what CPUs use.
    """
    if config.deterministic:
        return supposed
    path = Path(config.run.directory) / LINKS_NAME
    shape: dict[str, Any] = {"ranks": comm.size, "nodes": topology.num_nodes}
    if carrier is not None:
        shape["carrier"] = carrier
    text = b""
    if comm.rank == 0 and path.is_file():
        text = path.read_bytes()
    text = broadcast_bytes(comm, text)
    if text:
        try:
            values = json.loads(text)
            if isinstance(values, dict) and {name: values.pop(name, None) for name in shape} == shape:
                return rates_from_values(values)
        except (ValueError, ConfigError):
            pass  # a torn file is measured again
    links = measure()
    if comm.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**links.to_values(), **shape}, indent=1) + "\n", encoding="utf-8")
    return links
