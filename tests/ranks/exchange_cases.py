"""Tables exchanged by lists of fixed capacity against ``HybridEmbedding`` on one rank, trained on the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.scalars import OVERFLOW, SIZE, write_guard, write_scalars
from embedding.captured_exchange import ExchangeBuffers, ExchangedEmbedding
from embedding.captured_placement import MostRows, node_rows, owner_shares
from embedding.comm import SingleComm
from embedding.frequent_rows import places_of_rows
from embedding.hybrid import HybridEmbedding
from embedding.jagged import Jagged
from embedding.placement import Placement, Plan, TableSpec
from embedding.sparse_optim import constants
from embedding.topology import discover, share_of, start_of

LR = 0.1
LOSS_SCALE = 64.0


@dataclass
class ExchangeCase:
    """Some batches on tables of every placement."""

    seed: int
    rows: tuple[int, ...] = (50, 3, 700, 20, 9, 400)
    kinds: tuple[str, ...] = ("hybrid", "table_wise", "row_wise", "replicated", "table_wise", "hybrid")
    batches: tuple[int, ...] = (48, 48, 7, 48)
    dim: int = 4
    kind: str = "sgd"
    deterministic: bool = False
    precision: str = "fp32"
    first: int = 1
    nodes: int = 1
    touched: bool = False  # gradients of touched rows alone are summed
    once: bool = False  # each distinct row travels once for each pair of ranks
    short: float = 1.0  # below 1: lists have room for this part of what is expected, and for nothing more


def optimizer(case: ExchangeCase) -> OptimizerConfig:
    # A generous eps: with a small one, Adam's first step takes the sign of a sum whose rounding differs.
    return OptimizerConfig(kind=case.kind, eps=0.05, initial_accumulator=0.1)  # type: ignore[arg-type]


def column_owners(table: int, dim: int, ranks: int) -> tuple[int, ...]:
    """The owners of a table's parts of columns; of some tables as many as can be, of others fewer."""
    cuts = [parts for parts in range(1, ranks + 1) if dim % (4 * parts) == 0]
    return tuple((table + part) % ranks for part in range(cuts[-1 - table % len(cuts)]))


