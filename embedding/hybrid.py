"""Embedding tables over ranks, each placed as a plan says.

The steps of a batch are those of ``collection.py``. Tables go in groups, by what travels:

- pooled vectors: ``table_wise`` tables, and column parts of ``column_wise`` tables, which are tables of their own over
  ``vectors`` seen as ``[B, F * parts, D / parts]`` (``collection.TableWiseEmbedding``);
- rows: everything else (``row_group.RowGroup``).

A single rank holds everything, and nothing travels.

Shapes: T tables, B rows of this rank, G rows of the global batch, F = first + T places, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import ConfigError
from embedding.all_reduce import all_reduce_of
from embedding.all_to_all import AllToAll, Flat
from embedding.batch import check_arrays, check_batch, check_trains
from embedding.buffers import BatchBuffers, Finish
from embedding.collection import TableWiseEmbedding
from embedding.comm import Comm
from embedding.exchange import copy_pieces
from embedding.jagged import Jagged
from embedding.placement import Placement, Plan, TableSpec
from embedding.row_group import RowGroup, given
from embedding.table import Part, Shard
from embedding.topology import Topology
from embedding.wire import Precision, Wire


class Group(Protocol):
    """Tables that travel in the same way."""

    def shards(self) -> list[Shard]:
        """What this rank holds."""

    def settle(self) -> None:
        """See ``HybridEmbedding``."""

    def spread(self) -> None:
        """See ``HybridEmbedding``."""

    def track_touched(self) -> None:
        """See ``HybridEmbedding``."""

    def clear_touched(self) -> None:
        """See ``HybridEmbedding``."""

    def buffers(self, capacity: int, vectors: Array, grad_vectors: Array | None = None) -> Any:
        """Room for one batch in flight."""

    def distribute(self, keys: Jagged, buffers: Any, global_rows: int) -> None:
        """``input_dist`` of the group's keys."""

    def lookup(self, buffers: Any) -> None:
        """See ``HybridEmbedding``, as for what follows."""

    def start_output_dist(self, buffers: Any) -> Finish:
        """Starts ``output_dist``; what is returned ends it."""

    def start_grad_dist(self, buffers: Any) -> Finish:
        """Starts ``grad_dist``; what is returned ends it."""

    def sparse_update(self, buffers: Any, lr: float, step: int) -> None:
        """Updates what the global batch touched."""


@dataclass(frozen=True, slots=True)
class Owners:
    """Tables that each lie whole on one rank.

    Attributes:
        specs: the tables.
        owners: the rank of each.
        ranks: W.
    """

    specs: tuple[TableSpec, ...]
    owners: tuple[int, ...]
    ranks: int

    def tables_of(self, rank: int) -> list[int]:
        """Numbers of the tables that ``rank`` owns."""
        return [table for table, owner in enumerate(self.owners) if owner == rank]


@dataclass(slots=True)
class HybridBuffers(BatchBuffers):
    """One batch in flight.

    Attributes:
        groups: the buffers of each group.
        ready: ``input_dist`` has been called.
    """

    groups: list[BatchBuffers] = field(default_factory=list)
    ready: bool = False


