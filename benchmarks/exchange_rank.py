"""Program of one rank of ``exchange.py``: every plan and exchange, on batches that are the same for all of them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.threads import launched_ranks, settle_threads

settle_threads()

import numpy as np  # noqa: E402
from exchange import PLANS, parse  # noqa: E402

from dlrm.config import ModelConfig, OptimizerConfig  # noqa: E402
from dlrm.device import HostDevice  # noqa: E402
from dlrm.loss import bce_with_logits  # noqa: E402
from dlrm.model import DenseModel  # noqa: E402
from embedding.all_to_all import Flat, Hierarchical  # noqa: E402
from embedding.comm import Comm  # noqa: E402
from embedding.comm_counting import CountingComm  # noqa: E402
from embedding.comm_mpi import world  # noqa: E402
from embedding.frequency import RowCounts, hugectr_threshold  # noqa: E402
from embedding.hybrid import HybridEmbedding  # noqa: E402
from embedding.jagged import Jagged  # noqa: E402
from embedding.links import LinkRates, probe  # noqa: E402
from embedding.placement import Plan, TableSpec  # noqa: E402
from embedding.plan import Forced, make_plans  # noqa: E402
from embedding.plan_trial import Trial, plans_on_first_rank  # noqa: E402
from embedding.topology import Topology, discover, share_of  # noqa: E402

MLPERF_ROWS = (
    *(39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10),
    *(2208, 11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36),
)
"""Criteo 1TB with at most 40 million rows a table, as in MLPerf Training."""

SGD = OptimizerConfig(kind="sgd")
NUM_DENSE = 13
_BATCHES = 3
_COUNTED_ROWS = 1 << 18
"""Rows that a plan's look-ups are counted over: other ones than those that are timed."""


@dataclass
class Setting:
    """What the plans of one exponent and batch share."""

    options: Any
    specs: tuple[TableSpec, ...]
    batch: int
    exponent: float
    keys: list[Jagged]
    comm: CountingComm
    topology: Topology
    links: LinkRates
    counts: RowCounts | None = None

    @property
    def carrier(self) -> Comm:
        """The same ranks, not counted."""
        return self.comm.comm


def draw(specs: Any, sums: Any, rows: int, rng: np.random.Generator) -> Jagged:
    """Keys by a power law over the rows of each table."""
    keys = [np.searchsorted(total, rng.random(rows) * total[-1]).clip(max=len(total) - 1) for total in sums]
    return Jagged(np.concatenate(keys).astype(np.int32), None, None, len(specs), rows)


def plans_of(setting: Setting, name: str, mode: str) -> list[Plan]:
    """The plans that a name stands for; several, one of which is to be chosen by trial, for ``auto``."""
    kind, deduplicate = PLANS[name]
    specs, comm = setting.specs, setting.comm

    def make() -> list[Plan]:
        counts = setting.counts
        assert counts is not None
        forced: dict[str, Any] = {}
        for table, spec in enumerate(specs):
            threshold = None
            if name == "HugeCTR's threshold":
                threshold = hugectr_threshold(
                    -np.sort(-counts.counts[table]), batches=counts.samples // setting.batch, ranks=comm.size,
                    batch_size=setting.batch,
                    bandwidth_ratio=setting.links.across.bytes_per_s / setting.links.across_reduce.bytes_per_s,
                )  # fmt: skip
            if kind and (kind != "hybrid" or spec.rows > 1):
                forced[spec.name] = Forced(kind=kind, threshold=threshold)  # type: ignore[arg-type]
        return make_plans(
            specs, comm.size, setting.topology.num_nodes, batch_size=setting.batch, optimizer=SGD, placements=forced,
            frequencies={spec.name: counts.frequency(table) for table, spec in enumerate(specs)},
            links=setting.links, deduplicate=deduplicate, all_to_all=mode,  # type: ignore[arg-type]
        )  # fmt: skip

    plans = plans_on_first_rank(setting.carrier, make)
    return plans if name == "auto" else plans[:1]


