"""One plan for all ranks: the first rank's, or the one of several that turns out to be the fastest.

A model of links and cores errs, and by other amounts for other kinds of plans. So the few plans that it puts first,
each of another family, run some steps of real batches on tables of zeros, and the fastest is kept.

Shapes: B rows of this rank, F = first + T places, D columns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import ConfigError, DataError
from embedding.all_to_all import Flat, Hierarchical
from embedding.comm import Comm, broadcast_bytes
from embedding.hybrid import HybridEmbedding
from embedding.jagged import Jagged
from embedding.placement import Plan, places_of, plan_from_values
from embedding.topology import Topology
from embedding.wire import Precision

_LONG_ENOUGH_S = 1.0
"""Steps are repeated until their times add up to this, but not more often than is asked for ..."""
_FEWEST_STEPS = 3
"""... and at least so often."""
_CLEARLY = 0.97
"""A plan is taken before one that is predicted to be faster if it needs at most this part of its time."""


def plans_on_first_rank(comm: Comm, make: Callable[[], Sequence[Plan]]) -> list[Plan]:
    """Rank 0's plans on every rank; collective. Other ranks need none of what ``make`` reads.

    Raises:
        ConfigError: rank 0 could not make any; every rank raises what it said.
        DataError: a row that rank 0 counted is wrong; on rank 0 alone, which it names.
    """
    message = b""
    if comm.rank == 0:
        try:
            message = json.dumps({"plans": [plan.to_values() for plan in make()]}).encode()
        except ConfigError as error:
            message = json.dumps({"error": str(error)}).encode()
        except DataError as error:
            raise type(error)(f"rank 0: {error}") from error
    values = json.loads(broadcast_bytes(comm, message))
    if "error" in values:
        raise ConfigError(values["error"])
    return [plan_from_values(plan) for plan in values["plans"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the plans are tried on.

    Attributes:
        comm: all ranks.
        topology: their nodes.
        device: of the look-ups.
        optimizer: of the tables.
        dtype: of the tables.
        first: place of table 0 in the vectors.
        exchange_precision: of vectors between ranks.
        batches: this rank's keys of some batches, and their global rows; the same number on every rank.
        steps: how many are timed at most.
        lists_of: a plan's lists of frequent rows (``HybridEmbedding``).
    """

    comm: Comm
    topology: Topology
    device: Device
    optimizer: OptimizerConfig
    dtype: Any
    first: int
    exchange_precision: Precision = "fp32"
    batches: Sequence[tuple[Jagged, int]]
    steps: int
    lists_of: Callable[[Plan], Mapping[str, Array]] = lambda _: {}

    def fastest(self, plans: Sequence[Plan]) -> Plan:
        """The plan that ran fastest, with what was measured of all; collective.

        A plan that comes later in ``plans`` has to be clearly faster than the ones before.
        """
        if len(plans) == 1 or not self.batches:
            return plans[0]
        seconds = [self.seconds(plan) for plan in plans]
        best = 0
        for number in range(1, len(plans)):
            if seconds[number] < _CLEARLY * seconds[best]:
                best = number
        trials = [
            (plan.label, plan.step_seconds or 0.0, measured) for plan, measured in zip(plans, seconds, strict=True)
        ]
        return replace(plans[best], trials=tuple(trials))

    def seconds(self, plan: Plan) -> float:
        """Median time of a step of the embedding lane, on the slowest rank; collective, the same on every rank."""
        embedding = HybridEmbedding(
            specs=plan.specs,
            plan=plan,
            comm=self.comm,
            device=self.device,
            optimizer=self.optimizer,
            dtype=self.dtype,
            seed=None,
            first=self.first,
            exchange_precision=self.exchange_precision,
            all_to_all=Hierarchical(self.comm, self.topology) if plan.all_to_all == "hierarchical" else Flat(self.comm),
            topology=self.topology,
            lists=self.lists_of(plan),
        )
        capacity = max(keys.num_rows for keys, _ in self.batches)
        shape = (capacity, places_of(plan.specs, self.first)[1], plan.specs[0].dim)
        vectors, gradients = (np.full(shape, value, self.dtype) for value in (0.0, 1e-3))
        buffers = embedding.buffers(capacity, vectors, gradients)
        # The first round compiles, allocates, and gives the rows memory of their own.
        warm_up = len(self.batches)
        times: list[float] = []
        while len(times) < warm_up + self.steps:
            keys, global_rows = self.batches[len(times) % len(self.batches)]
            times.append(self._step(embedding, buffers, keys, global_rows, len(times) + 1))
            timed = times[warm_up:]
            if len(timed) >= _FEWEST_STEPS and sum(timed) > _LONG_ENOUGH_S:
                break
        return float(np.median(times[warm_up:]))

    def _step(self, embedding: HybridEmbedding, buffers: Any, keys: Jagged, global_rows: int, step: int) -> float:
        self.comm.barrier()
        began = time.perf_counter()
        embedding.input_dist(keys, buffers, global_rows)
        embedding.lookup(buffers)
        embedding.output_dist(buffers)
        embedding.grad_dist(buffers)
        embedding.sparse_update(buffers, 1e-3, step)
        slowest: Array = np.array([time.perf_counter() - began])
        self.comm.all_reduce(slowest, "max").wait()
        return float(slowest[0])