class HybridEmbedding:
    """Look-up, exchange and update of tables, each placed as a plan says.

    Attributes:
        specs: all tables, in manifest order.
    """

    def __init__(
        self,
        *,
        specs: Sequence[TableSpec],
        plan: Plan,
        comm: Comm,
        device: Device,
        optimizer: OptimizerConfig,
        dtype: Any,
        seed: int | None,
        first: int,
        exchange_precision: Precision = "fp32",
        all_to_all: AllToAll | None = None,
        reduce_start_bytes: float = 0.0,
        topology: Topology | None = None,
        lists: Mapping[str, Array] | None = None,
    ) -> None:
        """Allocate and initialise what this rank holds; collective.

        Args:
            specs: all tables, in manifest order; one dim.
            plan: placements of ``specs`` on ``comm.size`` ranks.
            comm: the embedding lane's ranks.
            device: where everything lies.
            optimizer: of the tables.
            dtype: float32 or float64.
            seed: of the run; ``None``: tables of zeros, for timing.
            first: place of table 0 in ``vectors``: 1 behind a bottom MLP's output, else 0.
            exchange_precision: how vectors, rows and their gradients travel; ``fp32``: as they are.
            all_to_all: how rows travel; ``None``: ``Flat``. Pooled vectors travel flat.
            reduce_start_bytes: what an all-reduce could send in the time that it takes to start, the same on every
                rank. Above 0, gradients of all replicated rows are summed where finding the touched ones first
                would take longer.
            topology: of ``comm``: gradients of replicated rows are summed inside nodes first; ``None``: in one step.
            lists: the frequent rows of each table whose placement is ``listed``, ascending [threshold] int64; the
                same on every rank.

        Raises:
            ConfigError: the plan is for other tables or ranks, dims differ, a list does not fit, or the optimiser
                needs whole rows where they are cut.
        """
        if plan.ranks != comm.size or plan.specs != tuple(specs):
            raise ConfigError(
                f"plan: made for {plan.ranks} ranks and {len(plan.specs)} tables, but there are {comm.size} ranks "
                f"and {len(specs)} tables; plan again"
            )
        if len({spec.dim for spec in specs}) > 1:
            raise ConfigError(f"tables: dims {sorted({spec.dim for spec in specs})} differ; give all tables one dim")
        check_columns(specs, plan.placements, optimizer)
        self.specs = tuple(specs)
        self._comm, self._device, self._dtype = comm, device, np.dtype(dtype)
        self._dim = specs[0].dim if specs else 1
        self._first = first
        self._rows = np.array([spec.rows for spec in specs], np.int64)
        wire = Wire(exchange_precision, self._dtype, device)
        common: dict[str, Any] = {"comm": comm, "device": device, "optimizer": optimizer, "seed": seed}
        whole = dict(common, dtype=self._dtype, exchange_precision=exchange_precision)
        self._groups: list[tuple[list[int], int, Group]] = []  # tables, column parts, group
        pooled: dict[int, list[int]] = {}
        travelling = []
        for table, placement in enumerate(plan.placements):
            if comm.size == 1 or placement.pooled:
                pooled.setdefault(_parts(placement, comm.size), []).append(table)
            else:
                travelling.append(table)
        if travelling:
            group = RowGroup(
                specs=[self.specs[table] for table in travelling],
                placements=[plan.placements[table] for table in travelling],
                places=[first + table for table in travelling],
                all_to_all=Flat(comm) if all_to_all is None else all_to_all,
                wire=wire,
                reduce_start_bytes=reduce_start_bytes,
                all_reduce=all_reduce_of(comm, topology),
                lists=lists,
                **common,
            )
            self._groups.append((travelling, 1, group))
        for parts, tables in sorted(pooled.items()):
            repeated = [table for table in tables for _ in range(parts)]
            self._groups.append((repeated, parts, self._pooled_group(tables, parts, plan, whole)))

    def _pooled_group(self, tables: list[int], parts: int, plan: Plan, common: dict[str, Any]) -> TableWiseEmbedding:
        """Tables, or ``parts`` column parts of each, that lie whole on their owners."""
        width = self._dim // parts
        pieces = [
            Part(self.specs[table], range(self.specs[table].rows), range(i * width, (i + 1) * width))
            for table in tables
            for i in range(parts)
        ]
        specs = tuple(
            TableSpec(
                name=piece.spec.name,
                rows=piece.spec.rows,
                dim=width,
                hotness=piece.spec.hotness,
                pooling=piece.spec.pooling,
            )
            for piece in pieces
        )
        owners: list[int] = []
        for table in tables:
            placement = plan.placements[table]
            if plan.ranks == 1:
                owners.append(0)
            else:
                owners.extend(placement.owners if placement.kind == "column_wise" else [placement.owner])
        return TableWiseEmbedding(
            specs=specs,
            plan=Owners(specs, tuple(owners), plan.ranks),
            parts=pieces,
            places=[(self._first + table) * parts + i for table in tables for i in range(parts)],
            num_places=(self._first + len(self.specs)) * parts,
            **common,
        )

    def shards(self) -> list[Shard]:
        """What this rank holds, in manifest order; of one table, replicated rows first.

        Call ``settle`` before reading and ``spread`` after writing them.
        """
        order = {spec.name: place for place, spec in enumerate(self.specs)}
        held = [shard for _, _, group in self._groups for shard in group.shards()]
        return sorted(held, key=lambda shard: order[shard.table])

    def settle(self) -> None:
        """Bring ``shards`` up to date where frequent rows are listed: these change in their replicas alone."""
        for _, _, group in self._groups:
            group.settle()

    def spread(self) -> None:
        """Take over what was written into ``shards``: listed frequent rows reach their replicas; collective."""
        for _, _, group in self._groups:
            group.spread()

    def track_touched(self) -> None:
        """Note from now on which rows are updated: ``touched`` of the shards says which."""
        for _, _, group in self._groups:
            group.track_touched()

    def clear_touched(self) -> None:
        """Forget which rows were updated."""
        for _, _, group in self._groups:
            group.clear_touched()

    def buffers(self, capacity: int, vectors: Array, grad_vectors: Array | None = None) -> HybridBuffers:
        """Room for one batch in flight.

        Args:
            capacity: most rows of this rank.
            vectors: [capacity or more, F, D] C-contiguous; the output.
            grad_vectors: the same shape; its gradients. ``None``: forward only, on every rank.

        Raises:
            ConfigError: an array has another shape, dtype or layout.
        """
        check_arrays(vectors, grad_vectors, capacity, (self._first + len(self.specs), self._dim), self._dtype)
        buffers = HybridBuffers(capacity, vectors, grad_vectors)
        for _, parts, group in self._groups:
            views = [
                None if array is None else array.reshape(len(array), array.shape[1] * parts, self._dim // parts)
                for array in (vectors, grad_vectors)
            ]
            buffers.groups.append(group.buffers(capacity, *views))
        return buffers

    def input_dist(self, keys: Jagged, buffers: HybridBuffers, global_rows: int) -> None:
        """Check this rank's keys and send the owners what they have to know.

        Args:
            keys: all tables' keys of this rank's share of the batch; used until the batch is done.
            buffers: the batch's.
            global_rows: G.

        Raises:
            DataError: a key lies outside its table, or the bags are malformed.
            CommError: the ranks disagree about the batch.
        """
        check_batch(keys, buffers.capacity, global_rows, self.specs, self._rows, self._comm, self._device)
        buffers.num_rows, buffers.global_rows, buffers.ready = keys.num_rows, global_rows, True
        for (tables, _, group), own in zip(self._groups, buffers.groups, strict=True):
            group.distribute(select_tables(keys, tables, own, device=self._device), own, global_rows)

    def lookup(self, buffers: HybridBuffers) -> None:
        """Owners gather, and pool what they own alone; one rank: straight into ``vectors``."""
        given(buffers.ready or None)
        for (_, _, group), own in zip(self._groups, buffers.groups, strict=True):
            group.lookup(own)

    def output_dist(self, buffers: HybridBuffers) -> None:
        """Bring rows and pooled vectors to the ranks that need them: ``vectors[:B, first + t]`` is table t's.

        Reads the replicated rows.
        """
        given(buffers.ready or None)
        pairs = zip(self._groups, buffers.groups, strict=True)
        for finish in [group.start_output_dist(own) for (_, _, group), own in pairs]:
            finish()

    def grad_dist(self, buffers: HybridBuffers) -> None:
        """Send the gradients ``grad_vectors[:B, first + t]`` to the owners, and sum those of replicated rows.

        Raises:
            ConfigError: the buffers are forward only.
        """
        check_trains(buffers.grad_vectors)
        given(buffers.ready or None)
        pairs = zip(self._groups, buffers.groups, strict=True)
        for finish in [group.start_grad_dist(own) for (_, _, group), own in pairs]:
            finish()

    def sparse_update(self, buffers: HybridBuffers, lr: float, step: int) -> None:
        """Update the rows that the global batch touched.

        Args:
            buffers: after ``grad_dist``.
            lr: learning rate of this step.
            step: t, from 1.
        """
        for (_, _, group), own in zip(self._groups, buffers.groups, strict=True):
            group.sparse_update(own, lr, step)

    def bytes_sent(self, buffers: HybridBuffers) -> dict[str, int]:
        """Bytes that the last batch sent to other ranks: keys (``input_dist``), vectors, gradients, ``all_reduce``.

        A hierarchical exchange sends other bytes on the way; an all-reduce counts as 2 (W - 1) / W of its size.
        """
        sent = dict.fromkeys(("input_dist", "output_dist", "grad_dist", "all_reduce"), 0)
        for own in buffers.groups:
            for name, size in own.sent.items():
                sent[name] += size
        return sent


def check_columns(specs: Sequence[TableSpec], placements: Sequence[Placement], optimizer: OptimizerConfig) -> None:
    """Refuse to cut rows whose optimiser state belongs to the whole row.

    Raises:
        ConfigError: a table is column-wise in several parts and the optimiser is row-wise Adagrad.
    """
    if optimizer.kind != "rowwise_adagrad":
        return
    for spec, placement in zip(specs, placements, strict=True):
        if placement.kind == "column_wise" and len(placement.owners) > 1:
            raise ConfigError(
                f"table '{spec.name}': column_wise does not go with rowwise_adagrad, as no column owner sees a whole "
                "row's gradient; take adagrad or another placement"
            )


def select_tables(keys: Jagged, tables: Sequence[int], buffers: BatchBuffers, *, device: Device) -> Jagged:
    """The keys of some tables, in that order; a table may come several times.

    Args:
        keys: of all tables.
        tables: numbers of those to take; all of them give ``keys`` as they are.
        buffers: what the copies belong to.
        device: where the keys lie.
    """
    if list(tables) == list(range(keys.num_tables)):
        return keys
    rows = keys.num_rows
    chosen = np.array(tables, np.int64)
    if keys.offsets is None:
        starts, counts, offsets = chosen * rows, np.full(len(chosen), rows), None
    else:
        lengths = np.diff(keys.offsets).reshape(keys.num_tables, rows)[chosen]
        starts, counts = keys.offsets[chosen * rows], lengths.sum(axis=1)
        offsets = buffers.room("chosen_offsets", np.int64, len(chosen) * rows + 1)
        offsets[0] = 0
        np.cumsum(lengths, out=offsets[1:])
    targets = np.cumsum(counts) - counts
    copies: list[Array | None] = []
    for name, source in (("chosen_keys", keys.keys), ("chosen_weights", keys.weights)):
        if source is None:
            copies.append(None)
            continue
        out = buffers.room(name, source.dtype, int(counts.sum()))
        copy_pieces(source, starts, out, targets, counts, device=device)
        copies.append(out)
    return Jagged(copies[0], offsets, copies[1], len(chosen), rows)


def _parts(placement: Placement, ranks: int) -> int:
    return len(placement.owners) if placement.kind == "column_wise" and ranks > 1 else 1
