"""Tables of one number of columns over several GPUs, looked up, exchanged and updated by steps that graphs capture.

Every rank has the keys of the whole global batch, so that owners and those who ask make the same lists of what travels
(``pair_lists``) and no key is exchanged. What is frequent lies on every rank: looked up where it is needed, its
gradients summed here and then over all ranks. All sizes are fixed, and nothing waits for the host. A batch for which a
list is too short is noted in the guard before anything is written, by all ranks alike; whoever reads that there runs
the batch again with ``exact`` buffers.

Shapes: T tables of one key a bag, W ranks, G rows of the global batch, B of this rank, F = first + T places, D columns,
H replicated rows, C_o most rows that rank o sends to one other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import ConfigError
from dlrm.scalars import SIZE
from embedding.batch import check_trains
from embedding.captured_placement import MostRows, longer, pair_capacities, place_tables
from embedding.captured_sums import CapturedSums
from embedding.captured_update import CapturedUpdate
from embedding.column_groups import ColumnGroup
from embedding.comm import Comm
from embedding.distinct_route import DistinctRoute, distinct_relays
from embedding.exchange_buffers import GroupBuffers, wire_type
from embedding.exchange_route import FlatRoute, Route, call
from embedding.frequent_rows import place_features
from embedding.held_tables import HeldTables
from embedding.node_route import NodeRoute, Nodes
from embedding.pair_lists import PairLists, count_pairs, list_pairs
from embedding.reduce_way import ReduceWay, ring_bytes
from embedding.row_moves import move_rows
from embedding.runs import UnitUpdate
from embedding.sparse_optim import mark_touched, sgd_one_hot
from embedding.topology import Topology, share_of
from embedding.wire import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeForm:
    """What all groups of tables have in common; attributes as ``ExchangedEmbedding`` takes them.

    Attributes:
        precision: ``exchange_precision``.
        way: what the plan predicts of sums over replicated rows.
    """

    comm: Comm
    topology: Topology | None
    device: Device
    optimizer: OptimizerConfig
    table_dtype: Any
    seed: int | None
    deterministic: bool
    precision: Precision
    sigmas: float
    hierarchical: bool
    sends: bool
    way: ReduceWay


class ExchangedGroup(HeldTables):
    """The tables of one group (``column_groups``), over the GPUs of a run.

    Attributes:
        room: how many times as long lists are made as is expected to be enough.
    """

    def __init__(
        self,
        group: ColumnGroup,
        form: ExchangeForm,
        shares: Array | None,
        most: MostRows,
        lists: Mapping[str, Array],
    ) -> None:
        """Allocate and initialise what this rank holds (collective).

        Args:
            group: the tables, or parts of tables.
            form: what all groups have in common.
            shares: of each of them, as ``ExchangedEmbedding`` takes them; so are the others.
            most: see there.
            lists: see there.

        Raises:
            ConfigError: a list of frequent rows is missing.
            DeviceError: there are too many rows.
        """
        self._form, self._shares, self._most, self.room = form, shares, most, 1.0
        device, comm, optimizer = form.device, form.comm, form.optimizer
        self._dim = group.dim
        self._nodes = Nodes.of(form.topology) if form.hierarchical and form.topology is not None else None
        self._once = group.deduplicates
        others = [rank for rank in range(comm.size) if rank != comm.rank]
        order = (*others, comm.rank) if self._nodes is None else self._nodes.order
        self._adds = optimizer.kind == "sgd" and np.dtype(form.table_dtype) == np.float32 and not form.deterministic
        placed = place_tables(
            group, rank=comm.rank, device=device, optimizer=optimizer, dtype=form.table_dtype, seed=form.seed,
            own_pads=not self._adds or form.hierarchical or self._once, frequent_pads=form.deterministic, order=order,
        )  # fmt: skip
        super().__init__(group, placed, lists, comm, device)
        self._features = len(group.features)
        self._sums = CapturedSums(placed, device, comm, optimizer.kind, ordered=form.deterministic)
        self._unit = UnitUpdate.create(device)

    @property
    def whole(self) -> bool:
        """Whether its tables are not cut."""
        return self._group.parts == 1

    @property
    def weight(self) -> Array:
        """[R, D], the rows that lie here."""
        return self._placed.store.weight

    def slots(self, buffers: GroupBuffers) -> Array | None:
        """``lists.slots`` of a batch, if gradients are to be written there."""
        return buffers.lists.slots[: self._features * buffers.num_rows] if self._form.sends else None

    def buffers(
        self,
        capacity: int,
        vectors: Array,
        grad_vectors: Array | None,
        keys: Array,
        *,
        capacities: tuple[int, ...] | None,
        listed: bool,
    ) -> GroupBuffers:
        """Room for one batch in flight, of one key a bag.

        Args:
            capacity: as ``ExchangedEmbedding.buffers`` has it, as ``vectors`` and ``grad_vectors``.
            vectors: see there.
            grad_vectors: see there.
            keys: of all features.
            capacities: see there.
            listed: rows are not put into the vectors.
        """
        vectors, grad_vectors = (
            None if array is None else array.reshape(len(array), self._group.num_places, self._dim)
            for array in (vectors, grad_vectors)
        )
        if capacities is None:
            of = self._group.features.tolist()
            capacities = pair_capacities(self._group.plan, capacity, self._shares, self._form.sigmas, self.room, of)
        most = self._most.times(self.room)
        return self._make(capacity, vectors, grad_vectors, keys, capacities, most, listed=listed)

    def make_room(self, buffers: GroupBuffers) -> None:
        """Have the lists of buffers that are made from now on hold a quarter more than this batch needs.

        Args:
            buffers: after ``input_dist``; they stay as they are.
        """
        times = longer(self._device.to_host(buffers.lists.totals), buffers.lists.capacities)
        self.room = max(self.room, buffers.factor * times)

    def exact(self, buffers: GroupBuffers, rows: int, global_rows: int) -> GroupBuffers:
        """The same batch with lists of the length that it needs, after ``input_dist``; the host waits for most.

        Args:
            buffers: the batch's, whose lists may have run over.
            rows: B.
            global_rows: G.
        """
        call(self._device, count_pairs, buffers.named, global_rows, self._placed.layout, buffers.lists)
        capacities = self._device.to_host(buffers.lists.totals).max(axis=1).tolist()
        same = buffers.capacity, buffers.vectors, buffers.grad_vectors, buffers.keys
        made = self._make(*same, tuple(capacities), MostRows(), listed=buffers.listed)
        made.exact = True
        self.input_dist(made, rows, global_rows)
        return made

    def _make(
        self,
        capacity: int,
        vectors: Array,
        grad_vectors: Array | None,
        keys: Array,
        capacities: tuple[int, ...],
        most: MostRows,
        *,
        listed: bool,
    ) -> GroupBuffers:
        device, placed = self._device, self._placed
        trains = grad_vectors is not None
        relay, size = (None, 0) if self._nodes is None or not trains else self._nodes.relays(capacities)
        if self._once:
            relay, size = distinct_relays(placed.layout, max(capacities), self._nodes)
        lists = PairLists.create(
            device,
            placed.layout,
            capacity,
            capacities,
            own=trains and self._adds,
            listed=listed,
            relay_start=relay,
            relay_size=size,
            even=self._once,
        )
        buffers = GroupBuffers(
            capacity=capacity, vectors=vectors, grad_vectors=grad_vectors, keys=keys, lists=lists,
            route=self._route(lists, vectors.dtype, most, trains=trains), factor=self.room,
        )  # fmt: skip
        if self._with_lists:
            buffers.places = device.zeros(len(keys), np.int64 if self._frequent.wide else np.int32)
        if not trains:
            return buffers
        buffers.guard = device.zeros(SIZE, np.float32)
        buffers.update = CapturedUpdate(
            self._form.optimizer, placed.flat, np.zeros(1, np.bool_), np.zeros(1, np.int64),
            max(1, len(buffers.route.keys)), one_hot=True, weighted=False, deterministic=self._form.deterministic,
            device=device,
        )  # fmt: skip
        buffers.order = self._sums.order(capacity)
        buffers.touched = self._sums.touched(most.touched, self._form.way)
        return buffers

    def _route(self, lists: PairLists, vectors: Any, most: MostRows, *, trains: bool) -> Route:
        layout, device, wire = self._placed.layout, self._device, wire_type(self._form.precision, vectors)
        topology = None if self._nodes is None else self._form.topology
        if self._once:
            once = lists.capacities if most.once is None else most.once
            by_node = None if topology is None else (topology, most.distinct)
            return DistinctRoute(
                layout, lists, self.comm, device, self._dim, wire, once, vectors, by_node, trains=trains
            )  # fmt: skip
        if topology is None:
            return FlatRoute(lists, self.comm, device, self._dim, wire)
        rooms = [self.comm.size * rows for rows in lists.capacities] if most.distinct is None else most.distinct
        return NodeRoute(layout, lists, topology, device, self._dim, wire, rooms, trains=trains)

    @property
    def _told_by_pairs(self) -> bool:
        """Whether it is for those whom it concerns to count distinct rows, and to tell the others."""
        return self._once or self._nodes is not None

    def input_dist(self, buffers: GroupBuffers, rows: int, global_rows: int) -> None:
        """Find out from the keys in ``buffers`` what travels, and bring it into order where an update needs it.

        Args:
            buffers: the batch's.
            rows: B.
            global_rows: G.

        Raises:
            ConfigError: the batch is larger than the buffers.
        """
        if share_of(global_rows, self.comm.size, 0) > buffers.capacity:
            raise ConfigError(
                f"batch: {global_rows} rows on {self.comm.size} ranks, but the buffers hold {buffers.capacity} of each"
            )
        buffers.begin(rows, global_rows)
        lists, layout = buffers.lists, self._placed.layout
        lists.touched.fill(0)
        lists.relay.fill(layout.relay_pad)
        if self._with_lists:
            call(self._device, place_features, buffers.keys, global_rows, self._frequent, buffers.places)
        call(self._device, count_pairs, buffers.named, global_rows, layout, lists)
        call(self._device, list_pairs, buffers.named, global_rows, layout, lists)
        route, unit = buffers.route, self._unit
        route.prepare()
        if buffers.update is None:
            return
        if count := self._named(buffers):
            buffers.update.prepare(route.keys[:count], unit.no_offsets, unit.no_weights, count)
        self._sums.prepare(lists, rows, buffers.order, buffers.touched)

    def lookup(self, buffers: GroupBuffers, *, local: bool = True) -> None:
        """Put the rows that others ask for side by side, and with ``local`` those that lie here into the vectors."""
        buffers.route.pack(self._placed.store.weight)
        if local and not buffers.listed:
            self.lookup_local(buffers)

    def lookup_local(self, buffers: GroupBuffers) -> None:
        """Put the rows that lie here into the vectors; other rows may be on their way meanwhile."""
        places = buffers.num_rows * self._placed.layout.num_places
        target = self._flat(buffers.vectors)[:places]
        call(self._device, move_rows, self._placed.store.weight, buffers.lists.local[:places], target, None)

    def output_dist(self, buffers: GroupBuffers) -> None:
        """Bring the rows to the ranks that ask for them."""
        buffers.route.outward(None if buffers.listed else self._flat(buffers.vectors))
        if self._told_by_pairs:
            self.comm.all_reduce(buffers.lists.flag, "max").wait()

    def sum_replicated(self, buffers: GroupBuffers) -> None:
        """Sum this rank's gradients of replicated rows.

        Raises:
            ConfigError: the buffers are forward only.
        """
        check_trains(buffers.grad_vectors)
        self._sums.sum(buffers.lists, buffers.num_rows, buffers.order, buffers.grad_vectors)

    def reduce_replicated(self, buffers: GroupBuffers) -> None:
        """Sum them over the ranks."""
        self._sums.reduce(buffers.touched)

    def grad_dist(self, buffers: GroupBuffers) -> None:
        """Send the gradients ``grad_vectors`` to the owners.

        Raises:
            ConfigError: the buffers are forward only.
        """
        check_trains(buffers.grad_vectors)
        gradients = None if buffers.listed and self._form.sends else self._flat(buffers.grad_vectors)
        buffers.route.inward(gradients, buffers.scale(self.comm.size), own=not self._adds)

    def sparse_update(self, buffers: GroupBuffers, scalars: Array, guard: Array) -> None:
        """Update the rows that the global batch looked up, from gradients times the loss scale.

        Args:
            buffers: after ``grad_dist`` and ``reduce_replicated``.
            scalars: see ``dlrm.scalars``.
            guard: see ``dlrm.scalars``; ``raise_overflow`` has been called for this batch.
        """
        update, lists, placed = buffers.update, buffers.lists, self._placed
        assert update is not None, "forward only"
        rows, layout, store, unit = buffers.num_rows, placed.layout, placed.store, self._unit
        told = buffers.told(guard, self.comm.size, self._device)
        if self._adds and rows:
            keys = lists.own[: self._features * rows]
            call(
                self._device, sgd_one_hot, store.weight, layout.own_start, keys, layout.place, rows,
                buffers.grad_vectors, scalars, guard,
            )  # fmt: skip
        if count := self._named(buffers):
            route = buffers.route
            update.update(
                route.keys[:count], unit.no_offsets, unit.no_weights, count, route.gradients[:, None], scalars, told
            )
        self._sums.update(lists, scalars, guard)
        self._note_touched(buffers)

    def _note_touched(self, buffers: GroupBuffers) -> None:
        """Also where the guard kept a row: saving a row too many is no harm."""
        if self._touched is None:
            return
        given = buffers.lists.given
        if len(given):
            rest = (self._unit.no_offsets, self._placed.flat.row_start, len(given), self._touched)
            call(self._device, mark_touched, given, *rest, beside="embedding.row_sort")
        frequent = self._touched[: self._placed.frequent].view(np.uint8)
        self._device.xp.bitwise_or(frequent, buffers.lists.touched, out=frequent)

    def bytes_sent(self, buffers: GroupBuffers) -> dict[str, int]:
        """Bytes that a batch hands to the carrier for other ranks, inside nodes and between (``capacity_bytes``)."""
        row_bytes, (outward, inward) = self._dim * buffers.route.gradients.dtype.itemsize, buffers.route.sent_rows
        summed = 0 if buffers.grad_vectors is None else self._sums.num_bytes(buffers.touched)
        reduced = ring_bytes(summed, self.comm.size)
        flag = ring_bytes(buffers.lists.flag.nbytes, self.comm.size) if self._told_by_pairs else 0
        return {
            "input_dist": 0,
            "output_dist": outward * row_bytes,
            "grad_dist": 0 if buffers.grad_vectors is None else inward * row_bytes,
            "all_reduce": reduced + flag,
        }

    def _named(self, buffers: GroupBuffers) -> int:
        """Rows that the update is told of one by one: without this rank's own where these are added up by key."""
        route = buffers.route
        return len(route.keys) - route.own * self._adds

    def _flat(self, vectors: Array) -> Array:
        return vectors.reshape(-1, self._dim)
