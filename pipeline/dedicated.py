"""Evaluation on ranks of its own, beside the training: ``eval.ranks`` of the config.

The last ranks of a run hold the tables under a plan of their own and score; the others train. For an evaluation the
training ranks send what changed since the last one, and go on; the result comes back later, with its step. The closing
evaluation, beside which nothing trains, stays with those that trained.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig, RunConfig
from dlrm.errors import ConfigError, DeviceError
from embedding.comm import Comm, broadcast_bytes
from embedding.heartbeat import Heartbeat
from embedding.shard_copy import ShardCopy
from embedding.topology import Topology, discover
from pipeline.changed_rows import ChangedRows
from pipeline.checkpoint import latest_checkpoint, open_checkpoint
from pipeline.config_agreement import agree_config
from pipeline.course import TrainResult
from pipeline.curves import Curves
from pipeline.engine import Engine, build_engine
from pipeline.evaluator import BackgroundEvaluations, Evaluation, Evaluator
from pipeline.metrics import Metrics
from pipeline.schedule import Clock

_FOLDER = "evaluation"
"""Within the run's: rates of the links between the ranks that evaluate."""


@dataclass(frozen=True, slots=True)
class Roles:
    """Who does what in a run.

    Attributes:
        everyone: all ranks, those that train first.
        topology: their nodes.
        own: the ranks that do what this one does.
        exchange: all ranks, for rows and results.
        desk: the first rank that trains and all that evaluate, for orders and dense weights.
        trainers: how many train.
    """

    everyone: Comm
    topology: Topology
    own: Comm
    exchange: Comm
    desk: Comm
    trainers: int

    @property
    def trains(self) -> bool:
        """Whether this rank does."""
        return self.everyone.rank < self.trainers


def assign_roles(config: RunConfig, comm: Comm) -> Roles:
    """Divide the ranks (collective).

    Raises:
        ConfigError: the ranks disagree on the config, or none is left to train.
    """
    agree_config(config, comm)
    wanted = config.eval.ranks
    if wanted >= comm.size:
        raise ConfigError(
            f"eval.ranks: {wanted}, but the run has {comm.size} rank(s) and needs one more to train; lower it, or "
            "start more ranks"
        )
    trainers = comm.size - wanted
    trains = comm.rank < trainers
    return Roles(
        everyone=comm,
        topology=discover(comm),
        own=comm.split(int(not trains), comm.rank),
        exchange=comm.split(0, comm.rank),
        desk=comm.split(int(trains and comm.rank > 0), comm.rank),
        trainers=trainers,
    )


def check_devices(engine: Engine, everyone: Comm) -> None:
    """See that all ranks hold the same kind of model (collective).

    Raises:
        DeviceError: some compute on GPUs, some on CPUs, as where ``device: auto`` finds other things on other nodes.
    """
    size = np.array([engine.model.flat_parameters.size, engine.device.steps_behind], np.int64)
    sizes = np.empty((everyone.size, 2), np.int64)
    everyone.all_gather(size, sizes).wait()
    if (sizes != sizes[0]).any():
        raise DeviceError(
            "eval.ranks: some ranks have a GPU, some have none; set device: cpu, or start as many ranks a node as it "
            "has GPUs"
        )


class DedicatedEvaluations(BackgroundEvaluations):
    """The evaluations of a run, as those who train see them."""

    elsewhere = True

    def __init__(
        self, engine: Engine, on_end: Callable[[Evaluation, int], None], *, roles: Roles, changed: ChangedRows
    ) -> None:
        """Meet the ranks that evaluate."""
        super().__init__(engine, on_end)
        check_devices(engine, roles.everyone)
        self._roles, self._changed = roles, changed
        self._copy = ShardCopy(roles.exchange, roles.trainers, changed.resident("evaluation"), engine.device)

    def _start(self, split: str, step: int, carrier: Comm | None, clock: Clock | None) -> None:  # noqa: ARG002
        self.end()
        start = time.perf_counter()
        self._order({"evaluate": split})
        if self._roles.everyone.rank == 0:
            self._roles.desk.broadcast(self._engine.device.to_host(self._engine.model.flat_parameters)).wait()
        self._copy.give(self._changed.resident("evaluation"))
        self._changed.forget("evaluation")
        self._step = step
        self._stalled_seconds = time.perf_counter() - start
        self._scoring = self._pool.submit(self._receive)

    def _receive(self) -> Evaluation:
        return _from_bytes(broadcast_bytes(self._roles.exchange, b"", self._roles.trainers))

    def dismiss(self, result: TrainResult) -> None:
        """The run is over: so it is for those that evaluate."""
        self._order({"end": [result.step, result.reason, str(result.checkpoint)]})

    def _order(self, order: dict[str, Any]) -> None:
        if self._roles.everyone.rank == 0:
            broadcast_bytes(self._roles.desk, json.dumps(order).encode())


