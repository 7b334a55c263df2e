"""Tables exchanged by lists of fixed capacity against ``HybridEmbedding`` on one rank, trained on the same batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.scalars import OVERFLOW, SIZE, write_guard, write_scalars
from embedding.captured_exchange import ExchangeBuffers, ExchangedEmbedding
from embedding.captured_placement import owner_shares
from embedding.comm import SingleComm
from embedding.hybrid import HybridEmbedding
from embedding.jagged import Jagged
from embedding.placement import Placement, Plan, TableSpec
from embedding.sparse_optim import constants
from embedding.topology import share_of, start_of

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
    short: float = 1.0  # below 1: lists have room for this part of what is expected, and for nothing more


def optimizer(case: ExchangeCase) -> OptimizerConfig:
    # A generous eps: with a small one, Adam's first step takes the sign of a sum whose rounding differs.
    return OptimizerConfig(kind=case.kind, eps=0.05, initial_accumulator=0.1)  # type: ignore[arg-type]


def plan_of(case: ExchangeCase, ranks: int) -> Plan:
    specs = tuple(TableSpec(name=f"t{i}", rows=rows, dim=case.dim) for i, rows in enumerate(case.rows))
    made = {
        "hybrid": lambda table, rows: Placement(kind="hybrid", threshold=max(1, rows // 8)),
        "table_wise": lambda table, rows: Placement(kind="table_wise", owner=(table + 1) % ranks),
        "row_wise": lambda table, rows: Placement(kind="row_wise"),
        "replicated": lambda table, rows: Placement(kind="replicated", threshold=rows),
    }
    placements = [made[kind](table, case.rows[table]) for table, kind in enumerate(case.kinds)]
    return Plan(specs=specs, placements=tuple(placements), ranks=ranks)


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
    shards: list[tuple[str, range, bool, dict[str, np.ndarray], np.ndarray]]
    overflows: int


def arrays_of(shard: Any) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in ({"weight": shard.weight} | shard.state).items()}


def train(case: ExchangeCase, comm: Any, device: Any = None, vector_type: Any = np.float32) -> Outcome:
    """Run the batches; two are in flight, and a batch whose lists run over is run again with exact ones."""
    plan, work, size, rank = plan_of(case, comm.size), draw(case), comm.size, comm.rank
    shares = owner_shares(plan, list(work[0][0]))
    embedding = ExchangedEmbedding(
        plan=plan, comm=comm, topology=None, device=device or HostDevice(compiled=False), optimizer=optimizer(case),
        table_dtype=np.float32, seed=case.seed, first=case.first, deterministic=case.deterministic,
        exchange_precision=case.precision, shares=shares * case.short,  # type: ignore[arg-type]
        sigmas=10.0 if case.short == 1 else 0.0,
    )  # fmt: skip
    embedding.track_touched()
    capacity = share_of(max(case.batches), size, 0)
    flights = []
    for _ in range(2):
        vectors = np.zeros((capacity, case.first + len(case.rows), case.dim), vector_type)
        gradients = np.zeros_like(vectors)
        flights.append((vectors, gradients, embedding.buffers(capacity, vectors, gradients)))

    def begin(number: int) -> None:
        keys, buffers = work[number][0], flights[number % 2][2]
        total = keys.shape[1]
        buffers.keys[: keys.size] = keys.reshape(-1)
        embedding.input_dist(buffers, share_of(total, size, rank), total)

    guard = write_guard(np.empty(SIZE, np.float32), LOSS_SCALE)
    seen, overflows = [], 0
    begin(0)
    for step, (keys, gradient) in enumerate(work, 1):
        total = keys.shape[1]
        vectors, gradients, buffers = flights[(step - 1) % 2]
        if step < len(work):
            begin(step)
        mine = slice(start_of(total, size, rank), start_of(total, size, rank + 1))
        gradients[: mine.stop - mine.start] = gradient[mine] * LOSS_SCALE
        scalars = write_scalars(
            np.empty(SIZE, np.float32), lr=LR, global_rows=total, valid_rows=mine.stop - mine.start, step=step, seed=1,
            sparse=constants(optimizer(case), LR, step).tolist(),
        )  # fmt: skip
        before = [arrays_of(shard) for shard in settled(embedding)]
        run_step(embedding, buffers, scalars, guard, vectors, case.first)
        if guard.view(np.int32)[OVERFLOW]:
            overflows += 1
            # Nothing was written, here or in steps that were under way.
            for old, shard in zip(before, settled(embedding), strict=True):
                for name, array in arrays_of(shard).items():
                    np.testing.assert_array_equal(array, old[name])
            embedding.clear_overflow(guard)
            exact = embedding.exact(buffers, mine.stop - mine.start, total)
            run_step(embedding, exact, scalars, guard, vectors, case.first)
            assert not guard.view(np.int32)[OVERFLOW]
        seen.append(vectors[: mine.stop - mine.start, case.first :].copy())
    shards = [
        (shard.table, shard.rows, shard.replicated, arrays_of(shard), np.array(shard.touched))
        for shard in settled(embedding)
    ]
    return Outcome(seen, shards, overflows)


def settled(embedding: ExchangedEmbedding) -> list[Any]:
    embedding.settle()
    return embedding.shards()


def run_step(
    embedding: ExchangedEmbedding, buffers: ExchangeBuffers, scalars: np.ndarray, guard: np.ndarray,
    vectors: np.ndarray, first: int,
) -> None:  # fmt: skip
    vectors.fill(77)
    embedding.lookup(buffers)
    embedding.output_dist(buffers)
    assert (vectors[:, :first] == 77).all()
    assert (vectors[buffers.num_rows :] == 77).all()
    embedding.raise_overflow(buffers, guard)
    embedding.grad_dist(buffers)
    embedding.sparse_update(buffers, scalars, guard)


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
    for table, rows, _, arrays, touched in outcome.shards:
        where = slice(rows.start, rows.stop, rows.step)
        np.testing.assert_array_equal(touched, expected.touched[table][where], err_msg=table)
        for name, array in arrays.items():
            want = expected.tables[table][name][where]
            np.testing.assert_allclose(array, want, rtol=tolerance, atol=tolerance, err_msg=f"{table}.{name}")


def check_all(case: ExchangeCase, outcomes: list[Outcome]) -> None:
    """All ranks' outcomes, and that every row lies on exactly one rank or on all, with the same bits."""
    expected = run_alone(case)
    held: dict[str, np.ndarray] = {f"t{i}": np.zeros(rows, np.int64) for i, rows in enumerate(case.rows)}
    replicas: dict[str, dict[str, np.ndarray]] = {}
    for rank, outcome in enumerate(outcomes):
        check(case, outcome, expected, rank, len(outcomes))
        for table, rows, replicated, arrays, _ in outcome.shards:
            if replicated and rank:
                for name, array in arrays.items():
                    np.testing.assert_array_equal(array, replicas[table][name], err_msg=f"replica {rank} of {table}")
                continue
            if replicated:
                replicas[table] = arrays
            held[table][rows.start : rows.stop : rows.step] += 1
    assert all((count == 1).all() for count in held.values())
    assert len({outcome.overflows for outcome in outcomes}) == 1


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
    ExchangeCase(seed=17, kinds=("row_wise",) * 6, batches=(2, 1, 2)),
)  # fmt: skip
