"""W ranks and a plan against one rank: the same vectors, weights and optimiser state but for summation order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import embedding_cases as ec
import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from embedding.all_to_all import Flat, Hierarchical
from embedding.comm import SingleComm
from embedding.hybrid import HybridEmbedding
from embedding.jagged import Jagged
from embedding.placement import Placement, Plan, Prediction, TableSpec, places_of
from embedding.topology import discover, share_of, start_of


@dataclass
class HybridCase(ec.Case):
    """As ``Case``, with a placement for every table."""

    kinds: tuple[str, ...] = ("hybrid", "row_wise", "replicated", "table_wise", "column_wise")  # repeated as needed
    share: float = 0.3  # of a hybrid table's rows that are replicated
    deduplicate: bool = True
    nodes: int = 1
    precision: str = "fp32"
    same_key: bool = False
    distinct_keys: bool = False
    dtype: str = "float64"
    start_bytes: float = 0.0  # of an all-reduce: much of it makes all replicated rows' gradients travel


def placement_of(case: HybridCase, table: int, ranks: int) -> Placement:
    """A placement of the kind that is asked for, or the nearest that the table allows."""
    kind, rows = case.kinds[table % len(case.kinds)], case.rows[table]
    whole = 2 if case.dim % 2 == 0 and case.kind != "rowwise_adagrad" else 1
    match kind:
        case "table_wise":
            return Placement(kind="table_wise", owner=table % ranks)
        case "distinct_table_wise":
            return Placement(kind="table_wise", owner=table % ranks, deduplicate=True)
        case "column_wise":
            return Placement(kind="column_wise", owners=tuple((table + i) % ranks for i in range(whole)))
        case "replicated":
            return Placement(kind="replicated", threshold=rows, deduplicate=case.deduplicate)
        case "hybrid" if 0 < int(rows * case.share) < rows:
            return Placement(kind="hybrid", threshold=int(rows * case.share), deduplicate=case.deduplicate)
        case "listed" if 0 < int(rows * case.share) < rows:
            threshold = int(rows * case.share)
            return Placement(kind="hybrid", threshold=threshold, deduplicate=case.deduplicate, listed=True)
        case _:
            return Placement(kind="row_wise", deduplicate=case.deduplicate)


def specs_of(case: HybridCase) -> tuple[TableSpec, ...]:
    return tuple(
        TableSpec(name=f"t{i}", rows=rows, dim=case.dim, hotness=case.hotness, pooling=case.pooling(i))  # type: ignore[arg-type]
        for i, rows in enumerate(case.rows)
    )


def build(case: HybridCase, comm: Any) -> HybridEmbedding:
    """The tables over ``comm``."""
    specs = specs_of(case)
    placements = tuple(placement_of(case, table, comm.size) for table in range(len(specs)))
    topology = discover(comm, case.nodes)
    lists = {
        spec.name: np.sort(np.random.default_rng([case.seed, i]).permutation(spec.rows)[: placement.threshold])
        for i, (spec, placement) in enumerate(zip(specs, placements, strict=True))
        if placement.listed
    }
    return HybridEmbedding(
        lists=lists,
        specs=specs,
        plan=Plan(
            specs=specs,
            placements=placements,
            ranks=comm.size,
            reduce_start_bytes=case.start_bytes,
            batch_size=max(case.batches),
            predictions=tuple(Prediction(touched_rows=float(placement.threshold)) for placement in placements),
        ),
        comm=comm,
        device=HostDevice(2, compiled=case.compiled) if case.compiled else HostDevice(compiled=False),
        optimizer=OptimizerConfig(kind=case.kind),  # type: ignore[arg-type]
        dtype=case.dtype,
        seed=case.seed,
        first=case.first,
        exchange_precision=case.precision,  # type: ignore[arg-type]
        all_to_all=Flat(comm) if case.nodes == 1 else Hierarchical(comm, topology),
        topology=topology,
    )


def draw(case: HybridCase, rng: np.random.Generator, num_rows: int) -> Jagged:
    """Keys of one global batch: power-law, all equal, or as different as the tables allow."""
    batch = ec.draw(case, rng, num_rows)
    offsets = np.arange(batch.num_tables * num_rows + 1) if batch.offsets is None else batch.offsets
    for table, rows in enumerate(case.rows):
        part = slice(int(offsets[table * num_rows]), int(offsets[(table + 1) * num_rows]))
        if case.same_key:
            batch.keys[part] = rng.integers(rows)
        elif case.distinct_keys:
            batch.keys[part] = (np.arange(part.stop - part.start) + rng.integers(rows)) % rows
        else:
            batch.keys[part] = (rows * rng.random(part.stop - part.start) ** 3).astype(np.int64)
    return batch


@dataclass
class Outcome:
    """What one rank saw and has.

    Attributes:
        vectors: of each batch.
        shards: copies: (table, rows, columns, replicated, arrays by name).
        sent: bytes of each batch.
    """

    vectors: list[np.ndarray]
    shards: list[tuple[str, range, range, bool, dict[str, np.ndarray]]]
    sent: list[dict[str, int]]


def train(case: HybridCase, comm: Any) -> Outcome:
    """Run the batches; two are in flight, as in a pipeline that sends keys ahead."""
    rng = np.random.default_rng(case.seed)
    embedding = build(case, comm)
    _, places = places_of(specs_of(case), case.first)
    capacity = share_of(max(case.batches), comm.size, comm.rank)
    flights = []
    for _ in range(2):
        vectors = np.zeros((capacity, places, case.dim), case.dtype)
        gradients = np.zeros_like(vectors)
        flights.append((vectors, gradients, embedding.buffers(capacity, vectors, gradients)))
    work = []
    for total in case.batches:
        batch = draw(case, rng, total)
        gradient = rng.standard_normal((total, places, case.dim)).astype(case.dtype) / total
        begin, end = (start_of(total, comm.size, rank) for rank in (comm.rank, comm.rank + 1))
        work.append((ec.part_of(batch, begin, end), gradient[begin:end], total))
    seen, sent = [], []
    embedding.input_dist(work[0][0], flights[0][2], work[0][2])
    for step, (part, gradient, _) in enumerate(work, 1):
        vectors, gradients, buffers = flights[(step - 1) % 2]
        if step < len(work):
            embedding.input_dist(work[step][0], flights[step % 2][2], work[step][2])
        vectors.fill(-5)
        embedding.lookup(buffers)
        embedding.output_dist(buffers)
        rows = part.num_rows
        assert (vectors[:, : case.first] == -5).all()
        assert (vectors[rows:] == -5).all()
        seen.append(vectors[:rows, case.first :].copy())
        gradients[:rows] = gradient
        embedding.grad_dist(buffers)
        embedding.sparse_update(buffers, 0.1, step)
        sent.append(embedding.bytes_sent(buffers))
    embedding.settle()
    shards = []
    for shard in embedding.shards():
        arrays = {name: array.copy() for name, array in ({"weight": shard.weight} | shard.state).items()}
        shards.append((shard.table, shard.rows, shard.columns, shard.replicated, arrays))
    return Outcome(seen, shards, sent)


def whole_tables(case: HybridCase, outcomes: list[Outcome]) -> dict[str, np.ndarray]:
    """The tables that the shards of all ranks make up; every number comes from exactly one owner or every replica.

    Replicas must be equal bit for bit.
    """
    tables: dict[str, np.ndarray] = {}
    covered: dict[str, np.ndarray] = {}
    for rank, outcome in enumerate(outcomes):
        for table, rows, columns, replicated, arrays in outcome.shards:
            total = case.rows[int(table[1:])]
            for name, array in arrays.items():
                key = f"{table}.{name}"
                shape = (total,) if array.ndim == 1 else (total, case.dim)
                where = (slice(rows.start, rows.stop, rows.step), slice(columns.start, columns.stop))[: array.ndim]
                whole = tables.setdefault(key, np.full(shape, np.nan, array.dtype))
                count = covered.setdefault(key, np.zeros(shape, np.int64))
                if replicated and rank:
                    np.testing.assert_array_equal(whole[where], array, err_msg=f"replica {rank} of {key}")
                    continue
                whole[where] = array
                count[where] += 1
    for key, count in covered.items():
        assert (count == 1).all(), key
        assert np.isfinite(tables[key]).all(), key
    return tables


def check(case: HybridCase, outcomes: list[Outcome], alone: Outcome, tolerance: float = 1e-12) -> None:
    """All ranks' outcomes against one rank's."""
    for step, total in enumerate(case.batches):
        joined = np.concatenate([outcome.vectors[step] for outcome in outcomes])
        assert len(joined) == total
        np.testing.assert_allclose(joined, alone.vectors[step], rtol=tolerance, atol=tolerance, err_msg=f"step {step}")
    tables, expected = whole_tables(case, outcomes), whole_tables(case, [alone])
    assert tables.keys() == expected.keys()
    for name, array in tables.items():
        np.testing.assert_allclose(array, expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


def run_alone(case: HybridCase) -> Outcome:
    """The same batches on a single rank."""
    return train(case, SingleComm())
