"""The composition root: the one place that picks implementations and joins them for a run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrm.config import RunConfig
from dlrm.device import Device
from dlrm.errors import CheckpointError, ConfigError
from dlrm.model import DenseModel
from dlrm.optim import DenseOptimizer
from embedding.all_to_all import Flat, Hierarchical
from embedding.comm import Comm
from embedding.hybrid import HybridEmbedding
from embedding.placement import Plan, places_of
from embedding.topology import Topology, discover
from pipeline.checkpoint import Checkpoint, check_compatible
from pipeline.checkpoint_shards import pieces_of_shards, read_shards
from pipeline.dataset import Dataset, load_dataset
from pipeline.devices import DTYPES, make_device, uses_gpu
from pipeline.formats.record_files import RecordLayout
from pipeline.frequency_orders import FrequentLists, list_name
from pipeline.overlap import Schedule, choose, no_gain_on_host
from pipeline.plan_agreement import agree_plan
from pipeline.planning import table_specs
from pipeline.stages import Stages
from pipeline.weights import check_weights, load_weights


@dataclass(slots=True, kw_only=True)
class Engine:
    """A model over its ranks, ready to train or to score.

    Attributes:
        comm: all ranks, for whatever is done between steps; each lane has a communicator of its own.
        topology: the machines, whatever nodes the config supposes.
        carrier: the same ranks, for arrays of the device; ``None``: those go through the host's memory.
        carrier_name: ``none``, ``nccl`` or ``staged``.
        release: lets go of the carrier.
        embedding: ``HybridEmbedding``, or on GPUs ``CapturedEmbedding``, ``ExchangedEmbedding`` and
            ``ExchangedBags``.
        layout: of the records that the device takes apart itself; ``None``: it is handed decoded batches.
    """

    config: RunConfig
    dataset: Dataset
    comm: Comm
    device: Device
    threads: int
    plan: Plan
    model: DenseModel
    topology: Topology
    lists: FrequentLists
    embedding: Any
    optimizer: DenseOptimizer
    stages: Stages
    train_schedule: Schedule
    eval_schedule: Schedule
    carrier: Comm | None = None
    carrier_name: str = "none"
    release: Callable[[], None] = lambda: None
    layout: RecordLayout | None = None

    def close(self) -> None:
        """Let go of what joins the ranks' GPUs (collective); not after a failure, as it waits for all ranks.

        No recording may be left: see ``NcclComm.close``.
        """
        gc.collect()
        self.release()

    def describe_model(self) -> dict[str, Any]:
        """What a checkpoint has to match, as JSON values."""
        model = self.config.model
        return {
            "tables": {table.name: [table.rows, model.embedding_dim] for table in self.dataset.tables},
            "num_dense": self.dataset.num_dense,
            "bottom_mlp": list(model.bottom_mlp) if self.dataset.num_dense else [],
            "top_mlp": list(model.top_mlp),
            "precision": self.config.precision,
            "optimizer": self.config.optimizer.kind,
            "table_optimizer": self.config.table_optimizer.kind,
        }

    def tensors(self) -> dict[str, Any]:
        """Every weight and optimiser state that this rank writes: the dense ones on rank 0, its tables everywhere."""
        self.embedding.settle()
        named: dict[str, Any] = {}
        if self.comm.rank == 0:
            named.update({list_name(table): rows for table, rows in self.lists.items()})
            named.update({name: self.device.to_host(weight) for name, weight in self.model.parameters.items()})
            named.update({f"optimizer.{name}": self.model.pack(state) for name, state in self.optimizer.state.items()})
        named.update(pieces_of_shards(self.embedding.shards(), self._table_shapes(), self.comm.rank))
        return named

    def load_weights(self, path: str | Path) -> None:
        """Take the weights out of an .npz file.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        with load_weights(Path(path)) as weights:
            check_weights(weights, self._weight_shapes())
            for name, target in self.model.parameters.items():
                self.device.assign(weights[name], target)
            self.model.refresh_weights()
            for shard in self.embedding.shards():
                whole = weights[f"table.{shard.table}"]
                shard.weight[...] = whole[_slice(shard.rows), _slice(shard.columns)]
        self.embedding.spread()

    def load_checkpoint(self, checkpoint: Checkpoint, *, states: bool) -> None:
        """Take weights, and with ``states`` also the optimisers' state, out of a checkpoint.

        Raises:
            CheckpointError: it is of another model, damaged or incomplete.
        """
        if states:
            if "model" not in checkpoint.meta:
                raise CheckpointError(
                    f"checkpoint {checkpoint.path}: holds weights only, so training cannot resume from it; "
                    "export it and start from the weights with --init"
                )
            check_compatible(checkpoint.meta["model"], self.describe_model())
        for name, target in self.model.parameters.items():
            self.device.assign(_read(checkpoint, name, target.shape), target)
        self.model.refresh_weights()
        if states:
            size = (sum(weight.size for weight in self.model.parameters.values()),)
            for name, state in self.optimizer.state.items():
                self.model.unpack(_read(checkpoint, f"optimizer.{name}", size), state)
        read_shards(checkpoint, self.embedding.shards(), self._table_shapes(), states=states)
        self.embedding.spread()

    def _table_shapes(self) -> dict[str, tuple[int, int]]:
        return {spec.name: (spec.rows, spec.dim) for spec in self.plan.specs}

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        dense = {name: weight.shape for name, weight in self.model.parameters.items()}
        return dense | {f"table.{name}": shape for name, shape in self._table_shapes().items()}


