"""Tables of bags exchanged by lists of fixed capacity against ``HybridEmbedding`` on one rank, on the same batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import exchange_cases as xc
import numpy as np

from dlrm.device import HostDevice
from dlrm.scalars import SIZE, write_guard, write_scalars
from embedding.bag_room import BagRoom, BagSample
from embedding.captured_bags import BagBuffers, ExchangedBags
from embedding.comm import SingleComm
from embedding.frequent_rows import places_of_rows
from embedding.hybrid import HybridEmbedding
from embedding.jagged import Jagged
from embedding.placement import Placement, Plan, TableSpec, places_of
from embedding.sparse_optim import constants
from embedding.topology import discover, share_of, start_of


@dataclass
class BagCase(xc.ExchangeCase):
    """Bags of any length up to the hotness; those of ``concat`` are full."""

    rows: tuple[int, ...] = (50, 3, 300, 20, 1, 90)
    hotness: tuple[int, ...] = (1, 4, 2, 3, 2, 1)
    poolings: tuple[str, ...] = ("sum", "mean", "sum", "concat", "mean", "sum")
    threshold: float = 0.125  # of hybrid tables: part of their rows that are replicated
    weighted: bool = False
    grows: bool = False  # later batches have longer bags than the one that is measured


def specs_of(case: BagCase) -> tuple[TableSpec, ...]:
    return tuple(
        TableSpec(name=f"t{i}", rows=rows, dim=case.dim, hotness=case.hotness[i], pooling=case.poolings[i])  # type: ignore[arg-type]
        for i, rows in enumerate(case.rows)
    )


def plan_of(case: BagCase, ranks: int) -> Plan:
    placements = []
    for table, (kind, rows) in enumerate(zip(case.kinds, case.rows, strict=True)):
        threshold = round(rows * case.threshold)
        if kind == "table_wise":
            placements.append(Placement(kind="table_wise", owner=(table + 1) % ranks))
        elif kind == "column_wise":
            owners = xc.column_owners(table, case.dim, ranks)
            placements.append(Placement(kind="column_wise", owners=owners))
        elif kind == "replicated" or (kind == "hybrid" and threshold >= rows):
            placements.append(Placement(kind="replicated", threshold=rows))
        elif kind in ("hybrid", "listed") and threshold:
            placements.append(Placement(kind="hybrid", threshold=threshold, listed=kind == "listed"))
        else:
            placements.append(Placement(kind="row_wise"))
    return Plan(specs=specs_of(case), placements=xc.once_of(case, placements), ranks=ranks)


def part_of(keys: Jagged, begin: int, end: int) -> Jagged:
    """Rows ``begin`` to ``end`` of a batch."""
    assert keys.offsets is not None
    pieces, weights, lengths = [], [], []
    for table in range(keys.num_tables):
        own = keys.offsets[table * keys.num_rows + begin : table * keys.num_rows + end + 1]
        pieces.append(keys.keys[own[0] : own[-1]])
        lengths.append(np.diff(own))
        if keys.weights is not None:
            weights.append(keys.weights[own[0] : own[-1]])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    joined = None if keys.weights is None else np.concatenate(weights)
    return Jagged(np.concatenate(pieces), offsets, joined, keys.num_tables, end - begin)


def draw(case: BagCase) -> list[tuple[Jagged, np.ndarray]]:
    """Of each batch keys that favour low rows, and gradients [G, F, D]."""
    rng, places = np.random.default_rng(case.seed), places_of(specs_of(case), case.first)[1]
    work = []
    for number, total in enumerate(case.batches):
        lengths = []
        for hotness, pooling in zip(case.hotness, case.poolings, strict=True):
            most = 1 if case.grows and number == 0 else hotness
            own = rng.integers(0, most + 1, total)
            lengths.append(np.full(total, hotness) if pooling == "concat" else own)
        counts = [int(own.sum()) for own in lengths]
        keys = [(rows * rng.random(n) ** 3).astype(np.int32) for rows, n in zip(case.rows, counts, strict=True)]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        weights = rng.uniform(-1, 2, sum(counts)).astype(np.float32) if case.weighted else None
        batch = Jagged(np.concatenate(keys), offsets, weights, len(case.rows), total)
        work.append((batch, rng.standard_normal((total, places, case.dim)).astype(np.float32) / total))
    return work


class Trainer:
    """One rank's tables and two batches in flight."""

    def __init__(self, case: BagCase, comm: Any, device: Any, host: Any = None) -> None:
        self.case, self.comm, self.device = case, comm, device
        self.work, plan = draw(case), plan_of(case, comm.size)
        topology = discover(host or comm, case.nodes)
        nodes = [topology.ranks_of(node) for node in range(case.nodes)]
        if host is not None:  # groups that carry buffers of the device
            inside = comm.split(topology.node, topology.local_rank)
            topology = replace(topology, inside=inside, across=comm.split(topology.local_rank, topology.node))
        lists = xc.lists_of(case, plan)
        sample = BagSample.join([self.work[0][0]], len(case.rows))
        sample.keys = [places_of_rows(keys, lists.get(f"t{i}")) for i, keys in enumerate(sample.keys)]
        room = BagRoom.measure(
            plan,
            sample,
            case.batches[0],
            nodes if case.nodes > 1 else None,
            10.0 if case.short >= 1 else 0.0,
        )
        self.embedding = ExchangedBags(
            plan=plan, comm=comm, topology=topology, device=device, optimizer=xc.optimizer(case),
            table_dtype=np.float32, seed=case.seed, first=case.first, deterministic=case.deterministic,
            exchange_precision=case.precision, hierarchical=case.nodes > 1,  # type: ignore[arg-type]
            room=replace(room, mean=room.mean * case.short), lists=lists,
        )  # fmt: skip
        self.embedding.track_touched()
        self.guard = device.xp.asarray(write_guard(np.empty(SIZE, np.float32), xc.LOSS_SCALE))
        self.scalars = device.zeros(SIZE, np.float32)
        capacity = share_of(max(case.batches), comm.size, 0)
        self.flights = []
        for _ in range(2):
            shape = (capacity, self.work[0][1].shape[1], case.dim)
            vectors, gradients = device.zeros(shape, np.float32), device.zeros(shape, np.float32)
            self.flights.append(self.embedding.buffers(capacity, vectors, gradients))

    def rows_of(self, total: int) -> slice:
        rank, size = self.comm.rank, self.comm.size
        return slice(start_of(total, size, rank), start_of(total, size, rank + 1))

    def input_dist(self, number: int) -> None:
        """Bring a batch to its Flight and find out what travels of it."""
        keys, buffers = self.work[number][0], self.flights[number % 2]
        own = self.rows_of(keys.num_rows)
        self.embedding.take_bags(part_of(keys, own.start, own.stop), keys, buffers)
        self.embedding.input_dist(buffers, own.stop - own.start, keys.num_rows)

    def set_up(self, number: int) -> None:
        """Bring a step's scalars and gradients to the device."""
        keys, gradient = self.work[number]
        own, step = self.rows_of(keys.num_rows), number + 1
        buffers, rows = self.flights[number % 2], own.stop - own.start
        self.device.upload(gradient[own] * np.float32(xc.LOSS_SCALE), buffers.grad_vectors[:rows])
        numbers = constants(xc.optimizer(self.case), xc.LR, step).tolist()
        block = write_scalars(
            np.empty(SIZE, np.float32), lr=xc.LR, global_rows=keys.num_rows, valid_rows=rows, step=step, seed=1,
            sparse=numbers,
        )  # fmt: skip
        self.device.upload(block, self.scalars)

    def step(self, buffers: BagBuffers) -> None:
        """Everything between the upload and the next step."""
        buffers.vectors.fill(77)
        self.embedding.lookup(buffers)
        self.embedding.output_dist(buffers)
        self.embedding.raise_overflow(buffers, self.guard)
        self.embedding.sum_replicated(buffers)
        self.embedding.grad_dist(buffers)
        self.embedding.reduce_replicated(buffers)
        self.embedding.sparse_update(buffers, self.scalars, self.guard)

    overflowed = xc.Trainer.overflowed
    shards = xc.Trainer.shards

    def vectors(self, number: int) -> np.ndarray:
        """What a batch's look-up came to: [B, V, D]; all other places are as they were."""
        own, buffers = self.rows_of(self.work[number][0].num_rows), self.flights[number % 2]
        vectors, rows = self.device.to_host(buffers.vectors), own.stop - own.start
        assert (vectors[:, : self.case.first] == 77).all()
        assert (vectors[rows:] == 77).all()
        return vectors[:rows, self.case.first :].copy()


