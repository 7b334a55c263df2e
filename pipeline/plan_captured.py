"""One plan for all GPUs of a run, and what its lists have to have room for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlrm.config import RunConfig
from dlrm.device import Device
from embedding.bag_room import BagRoom, BagSample
from embedding.captured_placement import SIGMAS, MostRows, node_rows, owner_shares
from embedding.column_groups import check_placements
from embedding.comm import Comm
from embedding.device_links import probe_device
from embedding.frequent_rows import check_lists, places_of_rows
from embedding.links import PUBLISHED
from embedding.placement import Plan
from embedding.plan import plan_from_values
from embedding.plan_trial import plans_on_first_rank
from embedding.topology import Topology
from pipeline.checkpoint import Checkpoint
from pipeline.dataset import Dataset
from pipeline.first_look import FirstLook
from pipeline.frequency_orders import FrequencyOrders, FrequentLists, may_list, saved_lists
from pipeline.plan_agreement import leaves_places, link_rates
from pipeline.planning import (
    memory_limit_bytes,
    obeys,
    plan_several,
    plan_tables,
    table_specs,
)

_MEMORY_FOR_TABLES = 0.8
"""Of what a GPU has free: batches in flight need some."""
_SUPPOSED = PUBLISHED["h100"]
"""Rates where nothing may be measured."""


def agree_captured_plan(
    config: RunConfig,
    dataset: Dataset,
    *,
    comm: Comm,
    topology: Topology,
    device: Device,
    carrier: Comm | None,
    carrier_name: str,
    sharing: int,
    local_ranks: int,
    look: FirstLook | None,
    saved: Checkpoint | None = None,
) -> tuple[Plan, FrequentLists]:
    """Plan and lists of a run on GPUs (collective); as ``agree_plan``, but nothing is tried.

    Args:
        config: of the run.
        dataset: of the run.
        comm: all ranks, for numbers of the host.
        topology: their nodes.
        device: this rank's GPU.
        carrier: all ranks, for arrays of the device; ``None``: there is one rank.
        carrier_name: what kind it is of.
        sharing: ranks on this rank's GPU.
        local_ranks: ranks on this machine.
        look: at the data, where there are several ranks.
        saved: the checkpoint to go on from.

    Raises:
        ConfigError: something forced cannot be, or no plan fits the memory.
        CheckpointError: the checkpoint lacks a list of its plan, or it is damaged.
    """
    specs = tuple(table_specs(config, dataset.tables))
    if carrier is None:
        return plan_tables(config, dataset.tables, ranks=1), {}
    assert look is not None, "several ranks look at the data"
    if saved is not None and "plan" in saved.meta:
        plan = plan_from_values(saved.meta["plan"])
        same = (plan.ranks, plan.nodes, plan.specs) == (comm.size, topology.num_nodes, specs)
        if same and obeys(plan, config, dataset.tables, captured=True):
            return plan, saved_lists(saved, plan)
    limit = np.array([_memory_limit(config, device, sharing, local_ranks)], np.int64)
    comm.all_reduce(limit, "min").wait()
    links = _SUPPOSED
    if _weighs(config, dataset, topology):
        look.wait()  # who measures wants to be alone
        links = link_rates(
            config, comm, topology, lambda: probe_device(carrier, comm, topology, device), _SUPPOSED, carrier_name
        )

    orders = FrequencyOrders()

    def make() -> list[Plan]:
        known = look.counts() if _counts(config, dataset, topology) else None
        plans = plan_several(
            config,
            dataset.tables,
            ranks=comm.size,
            nodes=topology.num_nodes,
            calibration=known,
            links=links,
            memory_limit=int(limit[0]),
            captured=True,
        )
        check_placements(plans[0].specs, plans[0].placements)
        return orders.mark(plans[:1], dataset.tables, known)

    plans = plans_on_first_rank(comm, make)
    orders.share(plans, comm)
    return plans[0], orders.lists_of(plans[0])


def begin_look(
    config: RunConfig, dataset: Dataset, *, comm: Comm, topology: Topology, threads: int, saved: Checkpoint | None
) -> FirstLook:
    """Begin to read what ``agree_captured_plan`` and ``measure_lists`` will ask this rank for."""
    look = FirstLook(config, dataset, threads=threads)
    # A checkpoint's plan is kept as a rule, so that nothing is counted.
    look.begin(counts=comm.rank == 0 and saved is None and _counts(config, dataset, topology))
    return look


def _weighs(config: RunConfig, dataset: Dataset, topology: Topology) -> bool:
    """Whether the plan has a choice."""
    return leaves_places(config, dataset) or (topology.num_nodes > 1 and config.embedding.all_to_all == "auto")


def _counts(config: RunConfig, dataset: Dataset, topology: Topology) -> bool:
    """Whether rows are counted for the plan or its lists."""
    return _weighs(config, dataset, topology) or may_list(config, dataset)


def _memory_limit(config: RunConfig, device: Device, sharing: int, local_ranks: int) -> int:
    free = device.free_memory()
    if free is None or config.embedding.memory_limit_mib is not None:
        return memory_limit_bytes(config, local_ranks)
    return int(free * _MEMORY_FOR_TABLES) // sharing


@dataclass(frozen=True, slots=True)
class ListRoom:
    """What decides how long lists are, the same on every rank.

    Attributes:
        shares: [T, W], see ``owner_shares``.
        most: rows that a batch asks for; ``None``: not known.
        sigmas: standard deviations above what is expected.
        bags: the same of rows that have bags; ``None``: every bag holds one key, and batches come as records.
    """

    shares: NDArray[np.float64]
    most: MostRows | None = None
    sigmas: float = SIGMAS
    bags: BagRoom | None = None


def measure_lists(
    config: RunConfig, dataset: Dataset, plan: Plan, topology: Topology, lists: FrequentLists, look: FirstLook
) -> ListRoom:
    """Look at the first rows in training order, as many as the larger of a training and an evaluation batch has."""
    frequent = check_lists(plan.specs, plan.placements, lists)
    wanted = max(config.data.batch_size, config.eval.batch_size)
    parts, tables = look.rows(), len(dataset.tables)
    nodes = None
    if plan.all_to_all == "hierarchical":
        nodes = [topology.ranks_of(node) for node in range(topology.num_nodes)]
    if dataset.layout is None or not dataset.layout.plain:
        sample = BagSample.join(parts, tables)
        sample.keys = [places_of_rows(keys, rows) for keys, rows in zip(sample.keys, frequent, strict=True)]
        bags = BagRoom.measure(plan, sample, wanted, nodes)
        return ListRoom(np.empty((tables, 0)), bags.most, bags=bags)
    own = [part.keys.reshape(tables, -1).astype(np.int64) for part in parts]
    keys = np.concatenate([*own, np.empty((tables, 0), np.int64)], axis=1)
    keys = np.stack([places_of_rows(row, rows) for row, rows in zip(keys, frequent, strict=True)])
    shares = owner_shares(plan, list(keys))
    if keys.shape[1] < wanted:
        return ListRoom(shares)
    keys = keys[:, :wanted]
    most = MostRows.measure(plan, list(keys), nodes, lambda groups: node_rows(plan, keys, groups), SIGMAS)
    return ListRoom(shares, most)