def chosen_plan(setting: Setting, name: str, mode: str) -> Plan:
    """As a run chooses it."""
    trial = Trial(
        comm=setting.carrier, topology=setting.topology, device=HostDevice(1), optimizer=SGD, dtype=np.float32,
        first=1, batches=[(keys, setting.batch) for keys in setting.keys[:2]], steps=5,
    )  # fmt: skip
    return trial.fastest(plans_of(setting, name, mode))


class Dense:
    """What the lanes of all plans train on: arrays of one batch, and the dense lane where it is asked for."""

    def __init__(self, setting: Setting) -> None:
        options, rows = setting.options, setting.keys[0].num_rows
        layers = ModelConfig(embedding_dim=options.dim, bottom_mlp=(64, options.dim), top_mlp=(256, 64, 1))
        self.model = DenseModel(
            model=layers, num_dense=NUM_DENSE, num_tables=len(setting.specs), dtype=np.float32, device=HostDevice(1),
            seed=1,
        )  # fmt: skip
        self.setting, self.rows, self.space = setting, rows, self.model.workspace(rows)
        self.space.vectors.fill(0)
        self.space.grad_vectors.fill(1e-6)
        self.dense, self.labels = np.ones((rows, NUM_DENSE), np.float32), np.zeros(rows, np.float32)

    def train(self) -> None:
        """One step of the dense lane."""
        model, space, rows = self.model, self.space, self.rows
        model.bottom_forward(self.dense, space)
        logits = model.top_forward(space, rows)
        bce_with_logits(logits, self.labels, self.setting.batch, space.grad_logits[:rows], HostDevice(1))
        model.top_data_backward(space, rows)
        model.top_weight_backward(space, rows)
        model.bottom_backward(self.dense, space, rows)
        self.setting.carrier.all_reduce(model.flat_gradients).wait()


class Lane:
    """The tables of one plan, and what its steps took: traffic of all ranks, seconds of the slowest."""

    def __init__(self, setting: Setting, name: str, plan: Plan, dense: Dense) -> None:
        comm, self.name, self.plan, self.setting, self.dense = setting.comm, name, plan, setting, dense
        counted, staged = discover(comm), plan.all_to_all == "hierarchical"
        self.embedding = HybridEmbedding(
            specs=setting.specs, plan=plan, comm=comm, device=HostDevice(1), optimizer=SGD, dtype=np.float32,
            seed=setting.options.seed, first=1, all_to_all=Hierarchical(comm, counted) if staged else Flat(comm),
            topology=counted,
        )  # fmt: skip
        self.buffers = self.embedding.buffers(dense.rows, dense.space.vectors, dense.space.grad_vectors)
        self.rounds: list[list[tuple[float, float]]] = []
        self.traffic: list[Any] = []
        self.steps = 0
        for _ in range(_BATCHES):  # compiles, allocates, touches rows
            self.step()
        self.traffic.clear()

    def measure(self) -> None:
        """Time some steps."""
        options, times = self.setting.options, [self.step() for _ in range(3)]
        while len(times) < options.steps and sum(step for _, step in times) < options.seconds:
            times.append(self.step())
        self.rounds.append(times)

    def step(self) -> tuple[float, float]:
        """Seconds of the lane, and with the dense one."""
        setting, comm, embedding = self.setting, self.setting.comm, self.embedding
        comm.comm.barrier()
        comm.traffic.clear()
        began = time.perf_counter()
        embedding.input_dist(setting.keys[self.steps % _BATCHES], self.buffers, setting.batch)
        embedding.lookup(self.buffers)
        embedding.output_dist(self.buffers)
        paused = time.perf_counter()
        if setting.options.dense:
            self.dense.train()
        paused = time.perf_counter() - paused
        embedding.grad_dist(self.buffers)
        self.steps += 1
        embedding.sparse_update(self.buffers, 0.01, self.steps)
        ended = time.perf_counter()
        slowest = np.array([ended - began - paused, ended - began])
        comm.comm.all_reduce(slowest, "max").wait()
        sent, own = comm.traffic, embedding.bytes_sent(self.buffers)
        numbers = np.array(
            [sent.messages_across, sent.bytes_across, sent.messages_inside, sent.bytes_inside, own["input_dist"],
             own["output_dist"] + own["grad_dist"] + own["all_reduce"]]
        )  # fmt: skip
        comm.comm.all_reduce(numbers).wait()
        self.traffic.append(numbers)
        return float(slowest[0]), float(slowest[1])

    def figures(self) -> dict[str, Any]:
        """Per step."""
        names = ("messages_across", "bytes_across", "messages_inside", "bytes_inside", "key_bytes", "vector_bytes")
        lanes, steps = zip(*(times for own in self.rounds for times in own), strict=True)
        plan = self.plan
        return {
            "plan": self.name,
            "exchange": plan.all_to_all,
            **dict(zip(names, np.mean(self.traffic, axis=0).tolist(), strict=True)),
            "lane_best": min(lanes),
            "lane_median": statistics.median(lanes),
            "lane_rounds": [statistics.median(lane for lane, _ in own) for own in self.rounds],
            "step_best": min(steps),
            "step_median": statistics.median(steps),
            "predicted": plan.step_seconds,
            "predicted_parts": dict(plan.seconds),
            "frequent_rows": sum(placement.threshold for placement in plan.placements),
            "label": plan.label,
            "trials": plan.trials,
        }