def train(case: BagCase, comm: Any, device: Any = None, host: Any = None) -> xc.Outcome:
    """Run the batches; two are in flight, and a batch whose lists run over is run again with exact ones."""
    trainer = Trainer(case, comm, device or HostDevice(compiled=False), host)
    seen, overflows = [], 0
    trainer.input_dist(0)
    for number, (keys, _) in enumerate(trainer.work):
        if number + 1 < len(trainer.work):
            trainer.input_dist(number + 1)
        trainer.set_up(number)
        buffers, before = trainer.flights[number % 2], [xc.arrays_of(shard) for shard in trainer.shards()]
        trainer.step(buffers)
        if trainer.overflowed():
            overflows += 1
            for old, shard in zip(before, trainer.shards(), strict=True):
                for name, array in xc.arrays_of(shard).items():
                    np.testing.assert_array_equal(array, old[name])  # nothing was written
            trainer.embedding.clear_overflow(trainer.guard)
            own = trainer.rows_of(keys.num_rows)
            trainer.step(trainer.embedding.exact(buffers, own.stop - own.start, keys.num_rows))
            assert not trainer.overflowed()
        seen.append(trainer.vectors(number))
    return xc.outcome_of(trainer, seen, overflows)  # type: ignore[arg-type]


def run_alone(case: BagCase) -> xc.Expected:
    """The same batches by ``HybridEmbedding`` in float64 on a single rank."""
    plan = plan_of(replace(case, kinds=("table_wise",) * len(case.kinds)), 1)
    embedding = HybridEmbedding(
        specs=plan.specs, plan=plan, comm=SingleComm(), device=HostDevice(compiled=False), optimizer=xc.optimizer(case),
        dtype=np.float64, seed=case.seed, first=case.first,
    )  # fmt: skip
    for shard in embedding.shards():
        shard.weight[...] = shard.weight.astype(np.float32)
    embedding.track_touched()
    seen = []
    for step, (keys, gradient) in enumerate(draw(case), 1):
        vectors = np.zeros(gradient.shape)
        buffers = embedding.buffers(keys.num_rows, vectors, gradient.astype(np.float64))
        embedding.input_dist(keys, buffers, keys.num_rows)
        embedding.lookup(buffers)
        embedding.output_dist(buffers)
        seen.append(vectors[:, case.first :].copy())
        embedding.grad_dist(buffers)
        embedding.sparse_update(buffers, xc.LR, step)
    shards = embedding.shards()
    touched = {shard.table: np.array(shard.touched) for shard in shards}
    return xc.Expected(seen, {shard.table: xc.arrays_of(shard) for shard in shards}, touched)


