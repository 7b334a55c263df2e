"""W ranks against one: the same vectors and the same tables, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from embedding.collection import TableWiseEmbedding
from embedding.comm import SingleComm
from embedding.jagged import Jagged
from embedding.plan import TableSpec, plan_table_wise
from embedding.topology import share_of, start_of


@dataclass
class Case:
    """A few batches on a few tables."""

    seed: int
    rows: tuple[int, ...] = (50, 3, 700, 20, 9)
    batches: tuple[int, ...] = (13, 13, 6)
    dim: int = 6
    hotness: int = 1  # 1: exactly one key a bag; otherwise 0 .. hotness
    weighted: bool = False
    kind: str = "adam"
    dtype: str = "float32"
    key_dtype: str = "int32"
    first: int = 1
    compiled: bool = True
    poolings: tuple[str, ...] = ("sum", "mean")  # repeated as needed; every bag of concat holds ``hotness`` keys

    def pooling(self, table: int) -> str:
        return self.poolings[table % len(self.poolings)]


def draw(case: Case, rng: np.random.Generator, num_rows: int) -> Jagged:
    """Keys of one global batch."""
    one_hot = case.hotness == 1
    bags = len(case.rows) * num_rows
    lengths = np.ones(bags, np.int64) if one_hot else rng.integers(0, case.hotness + 1, bags)
    for table in range(len(case.rows)):
        if case.pooling(table) == "concat":
            lengths[table * num_rows : (table + 1) * num_rows] = case.hotness
    per_table = lengths.reshape(len(case.rows), num_rows).sum(axis=1)
    keys = [rng.integers(0, rows, count) for rows, count in zip(case.rows, per_table, strict=True)]
    return Jagged(
        keys=np.concatenate(keys).astype(case.key_dtype),
        offsets=None if one_hot else np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        weights=rng.uniform(-1, 1, int(lengths.sum())).astype(np.float32) if case.weighted else None,
        num_tables=len(case.rows),
        num_rows=num_rows,
    )


def part_of(batch: Jagged, begin: int, end: int) -> Jagged:
    """Rows ``begin .. end`` of a batch; bags of one key each lose their offsets, as a loader may do."""
    offsets = np.arange(batch.num_tables * batch.num_rows + 1) if batch.offsets is None else batch.offsets
    bags = [table * batch.num_rows + row for table in range(batch.num_tables) for row in range(begin, end)]
    places = [np.arange(offsets[bag], offsets[bag + 1]) for bag in bags]
    where = np.concatenate([np.empty(0, np.int64), *places])
    lengths = np.array([len(place) for place in places], np.int64)
    one_hot = bool((lengths == 1).all())
    return Jagged(
        keys=batch.keys[where],
        offsets=None if one_hot else np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        weights=None if batch.weights is None else batch.weights[where],
        num_tables=batch.num_tables,
        num_rows=end - begin,
    )


def build(case: Case, comm: Any) -> TableWiseEmbedding:
    """The tables over ``comm``."""
    specs = [
        TableSpec(name=f"t{i}", rows=rows, dim=case.dim, hotness=case.hotness, pooling=case.pooling(i))
        for i, rows in enumerate(case.rows)
    ]
    return TableWiseEmbedding(
        specs=specs,
        plan=plan_table_wise(specs, comm.size),
        comm=comm,
        device=HostDevice(1, compiled=case.compiled),
        optimizer=OptimizerConfig(kind=case.kind),  # type: ignore[arg-type]
        dtype=case.dtype,
        seed=case.seed,
        first=case.first,
    )


def train(case: Case, comm: Any) -> tuple[list[np.ndarray], dict[str, np.ndarray], dict[str, int]]:
    """This rank's vectors of each batch, its tables with their state, and the bytes of the last batch."""
    rng = np.random.default_rng(case.seed)
    embedding = build(case, comm)
    places = case.first + len(case.rows)
    capacity = share_of(max(case.batches), comm.size, comm.rank)
    vectors = np.zeros((capacity, places, case.dim), case.dtype)
    gradients = np.zeros_like(vectors)
    buffers = embedding.buffers(capacity, vectors, gradients)
    seen = []
    for step, total in enumerate(case.batches, 1):
        batch = draw(case, rng, total)
        gradient = rng.standard_normal((total, places, case.dim)).astype(case.dtype)
        begin, end = (start_of(total, comm.size, rank) for rank in (comm.rank, comm.rank + 1))
        vectors.fill(-5)
        embedding.input_dist(part_of(batch, begin, end), buffers, total)
        embedding.lookup(buffers)
        embedding.output_dist(buffers)
        assert (vectors[:, : case.first] == -5).all()
        assert (vectors[end - begin :] == -5).all()
        seen.append(vectors[: end - begin, case.first :].copy())
        gradients[: end - begin] = gradient[begin:end]
        embedding.grad_dist(buffers)
        embedding.sparse_update(buffers, 0.1, step)
    tables = {}
    for table in embedding.tables:
        tables[table.spec.name] = table.weight.copy()
        tables |= {f"{table.spec.name}.{name}": array.copy() for name, array in table.state.items()}
    return seen, tables, embedding.bytes_sent(buffers)


def check(case: Case, comm: Any) -> dict[str, np.ndarray]:
    """Train on ``comm`` and, beside it, alone; this rank's part must be the same bits.

    Returns:
        This rank's tables.
    """
    seen, tables, _ = train(case, comm)
    alone, everything, _ = train(case, SingleComm())
    for mine, whole, total in zip(seen, alone, case.batches, strict=True):
        begin, end = (start_of(total, comm.size, rank) for rank in (comm.rank, comm.rank + 1))
        np.testing.assert_array_equal(mine, whole[begin:end])
        assert np.isfinite(mine).all()
    for name, array in tables.items():
        np.testing.assert_array_equal(array, everything[name], err_msg=name)
    return tables


CASES = [
    Case(seed=1),
    Case(seed=2, hotness=4, kind="sgd"),
    Case(seed=3, hotness=3, weighted=True, kind="ftrl", dtype="float64", key_dtype="int64"),
    Case(seed=4, hotness=2, kind="rowwise_adagrad", batches=(9, 2, 1), first=0),
    Case(seed=5, rows=(40,), hotness=3, kind="momentum", batches=(3, 17)),
    Case(seed=6, weighted=True, kind="adagrad", batches=(1, 5)),
]