def names_of(options: Any) -> Iterator[tuple[str, str]]:
    """Every plan with every exchange."""
    for name in options.plans:
        pooled = name == "table-wise"  # pooled vectors travel flat
        for mode in ("auto",) if name == "auto" else ("flat",) if pooled else options.exchanges:
            yield name, mode


def main() -> None:
    """Every exponent, batch, plan and exchange."""
    options = parse()
    carrier = world(launched_ranks())
    topology = discover(carrier)
    comm = CountingComm(carrier, topology.node_of)
    specs = tuple(
        TableSpec(name=f"t{i}", rows=max(1, rows // options.scale), dim=options.dim)
        for i, rows in enumerate(MLPERF_ROWS)
    )
    probe(carrier, topology)  # compiles
    began = time.perf_counter()
    links = probe(carrier, topology)
    probe_s = time.perf_counter() - began
    results = []
    for exponent in options.exponents:
        sums = [np.cumsum(np.arange(1, spec.rows + 1) ** -exponent) for spec in specs]
        for batch in options.batches:
            rng = np.random.default_rng([options.seed, batch, carrier.rank])
            keys = [draw(specs, sums, share_of(batch, carrier.size, carrier.rank), rng) for _ in range(_BATCHES)]
            setting = Setting(options, specs, batch, exponent, keys, comm, topology, links)
            if carrier.rank == 0:
                setting.counts = RowCounts([spec.rows for spec in specs])
                for _ in range(max(1, min(32, _COUNTED_ROWS // batch))):
                    setting.counts.add(draw(specs, sums, batch, rng))
            dense, names = Dense(setting), list(names_of(options))
            # Rounds take all plans in turn, so that what else goes on meets them alike; a single one keeps no tables.
            kept: list[Lane] = []
            for name, mode in names:
                lane = Lane(setting, name, chosen_plan(setting, name, mode), dense)
                if options.rounds > 1:
                    kept.append(lane)
                    continue
                lane.measure()
                results.append({"exponent": exponent, "batch": batch, **lane.figures()})
                del lane
            for _ in range(options.rounds if kept else 0):
                for lane in kept:
                    lane.measure()
            results += [{"exponent": exponent, "batch": batch, **lane.figures()} for lane in kept]
    if carrier.rank == 0:
        figures = {"links": links.to_values(), "probe_seconds": probe_s, "results": results}
        options.rank_output.write_text(json.dumps(figures))
    carrier.barrier()


if __name__ == "__main__":
    main()
