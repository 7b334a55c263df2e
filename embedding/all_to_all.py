"""All-to-all among the ranks of several nodes, in one step or in two.

``Flat`` sends every pair of ranks its own message. ``Hierarchical`` first collects, inside each node, what goes to
the same place elsewhere, so that one long message per pair of nodes and *lane* crosses between the machines instead
of one per pair of ranks (HugeCTR's hierarchical exchange, for any number of ranks a node). Both move the same rows
unchanged: what arrives is equal bit for bit.

Shapes: W ranks, N nodes, n ranks of this node, L lanes. A lane is a local rank that every node has: L is the size of
the smallest node, and a rank's lane is ``local rank % L``. The stages:

1. inside a node, everything for destinations of lane l goes to local rank l;
2. across, local rank l of node a sends local rank l of node b all that node a has for lane l of node b;
3. only in a node with more than L ranks: lane l hands on what belongs to its other ranks.

Between the nodes run L N (N - 1) messages; flat, the products of the nodes' sizes, which is L times as many for
equal nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from dlrm.device import Array
from dlrm.errors import CommError
from embedding.comm import Comm, Event
from embedding.topology import Topology


class AllToAll(Protocol):
    """What the row exchange asks of either way."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def size(self) -> int:
        """Ranks, W."""

    def all_to_all_v(self, send: Any, send_counts: Sequence[int], recv: Any, recv_counts: Sequence[int]) -> Event:
        """As ``Comm.all_to_all_v``."""


class Flat:
    """One message per pair of ranks."""

    def __init__(self, comm: Comm) -> None:
        """Over the ranks of ``comm``."""
        self.comm = comm
        self.rank = comm.rank
        self.size = comm.size

    def all_to_all_v(self, send: Any, send_counts: Sequence[int], recv: Any, recv_counts: Sequence[int]) -> Event:
        """See ``Comm.all_to_all_v``."""
        return self.comm.all_to_all_v(send, send_counts, recv, recv_counts)


