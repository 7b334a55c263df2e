"""Rows from their owners and gradients back to them; between nodes, each distinct row once per node and owner.

Ranks of a node often need the same rows. Over a ``Hierarchical`` exchange a node asks an owner for each row once and
hands it to all of its ranks that want it; backward, it adds their gradients up first and sends one. The rows arrive as
they left, bit for bit; the order of every sum is fixed (by local rank, then place), so that runs repeat. Over a
``Flat`` exchange every rank asks and sends for itself.

A ``RowRoute`` settles, from a batch's ids, what goes where; then rows alone travel.

Shapes: W ranks, N nodes, n ranks of this node, K rows that this rank asks for, M rows that it is asked for as owner, D
columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dlrm.device import Array, Device
from embedding.all_to_all import AllToAll, Flat, Hierarchical, copy_chunks
from embedding.comm import Comm
from embedding.wire import Wire

Finish = Callable[[], None]


def reduce_then_exchange(
    exchange: Flat | Hierarchical, ids: Array, rows: Array, counts: Sequence[int], *, device: Device
) -> tuple[Array, Array]:
    """Send gradient rows to the owners; a hierarchical exchange adds equal ids up inside the node first.

    Collective. For a batch whose rows are fetched, too, settle one ``RowRoute`` for both.

    Args:
        exchange: over all ranks.
        ids: [K] as for ``RowRoute``.
        rows: [K, D] float32 or float64.
        counts: [W] as for ``RowRoute``.
        device: where the arrays lie.

    Returns:
        ids [M] and rows [M, D] for this rank as owner. An id may come several times: from each rank (flat), or once
        from each node (hierarchical), in that order; the sparse update adds them up.
    """
    route = RowRoute(exchange, ids, counts, device)
    out = np.empty((len(route.ids), *rows.shape[1:]), rows.dtype)
    route.start_send(rows, out)()
    return route.ids, out


class RowRoute:
    """Which rows go where, for one batch's ids.

    Attributes:
        ids: [M] what this rank is asked for as owner: rank after rank (flat), or node after node, each distinct one
            once (hierarchical).
        counts: lengths of those parts, [W] or [N].
        num_elsewhere: how many of the ids other ranks, or other nodes, ask for.
        notes: [W, x] int64, the note of every rank.
    """

    def __init__(
        self, exchange: AllToAll, ids: Array, counts: Sequence[int], device: Device, note: Sequence[int] = ()
    ) -> None:
        """Settle the route; collective.

        Args:
            exchange: a ``Flat`` or ``Hierarchical`` over all ranks.
            ids: [K] int32 or int64, owner after owner. For one owner, equal ids mean the same row; they may repeat.
                What they mean is the owner's affair: places among its rows, for instance.
            counts: [W] how many for each owner.
            device: where the arrays lie.
            note: x numbers for every other rank, which travel along.
        """
        assert isinstance(exchange, Flat | Hierarchical)
        header = np.array([*counts, *note], np.int64)
        self._path: _FlatPath | _NodePath
        if isinstance(exchange, Hierarchical) and exchange.topology.num_nodes > 1:
            self._path = _NodePath(exchange, ids, header, device)
        else:
            self._path = _FlatPath(exchange.comm, ids, header)
        self.ids, self.counts, self.notes = self._path.ids, self._path.counts, self._path.notes
        self.num_elsewhere = len(self.ids) - self.counts[self._path.own]

    def start_fetch(self, rows: Array, out: Array) -> Finish:
        """Start to send the rows that were asked for; collective, as is what is returned.

        Args:
            rows: [M or more, ...] in the order of ``ids``; used until the end.
            out: [K or more, ...] of the same trailing shape and dtype.

        Returns:
            Waits, and has the rows in ``out`` in the order that the ids had here.
        """
        return self._path.start_fetch(rows, out)

    def start_send(self, rows: Array, out: Array, wire: Wire | None = None, scale: float = 1.0) -> Finish:
        """Start to send gradients to the owners; collective, as is what is returned.

        Args:
            rows: [K or more, D] float32 or float64, in the order that the ids had here; used until the end.
            out: [M or more, D] of the same dtype, in the order of ``ids``.
            wire: how rows look between nodes (flat: between ranks); inside a node they stay, and are summed, as they
                are. ``None``: as they are.
            scale: of ``wire``.
        """
        if wire is not None and wire.plain:
            wire = None
        return self._path.start_send(rows, out, wire, scale)


class _FlatPath:
    """Every rank for itself."""

    def __init__(self, comm: Comm, ids: Array, header: Array) -> None:
        self._comm, self.own = comm, comm.rank
        self._going: list[int] = header[: comm.size].tolist()
        mine = np.empty((comm.size, 1 + len(header) - comm.size), np.int64)
        mine[:, 0], mine[:, 1:] = self._going, header[comm.size :]
        others = np.empty_like(mine)
        comm.all_to_all(mine, others).wait()
        self.counts: list[int] = others[:, 0].tolist()
        self.notes = others[:, 1:]
        self.ids = np.empty(sum(self.counts), ids.dtype)
        self._comm.all_to_all_v(ids, self._going, self.ids, self.counts).wait()

    def start_fetch(self, rows: Array, out: Array) -> Finish:
        return self._comm.all_to_all_v(rows, self.counts, out, self._going).wait

    def start_send(self, rows: Array, out: Array, wire: Wire | None, scale: float) -> Finish:
        if wire is None:
            return self._comm.all_to_all_v(rows, self._going, out, self.counts).wait
        encoded = _encoded(wire, rows[: sum(self._going)], scale)
        words = np.empty((sum(self.counts), rows.shape[1]), np.uint16)
        event = self._comm.all_to_all_v(encoded, self._going, words.view(np.uint8), self.counts)

        def finish() -> None:
            event.wait()
            wire.decode(words, out[: len(words)], scale)

        return finish


def _encoded(wire: Wire, rows: Array, scale: float) -> Array:
    return wire.encode(rows, np.empty(rows.shape, np.uint16), scale)


@dataclass(slots=True)
class _Lane:
    """What a relaying rank keeps of a batch.

    Attributes:
        slots: [rows collected] int64, place of each in the distinct ones.
        going: [N] distinct rows of each node's ranks in this lane, that this node asks for.
        coming: [N] rows that each node asks of this node's ranks in this lane.
        pieces: [N, k] the same for each of those ranks.
    """

    slots: Array
    going: list[int]
    coming: list[int]
    pieces: Array


class _NodePath:
    """Ids collected by lane, made distinct, sent across, handed on where a node has more ranks than lanes."""

    def __init__(self, exchange: Hierarchical, ids: Array, header: Array, device: Device) -> None:
        self._exchange, self._device, self.own = exchange, device, exchange.topology.node
        lanes, topology, size = exchange.lanes, exchange.topology, exchange.size
        inside = topology.inside
        node = np.empty((inside.size, len(header)), np.int64)
        inside.all_gather(header, node).wait()
        self._sends = np.ascontiguousarray(node[:, :size])
        self.notes = np.zeros((size, len(header) - size), np.int64)
        self._lane: _Lane | None = None
        collected = exchange.collect(ids, self._sends)
        arrived = ids[:0]
        if lanes.is_lane:
            self._lane, distinct = self._number(collected, node[:, size:])
            arrived = np.empty(sum(self._lane.coming), ids.dtype)
            topology.across.all_to_all_v(distinct, self._lane.going, arrived, self._lane.coming).wait()
        exchange.pool.give(collected)
        # [n, N]: what each rank of the node is asked for, by node; others than lanes have to be told.
        self._asked = np.zeros((inside.size, topology.num_nodes), np.int64)
        if self._lane is not None:
            self._asked[lanes.mine] = self._lane.pieces.T
        if lanes.hands_on:
            told = np.concatenate([self._asked.reshape(-1), self.notes.reshape(-1) * (topology.local_rank == 0)])
            inside.all_reduce(told).wait()
            self._asked = told[: self._asked.size].reshape(self._asked.shape)
            self.notes = told[self._asked.size :].reshape(self.notes.shape)
        self.counts: list[int] = self._asked[inside.rank].tolist()
        self.ids = arrived
        if lanes.hands_on:
            self.ids = np.empty(sum(self.counts), ids.dtype)
            self._hand_on(arrived, self.ids)

    def _number(self, collected: Array, notes: Array) -> tuple[_Lane, Array]:
        """Number the distinct ids of each owner; tell the other nodes how many there are, and the notes."""
        lanes, topology = self._exchange.lanes, self._exchange.topology
        targets = lanes.targets[np.argsort(lanes.node_of[lanes.targets], kind="stable")]
        lengths = self._sends[:, lanes.targets].reshape(-1)
        held = int(lengths.sum())
        ordered = np.empty(held, collected.dtype)
        copy_chunks(collected, lengths, lanes.to_nodes, ordered)
        distinct, numbers = np.empty(held, collected.dtype), np.empty(held, np.int64)
        sizes = np.zeros(len(targets), np.int64)
        begin = base = 0
        for place, end in enumerate(np.cumsum(self._sends[:, targets].sum(axis=0)).tolist()):
            part = slice(begin, end)
            sizes[place] = number_ids(ordered[part], numbers[part], distinct[base:], device=self._device)
            numbers[part] += base
            begin, base = end, base + int(sizes[place])
        slots = np.empty(held, np.int64)
        copy_chunks(numbers, lengths[lanes.to_nodes], np.argsort(lanes.to_nodes), slots)
        node_of_target = lanes.node_of[targets]
        parts = [np.concatenate([sizes[node_of_target == b], notes.reshape(-1)]) for b in range(topology.num_nodes)]
        ranks = [topology.ranks_of(b) for b in range(topology.num_nodes)]
        coming = [len(lanes.mine) + len(members) * notes.shape[1] for members in ranks]
        told = np.empty(sum(coming), np.int64)
        topology.across.all_to_all_v(np.concatenate(parts), [len(part) for part in parts], told, coming).wait()
        pieces = np.empty((topology.num_nodes, len(lanes.mine)), np.int64)
        for b, words in enumerate(np.split(told, np.cumsum(coming)[:-1])):
            pieces[b] = words[: len(lanes.mine)]
            self.notes[ranks[b]] = words[len(lanes.mine) :].reshape(len(ranks[b]), -1)
        lane = _Lane(slots, lanes.per_node(sizes, targets), pieces.sum(axis=1).tolist(), pieces)
        return lane, distinct[:base]

    def start_fetch(self, rows: Array, out: Array) -> Finish:
        pool, lanes, topology = self._exchange.pool, self._exchange.lanes, self._exchange.topology
        held: list[Array] = []
        distinct, event = rows[:0], None
        if lanes.hands_on:
            rows = self._hand_back(rows)
            held.append(rows)
        if self._lane is not None:
            distinct = pool.take(sum(self._lane.going), rows)
            held.append(distinct)
            event = topology.across.all_to_all_v(rows, self._lane.coming, distinct, self._lane.going)

        def finish() -> None:
            spread = distinct
            if event is not None and self._lane is not None:
                event.wait()
                spread = pool.take(len(self._lane.slots), rows)
                held.append(spread)
                np.take(distinct, self._lane.slots, axis=0, out=spread[: len(self._lane.slots)], mode="clip")
            self._spread(spread, out)
            for array in held:
                pool.give(array)

        return finish

    def start_send(self, rows: Array, out: Array, wire: Wire | None, scale: float) -> Finish:
        pool, lanes, topology = self._exchange.pool, self._exchange.lanes, self._exchange.topology
        collected = self._exchange.collect(rows, self._sends)
        held = [collected]
        # A rank that relays nothing sends nothing in the last stage, but not from where it receives.
        arrived, event = rows[:0], None
        words = out if wire is None else np.empty((sum(self.counts), 2 * rows.shape[1]), np.uint8)
        if self._lane is not None:
            going = summed = pool.take(sum(self._lane.going), rows)
            held.append(summed)
            summed = summed[: sum(self._lane.going)]
            sum_by_slot(collected, self._lane.slots, summed, device=self._device)
            if wire is not None:
                going = _encoded(wire, summed, scale)
            arrived = words
            if lanes.hands_on:
                arrived = pool.take(sum(self._lane.coming), words)
                held.append(arrived)
            event = topology.across.all_to_all_v(going, self._lane.going, arrived, self._lane.coming)

        def finish() -> None:
            if event is not None:
                event.wait()
            if lanes.hands_on:
                self._hand_on(arrived if event is not None else words[:0].copy(), words)
            if wire is not None:
                wire.decode(words.view(np.uint16), out[: len(words)], scale)
            for array in held:
                pool.give(array)

        return finish

    def _hand_on(self, arrived: Array, out: Array) -> None:
        """Stage 3: chunks (node, owner here) become (owner here, node), and go to the owners."""
        pool, inside = self._exchange.pool, self._exchange.topology.inside
        packed, ordered = None, arrived
        if self._lane is not None:
            by_owner = np.arange(self._lane.pieces.size).reshape(self._lane.pieces.shape).T.reshape(-1)
            packed, ordered = self._exchange.pack(arrived, self._lane.pieces.reshape(-1), by_owner)
        to_owners, to_lane = self._between_owners_and_lanes()
        inside.all_to_all_v(ordered, to_owners, out, to_lane).wait()
        if packed is not None:
            pool.give(packed)

    def _hand_back(self, rows: Array) -> Array:
        """Stage 3 the other way round: an array of the pool, with chunks (node, owner here) on a lane."""
        pool, lanes, inside = self._exchange.pool, self._exchange.lanes, self._exchange.topology.inside
        to_owners, to_lane = self._between_owners_and_lanes()
        by_owner = pool.take(sum(to_owners), rows)
        inside.all_to_all_v(rows, to_lane, by_owner, to_owners).wait()
        if self._lane is None:
            return by_owner
        by_node = pool.take(sum(to_owners), rows)
        lengths = self._lane.pieces.T.reshape(-1)
        copy_chunks(by_owner, lengths, np.arange(len(lengths)).reshape(len(lanes.mine), -1).T.reshape(-1), by_node)
        pool.give(by_owner)
        return by_node

    def _between_owners_and_lanes(self) -> tuple[list[int], list[int]]:
        """Rows between this rank as a lane and each owner of its node; as an owner, and each lane."""
        lanes, topology = self._exchange.lanes, self._exchange.topology
        to_owners, to_lane = (np.zeros(topology.local_size, np.int64) for _ in range(2))
        if self._lane is not None:
            to_owners[lanes.mine] = self._asked[lanes.mine].sum(axis=1)
        to_lane[topology.local_rank % lanes.count] = sum(self.counts)
        return to_owners.tolist(), to_lane.tolist()

    def _spread(self, collected: Array, out: Array) -> None:
        """Stage 1 the other way round: chunks (asking rank here, owner) go to those who asked."""
        pool, lanes, inside = self._exchange.pool, self._exchange.lanes, self._exchange.topology.inside
        own = self._sends[inside.rank]
        coming = np.bincount(lanes.lane_of, weights=own, minlength=inside.size).astype(np.int64)
        going = self._sends[:, lanes.targets].sum(axis=1)
        by_lane = pool.take(int(own.sum()), out)
        inside.all_to_all_v(collected, going.tolist(), by_lane, coming.tolist()).wait()
        copy_chunks(by_lane, own[lanes.to_lanes], np.argsort(lanes.to_lanes), out)
        pool.give(by_lane)


def number_ids(ids: Array, slots: Array, distinct: Array, *, device: Device) -> int:
    """Number the distinct ids in the order of their first occurrence.

    Args:
        ids: [K] int32 or int64.
        slots: [K] int64, written: number of each.
        distinct: [K or more], written: the ids by number.
        device: where the arrays lie.

    Returns:
        How many there are.
    """
    kernel = device.kernel(__name__, "number_ids")
    if kernel is not None:
        return int(kernel(ids, slots, distinct))
    found, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    distinct[: len(found)] = found[order]
    slots[...] = np.argsort(order)[inverse]
    return len(found)


def sum_by_slot(rows: Array, slots: Array, out: Array, *, device: Device) -> None:
    """Add rows up by slot, in their order.

    Args:
        rows: [K or more, D].
        slots: [K] int64 below M.
        out: [M, D], overwritten.
        device: where the arrays lie.
    """
    kernel = device.kernel(__name__, "sum_by_slot")
    if kernel is not None:
        kernel(rows, slots, out)
        return
    out[...] = 0
    np.add.at(out, slots, rows[: len(slots)])