def make_evaluations(
    engine: Engine, on_end: Callable[[Evaluation, int], None], roles: Roles | None, changed: ChangedRows
) -> BackgroundEvaluations:
    """Those of a run (collective); ``roles``: ``None`` where all ranks train."""
    if roles is None:
        return BackgroundEvaluations(engine, on_end)
    return DedicatedEvaluations(engine, on_end, roles=roles, changed=changed)


def watched_ranks(engine: Engine, roles: Roles | None) -> tuple[Comm, Topology]:
    """All ranks of a run, and their nodes."""
    return (engine.comm, engine.topology) if roles is None else (roles.everyone, roles.topology)


class EvaluationRank:
    """A rank that evaluates and does nothing else (all methods are collective over such ranks)."""

    def __init__(self, config: RunConfig, *, roles: Roles, threads: int) -> None:
        """Hold the model as the training begins with it.

        Raises:
            ConfigError: the tables do not fit the memory of these ranks.
            CrosslaneError: the data or the weights to start from are wrong.
        """
        self._roles, self.directory = roles, Path(config.run.directory)
        latest = latest_checkpoint(self.directory / "checkpoints")
        checkpoint = None if latest is None else open_checkpoint(latest, comm=roles.own)
        try:
            self.engine = build_engine(
                _scoring_config(config, roles), comm=roles.own, threads=threads, machines=roles.topology
            )
        except (ConfigError, DeviceError) as error:
            raise type(error)(f"eval.ranks: {config.eval.ranks}; on these ranks {error}") from None
        check_devices(self.engine, roles.everyone)
        if checkpoint is not None:
            self.engine.load_checkpoint(checkpoint, states=False)
        elif config.run.init is not None:
            self.engine.load_weights(config.run.init)
        self._copy = ShardCopy(roles.exchange, roles.trainers, self.engine.embedding.resident(), self.engine.device)
        self._evaluators: dict[str, Evaluator] = {}

    def serve(self) -> TrainResult:
        """Evaluate as often as asked; how the run ended."""
        with Heartbeat(self._roles.everyone, self._roles.topology):
            while True:
                order = json.loads(broadcast_bytes(self._roles.desk, b""))
                if "end" in order:
                    step, reason, checkpoint = order["end"]
                    self._close()
                    return TrainResult(self.directory, step, reason, Path(checkpoint), {})
                evaluation = self._evaluate(order["evaluate"])
                broadcast_bytes(self._roles.exchange, _to_bytes(evaluation), self._roles.trainers)

    def _evaluate(self, split: str) -> Evaluation:
        engine = self.engine
        weights = engine.device.to_host(engine.model.flat_parameters)
        self._roles.desk.broadcast(weights).wait()
        engine.device.assign(weights, engine.model.flat_parameters)
        engine.model.refresh_weights()
        self._copy.take(engine.embedding.resident())
        engine.embedding.spread_resident()
        if split not in self._evaluators:
            self._evaluators[split] = Evaluator(engine, engine.dataset.split(split), split)
        return self._evaluators[split].run()

    def _close(self) -> None:
        for evaluator in self._evaluators.values():
            for flight in evaluator.ring:
                flight.recording.graph = None
        self.engine.close()


def _scoring_config(config: RunConfig, roles: Roles) -> RunConfig:
    """That of the ranks that evaluate: no optimiser's state, and as many rows a rank as training ranks would take.

    Products of the same shapes give the same bits.
    """
    wanted = -(-config.eval.batch_size * config.eval.ranks // roles.trainers)
    plain = OptimizerConfig()
    return replace(
        config,
        optimizer=plain,
        embedding=replace(config.embedding, optimizer=plain),
        eval=replace(config.eval, batch_size=wanted),
        run=replace(config.run, directory=str(Path(config.run.directory) / _FOLDER)),
    )


def _to_bytes(evaluation: Evaluation) -> bytes:
    return json.dumps({**evaluation.to_values(), "curves": evaluation.curves.to_values()}).encode()


def _from_bytes(data: bytes) -> Evaluation:
    values = json.loads(data)
    metrics, curves = Metrics(**values.pop("metrics")), Curves(**values.pop("curves"))
    return Evaluation(metrics=metrics, curves=curves, **values)
