"""The parts of a run on GPUs, joined; ``pipeline.engine`` takes them where the device is one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from dlrm.config import RunConfig
from dlrm.device import Device
from dlrm.errors import DeviceError
from dlrm.interaction_cuda import MOST_VECTORS
from dlrm.model import DenseModel
from dlrm.optim import DenseOptimizer
from embedding.captured import CapturedEmbedding
from embedding.captured_bags import ExchangedBags
from embedding.captured_exchange import ExchangedEmbedding
from embedding.column_groups import deduplicates
from embedding.comm import Comm, SingleComm, all_gather_bytes
from embedding.comm_staged import StagedComm
from embedding.placement import Plan
from embedding.topology import Topology
from pipeline.checkpoint import Checkpoint
from pipeline.dataset import Dataset
from pipeline.devices import DTYPES
from pipeline.first_look import FirstLook
from pipeline.frequency_orders import FrequentLists
from pipeline.overlap import Schedule, choose
from pipeline.plan_captured import ListRoom, agree_captured_plan, measure_lists
from pipeline.schedule import EVAL_FUSED, Row, at_depth, ring_size
from pipeline.stages import S
from pipeline.stages_cuda import CudaStages, Fused


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """What brings arrays from GPU to GPU.

    One communicator serves all stages: a schedule has their collectives on one stream, and whatever exchanges between
    steps does so while no step is under way.

    Attributes:
        name: which kind.
        comm: all ranks; ``None``: there is one.
        sharing: ranks on this rank's GPU.
        close: to be called by all ranks at the end of a run that did not fail, once no graph is left.
    """

    name: Literal["none", "nccl", "staged"] = "none"
    comm: Comm | None = None
    sharing: int = 1
    close: Callable[[], None] = lambda: None

    @property
    def captures(self) -> bool:
        """Whether a graph may hold its collectives."""
        return self.name != "staged"


def make_carrier(config: RunConfig, host: Comm, topology: Topology, device: Device) -> Carrier:
    """Join the GPUs of all ranks (collective).

    Args:
        config: of the run.
        host: all ranks, over MPI.
        topology: their nodes.
        device: this rank's GPU.

    Raises:
        DeviceError: NCCL is asked for, but ranks share a GPU.
        CommError: NCCL does not start.
    """
    if host.size == 1:
        return Carrier()
    bus = getattr(device, "bus_id", None)
    places = all_gather_bytes(host, f"{topology.node} {bus}".encode())
    count = Counter(places)
    sharing, wish = count[places[host.rank]], config.cuda.carrier
    if wish == "nccl" and len(count) < host.size:
        raise DeviceError(
            f"cuda.carrier: nccl, but {host.size} ranks have {len(count)} GPUs, and NCCL wants one for each; start "
            "fewer ranks a node, or set it to auto"
        )
    own = host.split(0, host.rank)
    if wish == "staged" or bus is None or len(count) < host.size:
        if wish == "auto" and bus is not None and host.rank == 0:
            print(sharing_warning(host.size, len(count)), file=sys.stderr, flush=True)
        return Carrier(name="staged", comm=StagedComm(own, device), sharing=sharing)
    from embedding.comm_nccl import NcclComm

    nccl = NcclComm(own, device.index)  # type: ignore[attr-defined]
    return Carrier(name="nccl", comm=nccl, close=nccl.close)


def sharing_warning(ranks: int, gpus: int) -> str:
    """What is said where ranks share GPUs, and nobody has asked for the carrier that this takes."""
    return (
        f"warning: {ranks} ranks have {gpus} GPU{'s' * (gpus > 1)}, so that what they exchange goes through the host's "
        f"memory, many times slower than between GPUs; start {gpus} rank{'s' * (gpus > 1)}, one for each GPU, or set "
        "cuda.carrier: staged if this is meant"
    )


def build_captured(
    config: RunConfig,
    plan: Plan,
    carrier: Carrier,
    topology: Topology,
    device: Device,
    first: int,
    room: ListRoom | None,
    fused: Fused,
    lists: FrequentLists | None = None,
) -> CapturedEmbedding | ExchangedEmbedding | ExchangedBags:
    """The tables of this rank.

    Args:
        config: of the run.
        plan: of the tables.
        carrier: between the GPUs.
        topology: of the ranks.
        device: this rank's GPU.
        first: place of table 0 in the vectors.
        room: what lists have to hold, where there are several ranks.
        fused: where look-up and interaction run as one kernel.
        lists: the frequent rows of tables that list them.

    Raises:
        ConfigError: several GPUs do not do what the plan says.
        DeviceError: they do not fit.
    """
    if carrier.comm is not None:
        assert room is not None, "several ranks have lists"
        return _exchanged(config, plan, carrier.comm, topology, device, first, room, fused, lists)
    return CapturedEmbedding(
        specs=plan.specs,
        device=device,
        optimizer=config.table_optimizer,
        table_dtype=DTYPES[config.table_precision],
        seed=config.seed,
        first=first,
        deterministic=sorts_first(config),
    )


def sorts_first(config: RunConfig) -> bool:
    """Whether keys are brought into the order of their rows beside an earlier batch, and gradients summed by row.

    Sorting needs the keys alone; the update of sorted rows is then faster than adding gradients to the rows as they
    come. In sequence both take as long (benchmarks/RESULTS.md).
    """
    return config.deterministic or (config.overlap.train is not False and config.overlap.depth > 1)


def _exchanged(
    config: RunConfig,
    plan: Plan,
    comm: Comm,
    topology: Topology,
    device: Device,
    first: int,
    room: ListRoom,
    fused: Fused,
    lists: FrequentLists | None,
) -> ExchangedEmbedding | ExchangedBags:
    hierarchical = plan.all_to_all == "hierarchical"
    if hierarchical:  # groups that carry arrays of the device
        inside = comm.split(topology.node, topology.local_rank)
        topology = replace(topology, inside=inside, across=comm.split(topology.local_rank, topology.node))
    shared: dict[str, Any] = {
        "plan": plan,
        "comm": comm,
        "topology": topology,
        "device": device,
        "optimizer": config.table_optimizer,
        "table_dtype": DTYPES[config.table_precision],
        "seed": config.seed,
        "first": first,
        "deterministic": sorts_first(config),
        "exchange_precision": config.embedding.exchange_precision,
        "hierarchical": hierarchical,
        "lists": lists,
    }
    if room.bags is not None:
        return ExchangedBags(**shared, room=replace(room.bags, sigmas=room.sigmas))
    return ExchangedEmbedding(
        **shared, shares=room.shares, sigmas=room.sigmas, most=room.most, listed=fused.train,
        listed_forward=fused.eval,
        sends=fused.train and not scales_dynamically(config),  # which looks at all gradients before they travel
    )  # fmt: skip


def build_stages(
    config: RunConfig,
    *,
    model: DenseModel,
    embedding: Any,
    carrier: Carrier,
    device: Device,
    layout: Any,
    optimizer: DenseOptimizer,
    fused: Fused,
) -> CudaStages:
    """The stages over them."""
    dynamic = scales_dynamically(config)
    scale = 1.0
    if config.precision == "fp16":
        scale = 65536.0 if config.loss_scale == "dynamic" else float(config.loss_scale)
    comm = carrier.comm or SingleComm()
    return CudaStages(
        model=model,
        embedding=embedding,
        comm=comm,
        device=device,
        layout=layout,
        optimizer=optimizer,
        dense=config.optimizer,
        tables=config.table_optimizer,
        rates=config.learning_rate,
        seed=config.seed,
        loss_scale=scale,
        dynamic=dynamic,
        growth_interval=config.loss_scale_growth,
        fused=fused,
        captures=carrier.captures,
    )


def scales_dynamically(config: RunConfig) -> bool:
    """Whether the loss scale follows the gradients."""
    return config.precision == "fp16" and config.loss_scale == "dynamic"


def fuses(field: str, wish: bool | str, config: RunConfig, model: DenseModel, *, several: bool) -> bool:
    """Whether look-up and interaction run as one kernel, as ``field`` of the config's section ``cuda`` wishes.

    Args:
        field: for the error message.
        wish: its value.
        config: of the run.
        model: dense part.
        several: rows are exchanged in a way that leaves no room for it.

    Raises:
        DeviceError: the config insists, and the shapes do not allow it.
    """
    fits = not several and model.dtype.itemsize == 2 and model.num_vectors <= MOST_VECTORS
    fits = fits and config.model.embedding_dim % 8 == 0
    if wish is True and not fits:
        raise DeviceError(
            f"cuda.{field}: {'several' if several else 'one or more'} ranks, {config.precision}, {model.num_vectors} "
            f"vectors of {config.model.embedding_dim} columns, but it takes one rank, or several that exchange "
            f"neither by node nor de-duplicated nor by columns; fp16 or bf16, at most {MOST_VECTORS} vectors and a "
            "multiple of 8 columns; set it to auto"
        )
    return bool(wish) and fits


def guarded(schedule: Schedule, stages: CudaStages) -> Schedule:
    """With dynamic loss scaling, tables too are updated only once all gradients are known to be finite."""
    if not stages.dynamic:
        return schedule
    rows = {row.stage: row for row in schedule.rows}
    update = rows[S.sparse_update]
    if update.stream == "main":
        return schedule
    rows[S.sparse_update] = replace(update, after=(*update.after, S.reduce_bottom))
    # What a row waits for is issued before it: the update and the look-up of updated rows go behind the reduction.
    order = list(rows)
    between = order[order.index(S.sparse_update) : order.index(S.reduce_bottom)]
    late = [stage for stage in between if stage in {S.sparse_update, S.lookup, S.output_dist}]
    order = [stage for stage in order if stage not in late]
    at = order.index(S.reduce_bottom) + 1
    order[at:at] = late
    return Schedule(tuple(rows[stage] for stage in order), schedule.reason)


def looking_up_beside(schedule: Schedule) -> Schedule:
    """For several GPUs, whose rows of their own are looked up by ``bottom_forward``: behind the batch's lists."""
    rows = [
        replace(row, after=(*row.after, S.input_dist)) if row.stage == S.bottom_forward else row
        for row in schedule.rows
    ]
    return Schedule(tuple(rows), schedule.reason)


