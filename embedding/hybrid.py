"""Embedding tables over ranks, each placed as a plan says.

The steps of a batch are those of ``collection.py``. Tables go in groups, by what travels:

- pooled vectors: ``table_wise`` tables, and column parts of ``column_wise`` tables, which are tables of their own over
  ``vectors`` seen as ``[B, F * parts, D / parts]`` (``collection.TableWiseEmbedding``);
- rows: everything else (``row_group.RowGroup``).

Tables whose vectors are features of their own (``concat.ConcatGroup``) are apart from the others, by the keys of a bag.

A single rank holds everything, and nothing travels.

Shapes: T tables, B rows of this rank, G rows of the global batch, F = first + T places, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import ConfigError
from embedding.all_reduce import all_reduce_of
from embedding.all_to_all import AllToAll, Flat
from embedding.batch import check_arrays, check_batch, check_trains
from embedding.buffers import BatchBuffers
from embedding.collection import TableWiseEmbedding
from embedding.comm import Comm
from embedding.concat import ConcatGroup
from embedding.groups import Group, Owners, select_tables
from embedding.jagged import Jagged
from embedding.placement import Placement, Plan, TableSpec, places_of
from embedding.reduce_way import ReduceWay
from embedding.row_group import RowGroup, given
from embedding.step_cost import ROWS, group_of
from embedding.table import Part, Shard
from embedding.topology import Topology
from embedding.wire import Precision, Wire


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
        self._places, self._num_places = places_of(specs, first)
        self._rows = np.array([spec.rows for spec in specs], np.int64)
        common: dict[str, Any] = {"comm": comm, "device": device, "optimizer": optimizer, "seed": seed}
        pooled = {"dtype": self._dtype, "exchange_precision": exchange_precision}
        travelling = {
            "all_to_all": Flat(comm) if all_to_all is None else all_to_all,
            "wire": Wire(exchange_precision, self._dtype, device),
            "all_reduce": all_reduce_of(comm, topology),
            "lists": lists,
        }
        by_kind: dict[tuple[int, int], list[int]] = {}
        for table, (spec, placement) in enumerate(zip(self.specs, plan.placements, strict=True)):
            parts, bag_keys = group_of(spec, placement)
            by_kind.setdefault((parts if comm.size > 1 else 1, bag_keys), []).append(table)
        self._groups: list[tuple[list[int], int, Group]] = []  # tables, column parts, group
        for (parts, bag_keys), tables in sorted(by_kind.items()):
            own = common | (travelling if parts == ROWS else pooled) | {"bags_per_row": bag_keys or 1}
            group = self._make_group(tables, parts, bag_keys, plan, own)
            columns = max(1, parts)
            self._groups.append(([table for table in tables for _ in range(columns)], columns, group))

    def _make_group(self, tables: list[int], parts: int, bag_keys: int, plan: Plan, common: dict[str, Any]) -> Group:
        """A group of tables of one kind (``group_of``)."""
        if bag_keys:  # the group has vectors of its own, table after table
            places, num_places = list(range(len(tables))), len(tables)
        else:
            places, num_places = [self._places[table] for table in tables], self._num_places
        group: Group
        if parts == ROWS:
            specs, placements = [self.specs[t] for t in tables], [plan.placements[t] for t in tables]
            way = ReduceWay.of(plan, tables)
            group = RowGroup(specs=specs, placements=placements, places=places, way=way, **common)
        else:
            places = [place * parts + i for place in places for i in range(parts)]
            group = self._pooled_group(tables, parts, plan, places=places, num_places=num_places * parts, **common)
        if not bag_keys:
            return group
        columns = max(1, parts)
        targets = [
            (self._places[table] + key) * columns + i
            for key in range(bag_keys)
            for table in tables
            for i in range(columns)
        ]
        dim = self._dim // columns
        return ConcatGroup(group, bag_keys=bag_keys, places=targets, dim=dim, dtype=self._dtype, device=self._device)

    def _pooled_group(self, tables: list[int], parts: int, plan: Plan, **arguments: Any) -> TableWiseEmbedding:
        """Tables, or ``parts`` column parts of each, that lie whole on their owners."""
        width = self._dim // parts
        pieces = [
            Part(self.specs[table], range(self.specs[table].rows), range(i * width, (i + 1) * width))
            for table in tables
            for i in range(parts)
        ]
        specs = tuple(replace(piece.spec, dim=width) for piece in pieces)
        owners: list[int] = []
        for table in tables:
            placement = plan.placements[table]
            if plan.ranks == 1:
                owners.append(0)
            else:
                owners.extend(placement.owners if placement.kind == "column_wise" else [placement.owner])
        return TableWiseEmbedding(specs=specs, plan=Owners(specs, tuple(owners), plan.ranks), parts=pieces, **arguments)

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

    def resident(self) -> list[Shard]:
        """As ``shards``, and up to date; call ``spread_resident`` after writing them."""
        self.settle()
        return self.shards()

    def spread_resident(self) -> None:
        """Take over what was written into the arrays of ``resident``; collective."""
        self.spread()

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
        check_arrays(vectors, grad_vectors, capacity, (self._num_places, self._dim), self._dtype)
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