CUT = ("column_wise", "column_wise", "hybrid", "column_wise", "table_wise", "column_wise")
KINDS = ("sgd", "momentum", "adagrad", "rowwise_adagrad", "adam", "ftrl")
CASES = (
    *(BagCase(seed=number, kind=kind, threshold=(0.0, 0.3, 1.0)[number % 3]) for number, kind in enumerate(KINDS)),
    *(BagCase(seed=10 + number, kind=kind, kinds=("hybrid",) * 6, threshold=(0.3, 0.0, 1.0)[number % 3], weighted=True)
      for number, kind in enumerate(KINDS)),
    BagCase(seed=20, deterministic=True, weighted=True),
    BagCase(seed=21, kind="adam", deterministic=True, short=0.5, threshold=0.3),
    BagCase(seed=22, short=0.3, kinds=("row_wise",) * 6),
    BagCase(seed=24, grows=True, weighted=True),
    BagCase(seed=25, precision="fp16", kind="adagrad"),
    BagCase(seed=26, precision="bf16"),
    BagCase(seed=27, kinds=("row_wise", "table_wise") * 3, batches=(2, 1, 2), first=0),
    BagCase(seed=28, nodes=2, dim=8, weighted=True),
    BagCase(seed=32, nodes=2, kind="adam", deterministic=True),
    BagCase(seed=36, nodes=2, short=0.4, kind="rowwise_adagrad"),
    BagCase(seed=37, kinds=CUT, dim=24, weighted=True),
    BagCase(seed=38, kinds=CUT, dim=16, kind="adam", deterministic=True, short=0.4, grows=True),
    BagCase(seed=39, kinds=("column_wise",) * 6, dim=16, nodes=2),
    BagCase(seed=41, once=True, weighted=True),
    BagCase(seed=42, once=True, kind="adam", deterministic=True, short=0.4),
    BagCase(seed=43, once=True, nodes=2, kind="adagrad", weighted=True),
    BagCase(seed=40, kinds=("listed", "row_wise", "listed", "listed", "listed", "table_wise"), threshold=0.2),
)  # fmt: skip