def fused_schedule(schedule: Schedule) -> Schedule:
    """For an evaluation whose look-up and interaction are one kernel: as many batches in flight, or one stream."""
    depth = ring_size(schedule.rows)
    if schedule.overlapped and depth > 1:
        return Schedule(at_depth(EVAL_FUSED, depth), schedule.reason)
    return Schedule(tuple(Row(row.stage, "main") for row in EVAL_FUSED), schedule.reason)


def join_captured(
    *,
    config: RunConfig,
    dataset: Dataset,
    comm: Comm,
    device: Device,
    model: DenseModel,
    topology: Topology,
    nodes: Topology,
    optimizer: DenseOptimizer,
    saved: Checkpoint | None,
    local_ranks: int | None,
    look: FirstLook | None,
) -> dict[str, Any]:
    """What an engine has on GPUs: its fields by name (collective).

    ``look``: at the data, where there are several ranks.

    Raises:
        ConfigError: several GPUs do not do what the config or the data ask for.
        DeviceError: the tables do not fit.
    """
    carrier = make_carrier(config, comm, topology, device)
    plan, lists = agree_captured_plan(
        config, dataset, comm=comm, topology=nodes, device=device, carrier=carrier.comm, carrier_name=carrier.name,
        sharing=carrier.sharing, local_ranks=local_ranks or topology.local_size, look=look, saved=saved,
    )  # fmt: skip
    cut = any(placement.kind == "column_wise" for placement in plan.placements)
    no_room = carrier.comm is not None and (cut or deduplicates(plan) or plan.all_to_all == "hierarchical")
    layout = dataset.layout
    plain = layout is not None and layout.plain
    fused = Fused(
        train=plain and fuses("fused_train", config.cuda.fused_train, config, model, several=no_room),
        eval=plain and fuses("fused_eval", config.cuda.fused_eval, config, model, several=no_room),
    )
    embedding = build_captured(
        config, plan, carrier, nodes, device, model.first,
        None if look is None else measure_lists(config, dataset, plan, nodes, lists, look), fused, lists,
    )  # fmt: skip
    stages = build_stages(
        config, model=model, embedding=embedding, carrier=carrier, device=device, layout=layout,
        optimizer=optimizer, fused=fused,
    )  # fmt: skip
    train = choose(config.overlap, "train", None, exchanged=carrier.comm is not None)
    evaluation = choose(config.overlap, "eval", None)
    return {
        "plan": plan,
        "lists": lists,
        "embedding": embedding,
        "stages": stages,
        "train_schedule": guarded(train if carrier.comm is None else looking_up_beside(train), stages),
        "eval_schedule": fused_schedule(evaluation) if fused.eval and carrier.comm is None else evaluation,
        "carrier": carrier.comm if carrier.name == "nccl" else None,
        "carrier_name": carrier.name,
        "release": carrier.close,
        "layout": layout,
    }
