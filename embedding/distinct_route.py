"""Rows that travel once for each pair of ranks and batch, however often they are asked for.

Owner and asker know what is asked for (``pair_lists``), sort it, and number the distinct rows in ascending order, so
that the i-th that one packs is again the i-th that the other expects. The asker copies each row that has come to all
its places, and sums its gradients before they go back. By node, a rank numbers besides what others of its node get of
the owners of its lane, whose gradients it sums (``node_route``).

Shapes: W ranks, C_o most rows that rank o is asked for by one other, S the most of them, U_o most distinct ones of
these, D columns, B rows of this rank, F places of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dlrm.device import Array, Device
from embedding.comm import Comm
from embedding.exchange_route import FlatRoute, call
from embedding.node_route import NodeRoute, Nodes
from embedding.pair_lists import PairLayout, PairLists
from embedding.row_moves import move_rows
from embedding.row_sort import RowSort, sort_rows
from embedding.runs import Runs, UnitUpdate, number_runs, put_numbers, sum_runs
from embedding.topology import Topology


class _Numbering:
    """Numbers the distinct rows of lists of one length each.

    Attributes:
        size: of a list.
        count: rows of all lists.
        sort: the rows in order.
        runs: their numbers.
    """

    def __init__(self, device: Device, size: int, pad: int, rooms: Sequence[int], dim: int, flag: Array) -> None:
        """Allocate.

        Args:
            device: holds it.
            size: of a list.
            pad: what fills lists up, above all rows.
            rooms: most distinct rows of each list.
            dim: of gradients that are summed; 0: none are.
            flag: set to 1 where a list has more.
        """
        self._device, groups = device, len(rooms)
        self.size, self.count, self._rows = size, groups * size, groups * (pad + 1)
        self.sort = RowSort.create(device, max(1, self.count), self._rows, dim, weighted=False)
        self.runs = Runs.create(device, size, pad, rooms, self.sort.rows[1 - self.sort.order], flag)

    def find(self, rows: Array, unit: UnitUpdate) -> None:
        """Number the distinct rows of the lists, one after the other in ``rows``."""
        if self.count:
            nothing = (unit.no_offsets, unit.no_weights)
            call(self._device, sort_rows, self.runs.row_start, rows, *nothing, self.size, self._rows, self.sort)
            call(self._device, number_runs, self.sort.rows[self.sort.order][: self.count], self.runs)


class DistinctRoute:
    """See ``exchange_route.Route``: only the ranks of a pair know whether their distinct rows fit."""

    def __init__(
        self,
        layout: PairLayout,
        lists: PairLists,
        comm: Comm,
        device: Device,
        dim: int,
        wire: Any,
        once: Sequence[int],
        vectors: Any,
        by_node: tuple[Topology, Sequence[int] | None] | None,
        *,
        trains: bool,
    ) -> None:
        """Allocate.

        Args:
            layout: of the tables; chunks in the order of the ranks, or by node of ``Nodes.order``.
            lists: of the batch, ``even`` and with relays (``distinct_relays``).
            comm: the ranks.
            device: holds everything.
            dim: D.
            wire: type of what travels.
            once: U_o of each rank.
            vectors: type of the gradients.
            by_node: the nodes, and of each rank the most distinct rows that one asks for (or as many as pairs may);
                ``None``: every pair of ranks by itself.
            trains: gradients come back.
        """
        self._lists, self._device, self._unit = lists, device, UnitUpdate.create(device)
        ranks, own = layout.ranks, lists.capacities[layout.rank]
        stride = len(lists.asked) // ranks
        rooms = [min(room, capacity) for room, capacity in zip(once, lists.capacities, strict=True)]
        asked_of = [rooms[owner] for owner in layout.order]
        self._asked = _Numbering(device, stride, layout.relay_pad, asked_of, dim * trains, lists.flag)
        self._given = _Numbering(device, own, layout.total_rows, [rooms[layout.rank]] * ranks, 0, lists.flag)
        self._slots = device.zeros(max(1, ranks * stride), np.int32)[: ranks * stride]
        self._others = (ranks - 1) * stride
        # A slot more for each pair, which takes what fills lists up.
        slots = len(self._asked.runs.distinct)
        pairs = replace(
            lists, capacities=tuple(room + 1 for room in rooms), given=self._given.runs.distinct,
            asked=device.xp.arange(slots, dtype=np.int32),
        )  # fmt: skip
        self._relayed: _RelayedRows | None = None
        self._pairs: FlatRoute | NodeRoute
        if by_node is None:
            self._pairs = FlatRoute(pairs, comm, device, dim, wire)
            self._come = self._pairs.come
        else:
            topology, distinct = by_node
            if trains:
                self._relayed = _RelayedRows(layout, pairs, Nodes.of(topology), device, self._asked)
                pairs = replace(pairs, relay=self._relayed.rows)
            most = [topology.local_size * capacity for capacity in pairs.capacities] if distinct is None else distinct
            self._pairs = NodeRoute(layout, pairs, topology, device, dim, wire, most, trains=trains)
            self._come = device.zeros((slots, dim), wire)
        self.keys, self.gradients = self._pairs.keys, self._pairs.gradients
        self.own, self.sent_rows = self._pairs.own, self._pairs.sent_rows
        if trains:
            sort = self._asked.sort
            self._by_slot = replace(sort, rows=(sort.rows[1], sort.rows[0]))
            self._packed = device.zeros((self._asked.count, dim), vectors)
            self._sums = device.zeros((slots, dim), np.float32)

    def prepare(self) -> None:
        """See ``Route``: number the distinct rows of every pair that this rank belongs to."""
        asked, relay = self._asked, self._lists.relay
        asked.find(relay, self._unit)
        self._given.find(self._lists.given, self._unit)
        named = asked.sort.named[asked.sort.order][: asked.count]
        call(self._device, put_numbers, asked.runs.slots, named, self._slots)
        if self._relayed is not None:
            self._relayed.find(relay[asked.count :], self._unit)
        self._pairs.prepare()

    def pack(self, weight: Array) -> None:
        """See ``Route``."""
        self._pairs.pack(weight)

    def outward(self, vectors: Array) -> None:
        """See ``Route``."""
        if isinstance(self._pairs, FlatRoute):
            self._pairs.outward(None)
        else:
            self._pairs.outward(self._come)
        places = self._lists.asked[: self._others]
        call(self._device, move_rows, self._come, self._slots[: self._others], vectors, places)

    def inward(self, gradients: Array, scale: float, *, own: bool) -> None:
        """See ``Route``."""
        self._sums.fill(0)
        if len(self._packed):
            call(self._device, move_rows, gradients, self._lists.asked, self._packed, None)
            call(self._device, sum_runs, self._packed, self._by_slot, self._sums, self._unit)
        self._pairs.inward(self._sums, scale, own=own)


class _RelayedRows:
    """The distinct rows that each rank of this node gets of each owner of this rank's lane in other nodes.

    Attributes:
        rows: numbers of rows, see ``PairLists.relay``, in the chunks that ``NodeRoute`` expects.
    """

    def __init__(self, layout: PairLayout, pairs: PairLists, nodes: Nodes, device: Device, asked: _Numbering) -> None:
        """Allocate.

        Args:
            layout: of the tables.
            pairs: lists of distinct rows.
            nodes: the nodes.
            device: holds everything.
            asked: numbers what this rank itself gets of each owner.
        """
        self._device, self._asked = device, asked
        chunk, here = nodes.relay_rows(pairs.capacities), nodes.ranks[nodes.node]
        chunks = [(nodes.ranks[node][nodes.local], asking) for node in nodes.others for asking in here]
        rooms = [pairs.capacities[owner] - 1 for owner, asking in chunks if asking != layout.rank]
        self._relayed = _Numbering(device, asked.size, layout.relay_pad, rooms, 0, pairs.flag)
        # One place more takes what nobody here relays.
        nowhere = len(chunks) * chunk
        self._rows = device.zeros(nowhere + 1, np.int32)
        self._rows.fill(layout.relay_pad)
        self.rows = self._rows[:nowhere]
        own = np.full(len(asked.runs.distinct), nowhere, np.uint32)
        begins = device.to_host(asked.runs.slot_start)
        relayed = [np.empty(0, np.int64)]
        for number, (owner, asking) in enumerate(chunks):
            places = np.arange(pairs.capacities[owner]) + number * chunk
            if asking == layout.rank:
                begin = int(begins[layout.order.index(owner)])
                own[begin : begin + len(places)] = places
            else:
                relayed.append(places)
        self._own_places = device.xp.asarray(own)
        self._places = device.xp.asarray(np.concatenate(relayed).astype(np.uint32))

    def find(self, relay: Array, unit: UnitUpdate) -> None:
        """Write ``rows``, once what this rank asks for has been numbered.

        Args:
            relay: what others of its node ask for, in the order of ``distinct_relays``.
            unit: of the route.
        """
        self._relayed.find(relay, unit)
        for runs, places in ((self._asked.runs, self._own_places), (self._relayed.runs, self._places)):
            call(self._device, put_numbers, runs.distinct, places, self._rows)


def distinct_relays(layout: PairLayout, stride: int, nodes: Nodes | None) -> tuple[Array, int]:
    """Where lists have the rows that this rank asks for, beside ``PairLists.asked``, and then those that it relays.

    Args:
        layout: of the tables.
        stride: S, of every chunk.
        nodes: ``None``: it relays nothing.

    Returns:
        [W, W] int32, see ``PairLists.relay_start``; numbers in all.
    """
    starts = np.full((layout.ranks, layout.ranks), -1, np.int32)
    starts[list(layout.order), layout.rank] = np.arange(layout.ranks) * stride
    count = layout.ranks
    if nodes is not None:
        lane = [nodes.ranks[node][nodes.local] for node in nodes.others]
        pairs = [(owner, asking) for owner in lane for asking in nodes.ranks[nodes.node] if asking != layout.rank]
        for pair in pairs:
            starts[pair] = count * stride
            count += 1
    return starts, count * stride