def plan_of(case: ExchangeCase, ranks: int) -> Plan:
    specs = tuple(TableSpec(name=f"t{i}", rows=rows, dim=case.dim) for i, rows in enumerate(case.rows))
    made = {
        "hybrid": lambda table, rows: Placement(kind="hybrid", threshold=max(1, rows // 8)),
        "listed": lambda table, rows: Placement(kind="hybrid", threshold=max(1, rows // 8), listed=True),
        "table_wise": lambda table, rows: Placement(kind="table_wise", owner=(table + 1) % ranks),
        "row_wise": lambda table, rows: Placement(kind="row_wise"),
        "replicated": lambda table, rows: Placement(kind="replicated", threshold=rows),
        "column_wise": lambda table, rows: Placement(kind="column_wise", owners=column_owners(table, case.dim, ranks)),
    }
    placements = [made[kind](table, case.rows[table]) for table, kind in enumerate(case.kinds)]
    return Plan(specs=specs, placements=once_of(case, placements), ranks=ranks)


def once_of(case: ExchangeCase, placements: Sequence[Placement]) -> tuple[Placement, ...]:
    """The placements, de-duplicated where that is asked for and can be."""
    whole = ("replicated", "column_wise")
    return tuple(replace(own, deduplicate=case.once and own.kind not in whole) for own in placements)


def lists_of(case: ExchangeCase, plan: Plan) -> dict[str, np.ndarray]:
    """The frequent rows of the tables that list them, most of them below half."""
    rng, lists = np.random.default_rng(case.seed + 1), {}
    for spec, placement in zip(plan.specs, plan.placements, strict=True):
        if placement.listed:
            odds = np.where(np.arange(spec.rows) < spec.rows // 2, 4.0, 1.0)
            rows = rng.choice(spec.rows, placement.threshold, replace=False, p=odds / odds.sum())
            lists[spec.name] = np.sort(rows).astype(np.int64)
    return lists


def most_rows(case: ExchangeCase, plan: Plan, places: np.ndarray, nodes: Sequence[Sequence[int]] | None) -> MostRows:
    """What lists of distinct rows have room for, by one batch's places; little where they are to run over."""
    enough = case.short >= 1
    most = MostRows.measure(
        plan, list(places), nodes, lambda groups: node_rows(plan, places, groups, 10.0 if enough else 0.0),
        3.0 if enough else -2.0,
    )  # fmt: skip
    return most if case.touched else replace(most, touched=None)


def draw(case: ExchangeCase) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each batch keys [T, G] that favour low rows, and gradients [G, F, D]."""
    rng = np.random.default_rng(case.seed)
    work = []
    for total in case.batches:
        keys = np.stack([(rows * rng.random(total) ** 3).astype(np.int32) for rows in case.rows])
        gradients = rng.standard_normal((total, case.first + len(case.rows), case.dim)).astype(np.float32) / total
        work.append((keys, gradients))
    return work


@dataclass
class Outcome:
    """What one rank saw and has: vectors of each batch, arrays of each shard, overflows met."""

    vectors: list[np.ndarray]
    shards: list[tuple[str, range, range, bool, dict[str, np.ndarray], np.ndarray]]
    overflows: int


def arrays_of(shard: Any) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in ({"weight": shard.weight} | shard.state).items()}


class Trainer:
    """One rank's tables and two batches in flight."""

    def __init__(self, case: ExchangeCase, comm: Any, device: Any, host: Any = None) -> None:
        self.case, self.comm, self.device = case, comm, device
        self.work, plan = draw(case), plan_of(case, comm.size)
        lists = lists_of(case, plan)
        first = np.stack([places_of_rows(k, lists.get(f"t{i}")) for i, k in enumerate(self.work[0][0])])
        shares = owner_shares(plan, list(first))
        topology = discover(host or comm, case.nodes)
        nodes = [topology.ranks_of(node) for node in range(case.nodes)]
        if host is not None:  # groups that carry buffers of the device
            inside = comm.split(topology.node, topology.local_rank)
            topology = replace(topology, inside=inside, across=comm.split(topology.local_rank, topology.node))
        self.embedding = ExchangedEmbedding(
            plan=plan, comm=comm, topology=topology, device=device, optimizer=optimizer(case),
            table_dtype=np.float32, seed=case.seed, first=case.first, deterministic=case.deterministic,
            exchange_precision=case.precision, shares=shares * case.short,  # type: ignore[arg-type]
            sigmas=10.0 if case.short == 1 else 0.0, hierarchical=case.nodes > 1,
            most=most_rows(case, plan, first, nodes), lists=lists,
        )  # fmt: skip
        self.embedding.track_touched()
        self.guard = device.xp.asarray(write_guard(np.empty(SIZE, np.float32), LOSS_SCALE))
        self.scalars = device.zeros(SIZE, np.float32)
        capacity = share_of(max(case.batches), comm.size, 0)
        self.flights = []
        for _ in range(2):
            shape = (capacity, case.first + len(case.rows), case.dim)
            vectors, gradients = device.zeros(shape, np.float32), device.zeros(shape, np.float32)
            self.flights.append(self.embedding.buffers(capacity, vectors, gradients))

    def rows_of(self, total: int) -> slice:
        """This rank's rows of a batch."""
        return slice(
            start_of(total, self.comm.size, self.comm.rank), start_of(total, self.comm.size, self.comm.rank + 1)
        )

    def upload(self, number: int) -> ExchangeBuffers:
        """Bring a batch's keys to its Flight."""
        keys, buffers = self.work[number][0], self.flights[number % 2]
        self.device.upload(keys.reshape(-1), buffers.keys[: keys.size])
        return buffers

    def input_dist(self, number: int) -> None:
        """Find out what travels of a batch."""
        total = self.work[number][0].shape[1]
        own = self.rows_of(total)
        self.embedding.input_dist(self.flights[number % 2], own.stop - own.start, total)

    def set_up(self, number: int) -> None:
        """Bring a step's scalars and gradients to the device."""
        keys, gradient = self.work[number]
        own, step = self.rows_of(keys.shape[1]), number + 1
        buffers = self.flights[number % 2]
        self.device.upload(gradient[own] * np.float32(LOSS_SCALE), buffers.grad_vectors[: own.stop - own.start])
        numbers = constants(optimizer(self.case), LR, step).tolist()
        block = write_scalars(
            np.empty(SIZE, np.float32), lr=LR, global_rows=keys.shape[1], valid_rows=own.stop - own.start, step=step,
            seed=1, sparse=numbers,
        )  # fmt: skip
        self.device.upload(block, self.scalars)

    def step(self, buffers: ExchangeBuffers) -> None:
        """Everything between the upload and the next step; nothing that a graph could not capture."""
        buffers.vectors.fill(77)
        self.embedding.lookup(buffers)
        self.embedding.output_dist(buffers)
        self.embedding.raise_overflow(buffers, self.guard)
        self.embedding.sum_replicated(buffers)
        self.embedding.grad_dist(buffers)
        self.embedding.reduce_replicated(buffers)
        self.embedding.sparse_update(buffers, self.scalars, self.guard)

    def overflowed(self) -> bool:
        """Whether the guard says so."""
        return bool(self.device.to_host(self.guard).view(np.int32)[OVERFLOW])

    def vectors(self, number: int) -> np.ndarray:
        """What a batch's look-up came to: [B, T, D]; all other places are as they were."""
        own, buffers = self.rows_of(self.work[number][0].shape[1]), self.flights[number % 2]
        vectors, rows = self.device.to_host(buffers.vectors), own.stop - own.start
        assert (vectors[:, : self.case.first] == 77).all()
        assert (vectors[rows:] == 77).all()
        return vectors[:rows, self.case.first :].copy()

    def shards(self) -> list[Any]:
        """The tables, up to date."""
        self.embedding.settle()
        return self.embedding.shards()


def train(case: ExchangeCase, comm: Any, device: Any = None, host: Any = None) -> Outcome:
    """Run the batches; two are in flight, and a batch whose lists run over is run again with exact ones."""
    trainer = Trainer(case, comm, device or HostDevice(compiled=False), host)
    seen, overflows = [], 0
    trainer.upload(0)
    trainer.input_dist(0)
    for number, (keys, _) in enumerate(trainer.work):
        if number + 1 < len(trainer.work):
            trainer.upload(number + 1)
            trainer.input_dist(number + 1)
        trainer.set_up(number)
        buffers, before = trainer.flights[number % 2], [arrays_of(shard) for shard in trainer.shards()]
        trainer.step(buffers)
        if trainer.overflowed():
            overflows += 1
            for old, shard in zip(before, trainer.shards(), strict=True):
                for name, array in arrays_of(shard).items():
                    np.testing.assert_array_equal(array, old[name])  # nothing was written
            trainer.embedding.clear_overflow(trainer.guard)
            own = trainer.rows_of(keys.shape[1])
            trainer.step(trainer.embedding.exact(buffers, own.stop - own.start, keys.shape[1]))
            assert not trainer.overflowed()
        seen.append(trainer.vectors(number))
    return outcome_of(trainer, seen, overflows)


def outcome_of(trainer: Trainer, seen: list[np.ndarray], overflows: int) -> Outcome:
    """What a rank has at the end."""
    shards = [
        (shard.table, shard.rows, shard.columns, shard.replicated, arrays_of(shard), np.array(shard.touched))
        for shard in trainer.shards()
    ]
    return Outcome(seen, shards, overflows)


@dataclass
class Expected:
    """What one rank comes to: vectors [G, T, D] of each batch; weights, state and touched rows by table."""

    vectors: list[np.ndarray]
    tables: dict[str, dict[str, np.ndarray]]
    touched: dict[str, np.ndarray]


def run_alone(case: ExchangeCase) -> Expected:
    """The same batches by ``HybridEmbedding`` in float64 on a single rank."""
    plan = plan_of(replace(case, kinds=("table_wise",) * len(case.kinds)), 1)
    embedding = HybridEmbedding(
        specs=plan.specs, plan=plan, comm=SingleComm(), device=HostDevice(compiled=False), optimizer=optimizer(case),
        dtype=np.float64, seed=case.seed, first=case.first,
    )  # fmt: skip
    # Both start from the same weights, rounded to float32.
    for shard in embedding.shards():
        shard.weight[...] = shard.weight.astype(np.float32)
    embedding.track_touched()
    seen = []
    for step, (keys, gradient) in enumerate(draw(case), 1):
        total = keys.shape[1]
        vectors = np.zeros(gradient.shape)
        buffers = embedding.buffers(total, vectors, gradient.astype(np.float64))
        batch = Jagged(
            keys=keys.reshape(-1), offsets=None, weights=None, num_tables=len(case.rows), num_rows=total
        )  # fmt: skip
        embedding.input_dist(batch, buffers, total)
        embedding.lookup(buffers)
        embedding.output_dist(buffers)
        seen.append(vectors[:, case.first :].copy())
        embedding.grad_dist(buffers)
        embedding.sparse_update(buffers, LR, step)
    shards = embedding.shards()
    touched = {shard.table: np.array(shard.touched) for shard in shards}
    return Expected(seen, {shard.table: arrays_of(shard) for shard in shards}, touched)


def check(case: ExchangeCase, outcome: Outcome, expected: Expected, rank: int, ranks: int) -> None:
    """One rank's vectors and shards."""
    tolerance = {"fp32": 1e-3 if case.kind == "ftrl" else 2e-5, "fp16": 2e-3, "bf16": 2e-2}[case.precision]
    for step, total in enumerate(case.batches):
        mine = slice(start_of(total, ranks, rank), start_of(total, ranks, rank + 1))
        np.testing.assert_allclose(
            outcome.vectors[step], expected.vectors[step][mine], rtol=tolerance, atol=tolerance, err_msg=f"step {step}"
        )
    assert outcome.shards
    for table, rows, columns, _, arrays, touched in outcome.shards:
        where = slice(rows.start, rows.stop, rows.step)
        np.testing.assert_array_equal(touched, expected.touched[table][where], err_msg=table)
        for name, array in arrays.items():
            want = expected.tables[table][name][where]
            want = want[:, columns.start : columns.stop] if want.ndim > 1 else want
            np.testing.assert_allclose(array, want, rtol=tolerance, atol=tolerance, err_msg=f"{table}.{name}")


def check_all(case: ExchangeCase, outcomes: list[Outcome], expected: Expected | None = None) -> None:
    """All ranks' outcomes, and that every column of a row lies on exactly one rank or on all, with the same bits."""
    expected = expected or run_alone(case)
    held = {f"t{i}": np.zeros((rows, case.dim), np.int64) for i, rows in enumerate(case.rows)}
    replicas: dict[str, dict[str, np.ndarray]] = {}
    for rank, outcome in enumerate(outcomes):
        check(case, outcome, expected, rank, len(outcomes))
        for table, rows, columns, replicated, arrays, _ in outcome.shards:
            if replicated and rank:
                for name, array in arrays.items():
                    np.testing.assert_array_equal(array, replicas[table][name], err_msg=f"replica {rank} of {table}")
                continue
            if replicated:
                replicas[table] = arrays
            held[table][rows.start : rows.stop : rows.step, columns.start : columns.stop] += 1
    assert all((count == 1).all() for count in held.values())
    assert len({outcome.overflows for outcome in outcomes}) == 1


LISTED = ("listed", "table_wise", "listed", "listed", "hybrid", "replicated")
CUT = ("column_wise", "listed", "column_wise", "replicated", "table_wise", "column_wise")
CASES = (
    *(ExchangeCase(seed=number, kind=kind) for number, kind in enumerate(
        ("sgd", "momentum", "adagrad", "rowwise_adagrad", "adam", "ftrl"))),
    ExchangeCase(seed=10, deterministic=True),
    ExchangeCase(seed=11, kind="adam", deterministic=True, short=0.5),
    ExchangeCase(seed=12, short=0.3),
    ExchangeCase(seed=13, precision="fp16", kind="adagrad"),
    ExchangeCase(seed=14, precision="bf16"),
    ExchangeCase(seed=15, kinds=("table_wise",) * 6),
    ExchangeCase(seed=16, kinds=("replicated",) * 6, first=0),
    ExchangeCase(seed=18, nodes=2, dim=8),
    ExchangeCase(seed=22, nodes=2, kind="adam", deterministic=True, precision="bf16"),
    ExchangeCase(seed=26, nodes=2, short=0.4, kind="rowwise_adagrad"),
    ExchangeCase(seed=17, kinds=("row_wise",) * 6, batches=(2, 1, 2)),
    ExchangeCase(seed=28, kinds=LISTED, kind="adam", deterministic=True),
    ExchangeCase(seed=30, kinds=LISTED, nodes=2, short=0.4),
    ExchangeCase(seed=31, kinds=CUT, dim=24),
    ExchangeCase(seed=32, kinds=CUT, dim=48, kind="adam", deterministic=True, precision="bf16"),
    ExchangeCase(seed=33, kinds=CUT, dim=16, kind="adagrad", short=0.4),
    ExchangeCase(seed=34, kinds=CUT, dim=16, nodes=2, first=0),
    ExchangeCase(seed=35, kinds=("column_wise",) * 6, dim=16, kind="ftrl"),
    ExchangeCase(seed=45, touched=True, rows=(900, 3, 2000, 20, 9, 4000)),
    ExchangeCase(seed=46, touched=True, kind="adam", deterministic=True, kinds=("replicated",) * 6, short=0.4),
    ExchangeCase(seed=48, touched=True, kind="ftrl", kinds=LISTED, nodes=2, batches=(96, 3, 96)),
    ExchangeCase(seed=41, once=True),
    ExchangeCase(seed=42, once=True, kind="adam", deterministic=True, short=0.4, kinds=LISTED),
    ExchangeCase(seed=43, once=True, kind="adagrad", precision="bf16", kinds=CUT, dim=16),
    ExchangeCase(seed=47, once=True, nodes=2, dim=8),
    ExchangeCase(seed=49, once=True, nodes=2, kind="adam", deterministic=True, precision="bf16", kinds=LISTED),
    ExchangeCase(seed=50, once=True, nodes=2, short=0.4, kind="rowwise_adagrad"),
    ExchangeCase(seed=51, once=True, nodes=2, kinds=CUT, dim=16, batches=(96, 3, 96)),
    ExchangeCase(seed=44, once=True, kind="rowwise_adagrad", kinds=("row_wise", "table_wise") * 3, batches=(96, 3, 96)),
)  # fmt: skip