class BufferPool:
    """Arrays that went out of use, to be used again: fresh ones cost a page fault every 4 KiB."""

    def __init__(self, empty: Callable[[Any, Any], Array] = np.empty) -> None:
        """Take new arrays from ``empty(shape, dtype)``."""
        self._empty = empty
        self._free: dict[tuple[str, tuple[int, ...]], list[Array]] = {}

    def take(self, rows: int, like: Array) -> Array:
        """[rows or more, ...] with the trailing shape and dtype of ``like``; a quarter is added to a new one."""
        shelf = self._free.setdefault(_kind(like), [])
        for place in range(len(shelf) - 1, -1, -1):
            if len(shelf[place]) >= rows:
                return shelf.pop(place)
        if shelf:
            shelf.pop()  # too short now, and too short from now on
        return self._empty((rows + rows // 4, *like.shape[1:]), like.dtype)

    def give(self, array: Array) -> None:
        """Hand back what ``take`` gave."""
        self._free.setdefault(_kind(array), []).append(array)


def _kind(array: Array) -> tuple[str, tuple[int, ...]]:
    return array.dtype.str, tuple(array.shape[1:])


class Lanes:
    """Which chunk goes where in the three stages; it depends on the nodes alone.

    A chunk (s, d) is what rank s sends to rank d. Orders are indices into the list of chunks as they lie before a
    stage.

    Attributes:
        count: L.
        is_lane: whether this rank relays.
        hands_on: whether this node has a third stage.
        members: [n] ranks of this node.
        lane_of: [W] lane of every rank.
        to_lanes: [W] order of this rank's chunks, by destination, for stage 1.
        targets: [m] destinations of this rank's lane, everywhere, ascending.
        to_nodes: [n * m] order of the chunks (s in members, d in targets) for stage 2, by node of d, then d, then s.
        mine: [k] local ranks in this rank's lane: itself, and those that it hands on to.
        from_nodes: [k * W] chunks as stage 2 leaves them, by node of s, then d in ``mine``, then s: numbers
            ``place of d in mine * W + s``.
        to_members: [k * W] order of those chunks by d, then s.
    """

    def __init__(self, topology: Topology) -> None:
        """Lay the chunks out for ``topology``."""
        node_of, local_of = np.array(topology.node_of), np.array(topology.local_of)
        ranks = len(node_of)
        self.count = int(np.bincount(node_of).min())
        self.is_lane = topology.local_rank < self.count
        self.hands_on = topology.local_size > self.count
        self.members = np.flatnonzero(node_of == topology.node)
        self.node_of = node_of
        self.lane_of = local_of % self.count
        self.to_lanes = np.argsort(self.lane_of, kind="stable")
        self.targets = np.flatnonzero(self.lane_of == topology.local_rank)
        s, d = (side.reshape(-1) for side in np.meshgrid(self.members, self.targets, indexing="ij"))
        self.to_nodes = np.lexsort((s, d, node_of[d]))
        self.mine = np.flatnonzero(self.lane_of[self.members] == topology.local_rank)
        d, s = (side.reshape(-1) for side in np.meshgrid(self.mine, np.arange(ranks), indexing="ij"))
        self.from_nodes = np.lexsort((s, d, node_of[s]))
        self.to_members = np.argsort(self.from_nodes)

    def per_node(self, lengths: Array, ranks: Array) -> list[int]:
        """Sums of ``lengths`` [n], each belonging to one of ``ranks`` [n], by node."""
        nodes = int(self.node_of.max()) + 1
        return np.bincount(self.node_of[ranks], weights=lengths, minlength=nodes).astype(np.int64).tolist()  # type: ignore[no-any-return]


class Hierarchical:
    """One message per pair of nodes and lane.

    All but the last stage are done when ``all_to_all_v`` returns, so that waits may come in any order.
    """

    def __init__(self, comm: Comm, topology: Topology, empty: Callable[[Any, Any], Array] = np.empty) -> None:
        """Lay out the stages.

        Args:
            comm: all ranks.
            topology: their nodes, found from ``comm``.
            empty: where buffers come from.

        Raises:
            CommError: the topology is of other ranks.
        """
        if len(topology.node_of) != comm.size:
            raise CommError(f"hierarchical all-to-all: the topology has {len(topology.node_of)} ranks, not {comm.size}")
        self.comm = comm
        self.rank = comm.rank
        self.size = comm.size
        self.topology = topology
        self.lanes = Lanes(topology)
        self.pool = BufferPool(empty)
        # With one node, or with one rank on each, there is nothing to collect.
        self.direct = topology.num_nodes in {1, comm.size}

    def all_to_all_v(self, send: Any, send_counts: Sequence[int], recv: Any, recv_counts: Sequence[int]) -> Event:
        """See ``Comm.all_to_all_v``.

        Raises:
            CommError: the counts exceed a buffer.
        """
        if self.direct:
            return self.comm.all_to_all_v(send, send_counts, recv, recv_counts)
        for buffer, counts in ((send, send_counts), (recv, recv_counts)):
            if sum(counts) > len(buffer):
                raise CommError(f"all_to_all_v: counts add up to {sum(counts)}, but the buffer holds {len(buffer)}")
        lanes, inside = self.lanes, self.topology.inside
        local = np.empty((inside.size, 2, self.size), np.int64)
        inside.all_gather(np.array([send_counts, recv_counts], np.int64), local).wait()
        sends, recvs = local[:, 0], local[:, 1]
        collected = self.collect(send, sends)
        lengths = sends[:, lanes.targets].reshape(-1) if lanes.is_lane else np.empty(0, np.int64)
        packed, ordered = self.pack(collected, lengths, lanes.to_nodes)
        event: Event | None = None
        held = [collected, packed]
        if not lanes.hands_on and np.array_equal(lanes.from_nodes, np.arange(self.size)):
            return _Arrival(self._cross(ordered, lengths, recv, recvs), self.pool, held)
        coming = recvs[lanes.mine].reshape(-1)[lanes.from_nodes] if lanes.is_lane else np.empty(0, np.int64)
        arrived = self.pool.take(int(coming.sum()), recv)
        held.append(arrived)
        if lanes.is_lane:
            event = self._cross(ordered, lengths, arrived, recvs)
        if not lanes.hands_on:
            return _Arrival(event, self.pool, held, lambda: copy_chunks(arrived, coming, lanes.to_members, recv))
        if event is not None:
            event.wait()
        sorted_, handed = self.pack(arrived, coming, lanes.to_members)
        held.append(sorted_)
        counts = recvs.sum(axis=1) * (lanes.lane_of[lanes.members] == self.topology.local_rank)
        own = np.where(np.arange(inside.size) == self.topology.local_rank % lanes.count, sum(recv_counts), 0)
        return _Arrival(inside.all_to_all_v(handed, counts.tolist(), recv, own.tolist()), self.pool, held)

    def collect(self, send: Array, sends: Array) -> Array:
        """Stage 1: this rank's chunks to the lanes of their destinations.

        Args:
            send: chunks by destination.
            sends: [n, W] their lengths, for every rank of this node.

        Returns:
            On a lane, chunks (s in members, d in targets), from the pool; elsewhere nothing.
        """
        lanes, inside = self.lanes, self.topology.inside
        own = sends[inside.rank]
        packed, ordered = self.pack(send, own, lanes.to_lanes)
        counts = np.bincount(lanes.lane_of, weights=own, minlength=inside.size).astype(np.int64)
        coming = sends[:, lanes.targets].sum(axis=1) if lanes.is_lane else np.zeros(inside.size, np.int64)
        collected = self.pool.take(int(coming.sum()), send)
        inside.all_to_all_v(ordered, counts.tolist(), collected, coming.tolist()).wait()
        if packed is not None:
            self.pool.give(packed)
        return collected

    def pack(self, source: Array, lengths: Array, order: Array) -> tuple[Array | None, Array]:
        """Chunks of ``source`` in another order.

        Returns:
            An array from the pool, or ``None`` where they lie in order already, and the array to send.
        """
        if len(_pieces(lengths, order)[0]) <= 1:
            return None, source
        packed = self.pool.take(int(lengths.sum()), source)
        copy_chunks(source, lengths, order, packed)
        return packed, packed

    def _cross(self, ordered: Array, lengths: Array, recv: Array, recvs: Array) -> Event:
        """Stage 2, among the same lane of all nodes."""
        lanes = self.lanes
        going = lanes.per_node(lengths, np.tile(lanes.targets, len(lanes.members)))
        coming = lanes.per_node(recvs[lanes.mine].sum(axis=0), np.arange(self.size))
        return self.topology.across.all_to_all_v(ordered, going, recv, coming)


class _Arrival:
    """The last stage under way."""

    def __init__(
        self, event: Event | None, pool: BufferPool, held: list[Array | None], finish: Callable[[], None] | None = None
    ) -> None:
        self._event, self._pool, self._held, self._finish = event, pool, held, finish

    def wait(self) -> None:
        if self._event is not None:
            self._event.wait()
        if self._finish is not None:
            self._finish()
        for array in self._held:
            if array is not None:
                self._pool.give(array)
        self._event, self._finish, self._held = None, None, []


def copy_chunks(source: Array, lengths: Array, order: Array, out: Array) -> None:
    """Write chunks of ``source`` one after the other into ``out``.

    Args:
        source: chunks one after the other along axis 0.
        lengths: [c] their lengths.
        order: [c] which of them comes first, second, ...
        out: same trailing shape and dtype.
    """
    target = 0
    for begin, end in zip(*_pieces(lengths, order), strict=True):
        out[target : target + end - begin] = source[begin:end]
        target += end - begin


def _pieces(lengths: Array, order: Array) -> tuple[Array, Array]:
    """Begins and ends of the chunks in ``order``; empty ones left out, neighbours that stay neighbours joined."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    order = order[lengths[order] > 0]
    begins, ends = begins[order], ends[order]
    first = np.concatenate([np.ones(min(1, len(order)), bool), begins[1:] != ends[:-1]])
    last = np.concatenate([first[1:], np.ones(min(1, len(order)), bool)])
    return begins[first], ends[last]