def build_engine(
    config: RunConfig, *, comm: Comm, threads: int, saved: Checkpoint | None = None, machines: Topology | None = None
) -> Engine:
    """Join the parts for one run.

    Args:
        config: of the run.
        comm: all ranks.
        threads: of each rank.
        saved: the checkpoint to go on from; its plan is kept where it fits, its weights are not read.
        machines: this rank's place among all that share memory and GPUs with it; ``None``: that in ``comm``.

    Raises:
        ConfigError: the config does not fit the ranks or the data.
        DataError: the data set is missing or damaged.
    """
    dataset = load_dataset(config.data.path)
    if config.data.batch_size < comm.size:
        raise ConfigError(
            f"data.batch_size: {config.data.batch_size} rows are fewer than the {comm.size} ranks; "
            "raise it or start fewer ranks"
        )
    if config.data.verify and comm.rank == 0:
        dataset.verify()
    topology = discover(comm)
    nodes = _supposed_nodes(config, comm, topology)
    look = None
    if comm.size > 1 and uses_gpu(config):
        from pipeline.plan_captured import begin_look

        look = begin_look(config, dataset, comm=comm, topology=nodes, threads=threads, saved=saved)
    device = make_device(config, machines or topology, threads)
    model = DenseModel(
        model=config.model,
        num_dense=dataset.num_dense,
        num_tables=places_of(table_specs(config, dataset.tables), 0)[1],
        dtype=DTYPES[config.precision],
        device=device,
        seed=config.seed,
    )
    optimizer = DenseOptimizer(config.optimizer, model.flat_parameters.size, model.flat_parameters.dtype, device)
    common: dict[str, Any] = {
        "config": config, "dataset": dataset, "comm": comm, "device": device, "model": model, "topology": topology,
        "optimizer": optimizer,
    }  # fmt: skip
    agreed: dict[str, Any] = {"nodes": nodes, "saved": saved, "local_ranks": machines and machines.local_size}
    if device.steps_behind:
        from pipeline.engine_cuda import join_captured

        parts = join_captured(**common, **agreed, look=look)
    else:
        parts = _join(**common, **agreed)
    return Engine(threads=threads, **common, **parts)


def _join(
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
) -> dict[str, Any]:
    """What an engine has on CPUs."""
    plan, lists = agree_plan(
        config, dataset, comm=comm, topology=nodes, device=device.host, saved=saved, local_ranks=local_ranks
    )
    # A lane has its own order of collectives, which must not meet those of another one.
    embedding_comm, dense_comm = (comm.split(0, comm.rank) for _ in range(2))
    embedding = _hybrid(config, plan, embedding_comm, nodes, lists, model)
    stages = Stages(
        model=model,
        embedding=embedding,
        comm=dense_comm,
        device=device,
        optimizer=optimizer,
        dense_lr=config.optimizer.lr,
        table_lr=config.table_optimizer.lr,
        rates=config.learning_rate,
    )
    no_gain = no_gain_on_host(comm.size, topology.num_nodes)
    return {
        "plan": plan,
        "lists": lists,
        "embedding": embedding,
        "stages": stages,
        "train_schedule": choose(config.overlap, "train", no_gain),
        "eval_schedule": choose(config.overlap, "eval", no_gain),
    }


def _supposed_nodes(config: RunConfig, comm: Comm, topology: Topology) -> Topology:
    """The nodes that tables are planned for (collective): the machines, unless the config supposes others.

    Raises:
        ConfigError: more nodes than ranks.
    """
    nodes = config.embedding.nodes
    if nodes is None:
        return topology
    if nodes > comm.size:
        raise ConfigError(f"embedding.nodes: {nodes}, but the run has {comm.size} rank(s); lower it, or start more")
    return discover(comm, nodes)


def _hybrid(
    config: RunConfig, plan: Plan, comm: Comm, topology: Topology, lists: FrequentLists, model: DenseModel
) -> HybridEmbedding:
    """The tables of a rank of CPUs."""
    return HybridEmbedding(
        specs=plan.specs,
        plan=plan,
        comm=comm,
        device=model.device,
        optimizer=config.table_optimizer,
        dtype=model.dtype,
        seed=config.seed,
        first=model.first,
        exchange_precision=config.embedding.exchange_precision,
        all_to_all=Hierarchical(comm, topology) if plan.all_to_all == "hierarchical" else Flat(comm),
        topology=topology,
        lists=lists,
    )


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Any:
    entry = checkpoint.entry(name)
    if entry.shape != shape:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: {name} has shape {list(entry.shape)}, but the model needs "
            f"{list(shape)}; use a checkpoint of this model"
        )
    return checkpoint.read(name)


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop, numbers.step)
