"""How listed rows travel between nodes: first inside the node, then in one message for each pair of nodes and lane.

A lane is a local rank. Outward, a row goes inside its owner's node to the local rank of the rank that asks for it, then
to that rank. Inward, gradients go inside the node to the owner's local rank; there those of the same row are summed,
and one gradient for each distinct row crosses. Owner and lane find the distinct rows by themselves, in ascending order.
Where a row lies at every stage follows from the lists' capacities, so that packing is copying by an index made once.

Shapes: N nodes of L ranks, C_o most rows that rank o sends to one other, U_o most distinct rows that a node asks of
rank o, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dlrm.device import Array, Device
from dlrm.errors import ConfigError
from embedding.exchange_route import call, exchange
from embedding.pair_lists import PairLayout, PairLists
from embedding.row_moves import move_rows
from embedding.row_sort import RowSort, sort_rows
from embedding.runs import Runs, UnitUpdate, number_runs, sum_runs
from embedding.topology import Topology


@dataclass(frozen=True, slots=True)
class Nodes:
    """N nodes of L ranks, seen from one rank.

    Attributes:
        ranks: [N][L], the rank at each place.
        node: of this rank.
        local: its local rank.
    """

    ranks: tuple[tuple[int, ...], ...]
    node: int
    local: int

    @classmethod
    def of(cls, topology: Topology) -> Nodes:
        """From the topology.

        Raises:
            ConfigError: nodes have different numbers of ranks.
        """
        ranks = tuple(tuple(topology.ranks_of(node)) for node in range(topology.num_nodes))
        if len({len(own) for own in ranks}) > 1:
            raise ConfigError(
                f"embedding.all_to_all: hierarchical between GPUs needs nodes of one size, not of "
                f"{', '.join(str(len(own)) for own in ranks)} ranks; use flat"
            )
        return cls(ranks, topology.node, topology.local_rank)

    @property
    def others(self) -> list[int]:
        """The other nodes."""
        return [node for node in range(len(self.ranks)) if node != self.node]

    @property
    def mates(self) -> list[int]:
        """Local ranks of the others in this node."""
        return [local for local in range(len(self.ranks[0])) if local != self.local]

    @property
    def order(self) -> tuple[int, ...]:
        """All ranks: those of other nodes by node, this node's, this one."""
        away = [rank for node in self.others for rank in self.ranks[node]]
        here = [self.ranks[self.node][local] for local in self.mates]
        return (*away, *here, self.ranks[self.node][self.local])

    def relay_rows(self, capacities: Sequence[int]) -> int:
        """Room for each pair of ranks in the lists of this lane."""
        return max((capacities[self.ranks[node][self.local]] for node in self.others), default=0)

    def relays(self, capacities: Sequence[int]) -> tuple[Array, int]:
        """Where a lane lists what its node gets of the owners in other nodes.

        Args:
            capacities: C_o of each rank.

        Returns:
            [W, W] int32, see ``PairLists.relay_start``; numbers in all.
        """
        size = sum(map(len, self.ranks))
        capacity = self.relay_rows(capacities)
        starts, begin = np.full((size, size), -1, np.int32), 0
        for node in self.others:
            for asking in self.ranks[self.node]:
                starts[self.ranks[node][self.local], asking] = begin
                begin += capacity
        return starts, begin


class _Regions:
    """Chunks one after the other in one array, by name."""

    def __init__(self) -> None:
        self.size = 0
        self.begin: dict[tuple[Any, ...], range] = {}

    def add(self, name: tuple[Any, ...], rows: int) -> None:
        self.begin[name] = range(self.size, self.size + rows)
        self.size += rows

    def index(self, names: Sequence[tuple[Any, ...]]) -> Array:
        """Where the rows of some chunks lie, one after the other."""
        return np.concatenate([np.empty(0, np.int64), *(np.array(self.begin[name]) for name in names)]).astype(np.int32)


class NodeRoute:
    """See ``exchange_route.Route``."""

    def __init__(
        self,
        layout: PairLayout,
        lists: PairLists,
        topology: Topology,
        device: Device,
        dim: int,
        wire: Any,
        distinct: Sequence[int],
        *,
        trains: bool,
    ) -> None:
        """Allocate.

        Args:
            layout: of the tables; chunks in the order of ``Nodes.order``.
            lists: of the batch, with room for relays where it trains.
            topology: the nodes; its groups carry buffers of the device.
            device: holds everything.
            dim: D.
            wire: type of what travels.
            distinct: U_o of each rank.
            trains: gradients come back.
        """
        self._nodes, self._topology, self._device, self._lists = Nodes.of(topology), topology, device, lists
        self._wire, self._dim, self._capacities = wire, dim, lists.capacities
        self._own = lists.capacities[layout.rank]
        self._plan_outward()
        self._trains = trains
        self.sent_rows = sum(self._inside_counts) + sum(self._cross_counts), 0
        self.keys, self.gradients, self.own = lists.given[:0], device.zeros((0, dim), wire), 0
        if trains:
            self._plan_inward()
            self._plan_sums(layout, distinct)

    # --- outward

    def _plan_outward(self) -> None:
        """Where every row lies on its way out: packed by lane; by node; as it is asked for."""
        nodes, sizes = self._nodes, self._capacities
        all_nodes, here = range(len(nodes.ranks)), nodes.ranks[nodes.node]
        stage = _Regions()
        for mate in nodes.mates:
            for node in all_nodes:
                stage.add(("packed", node, mate), self._own)
        for node in nodes.others:
            stage.add(("packed", node, nodes.local), self._own)
        for mate in nodes.mates:
            for node in all_nodes:
                stage.add(("come", node, mate), sizes[here[mate]])
        cross = _Regions()
        for node in nodes.others:
            for local in range(len(here)):
                cross.add((node, local), sizes[here[local]])
        arrive = _Regions()
        for node in nodes.others:
            for local, owner in enumerate(nodes.ranks[node]):
                arrive.add((node, local), sizes[owner])
        place = {rank: (node, local) for node, own in enumerate(nodes.ranks) for local, rank in enumerate(own)}
        self._out = self._device.zeros((stage.size, self._dim), self._wire)
        self._cross = self._device.zeros((cross.size, self._dim), self._wire)
        self._arrived = self._device.zeros((arrive.size, self._dim), self._wire)
        index = self._device.xp.asarray
        self._pack_to = index(stage.index([("packed", *place[rank]) for rank in nodes.order[:-1]]))
        self._cross_from = index(
            stage.index(
                [("packed" if local == nodes.local else "come", node, local) for node, local in cross.begin]
            )
        )  # fmt: skip
        self._here_from = index(stage.index([("come", nodes.node, mate) for mate in nodes.mates]))
        self._packed, self._come = (
            sum(len(rows) for name, rows in stage.begin.items() if name[0] == kind and name[2] != nodes.local)
            for kind in ("packed", "come")
        )
        self._lane = stage.size - self._packed - self._come
        self._inside_counts = [0 if local == nodes.local else len(all_nodes) * self._own for local in range(len(here))]
        self._come_counts = [
            0 if local == nodes.local else len(all_nodes) * sizes[rank] for local, rank in enumerate(here)
        ]
        self._cross_counts = [0 if node == nodes.node else sum(sizes[rank] for rank in here) for node in all_nodes]
        self._arrive_counts = [
            0 if node == nodes.node else sum(sizes[rank] for rank in nodes.ranks[node]) for node in all_nodes
        ]

    def pack(self, weight: Array) -> None:
        """See ``Route``: packed by the lane that hands it on."""
        others = len(self._pack_to)
        self._move(weight, self._lists.given[:others], self._out, self._pack_to)

    def outward(self, vectors: Array) -> None:
        """See ``Route``."""
        packed, come = self._packed, self._packed + self._lane
        exchange(
            self._topology.inside, self._out[:packed], self._inside_counts, self._out[come:], self._come_counts
        )  # fmt: skip
        self._move(self._out, self._cross_from, self._cross, None)
        exchange(self._topology.across, self._cross, self._cross_counts, self._arrived, self._arrive_counts)
        asked, away = self._lists.asked, len(self._arrived)
        self._move(self._arrived, None, vectors, asked[:away])
        self._move(self._out, self._here_from, vectors, asked[away : away + len(self._here_from)])

    # --- inward

    def _plan_inward(self) -> None:
        """Where every gradient lies on its way back inside this node."""
        nodes, sizes = self._nodes, self._capacities
        all_nodes, here = range(len(nodes.ranks)), nodes.ranks[nodes.node]
        lane = [own[nodes.local] for own in nodes.ranks]  # owners for whom this rank relays, and itself
        place = {rank: (node, local) for node, own in enumerate(nodes.ranks) for local, rank in enumerate(own)}
        stage = _Regions()
        for mate in nodes.mates:
            for node in all_nodes:
                stage.add(("packed", node, mate), sizes[nodes.ranks[node][mate]])
        for node in nodes.others:
            stage.add(("packed", node, nodes.local), sizes[lane[node]])
        for mate in nodes.mates:
            for node in all_nodes:
                stage.add(("come", node, mate), sizes[lane[node]])
        self._back = self._device.zeros((stage.size, self._dim), self._wire)
        index = self._device.xp.asarray
        self._back_to = index(stage.index([("packed", *place[rank]) for rank in nodes.order[:-1]]))
        self._relay_rows = nodes.relay_rows(sizes)
        # Lists of a lane have one length for all owners: what is missing of it is not copied.
        relay_from = []
        for node in nodes.others:
            for local in range(len(here)):
                rows = stage.index([("packed" if local == nodes.local else "come", node, local)])
                relay_from.append(np.pad(rows, (0, self._relay_rows - len(rows)), constant_values=-1))
        self._relay_from = index(np.concatenate([np.empty(0, np.int32), *relay_from]))
        self._own_from = index(stage.index([("come", nodes.node, mate) for mate in nodes.mates]))
        going = [sum(sizes[own[mate]] for own in nodes.ranks) for mate in range(len(here))]
        self._back_counts = [0 if mate == nodes.local else count for mate, count in enumerate(going)]
        coming = sum(sizes[owner] for owner in lane)
        self._back_come_counts = [0 if mate == nodes.local else coming for mate in range(len(here))]
        self._back_packed = sum(self._back_counts)
        self._back_come = stage.size - sum(self._back_come_counts)

    def _plan_sums(self, layout: PairLayout, distinct: Sequence[int]) -> None:
        """What sums the gradients of this node for the owners of the lane, and what this rank gets as an owner."""
        nodes, device, locals_ = self._nodes, self._device, len(self._nodes.ranks[0])
        lane = [nodes.ranks[node][nodes.local] for node in nodes.others]
        size, groups = locals_ * self._relay_rows, len(lane)
        own_size = locals_ * self._own
        own_room = min(distinct[layout.rank], own_size)
        self._relayed = device.zeros((groups * size, self._dim), self._wire)
        sort = RowSort.create(device, max(1, groups * size), groups * (layout.relay_pad + 1), self._dim, weighted=False)
        rooms = [min(distinct[owner], locals_ * self._capacities[owner]) for owner in lane]
        self._sort, here = sort, sort.order
        self._runs = Runs.create(device, size, layout.relay_pad, rooms, sort.rows[1 - here], self._lists.flag)
        rows = (sort.rows[1], sort.rows[0])
        self._by_slot = replace(sort, rows=rows)
        self._own_sort = RowSort.create(
            device, max(1, groups * own_size), groups * (layout.total_rows + 1), self._dim, weighted=False
        )
        spare = self._own_sort.rows[1 - self._own_sort.order]
        self._own_runs = Runs.create(device, own_size, layout.total_rows, [own_room] * groups, spare, self._lists.flag)
        self._sums = device.zeros((len(self._runs.distinct), self._dim), np.float32)
        self._sums_out = device.zeros((len(self._runs.distinct), self._dim), self._wire)
        self._sum_counts, self._own_counts = [0] * len(nodes.ranks), [0] * len(nodes.ranks)
        for node, room in zip(nodes.others, rooms, strict=True):
            self._sum_counts[node], self._own_counts[node] = room + 1, own_room + 1
        self._from_away = sum(self._own_counts)
        total = self._from_away + len(self._own_from) + self._own
        self.keys, self.own = device.zeros(max(1, total), np.int32)[:total], self._own
        self.gradients = device.zeros((total, self._dim), self._wire)
        self._unit = UnitUpdate.create(device)
        self.sent_rows = self.sent_rows[0], sum(self._back_counts) + sum(self._sum_counts)

    def prepare(self) -> None:
        """See ``Route``: find the distinct rows of this node for the owners of its lane, and of others as an owner."""
        if not self._trains:
            return
        groups, unit = len(self._runs.totals), self._unit
        away = groups * self._own_runs.size
        if groups:
            for keys, sort, runs in (
                (self._lists.relay, self._sort, self._runs),
                (self._lists.given[:away], self._own_sort, self._own_runs),
            ):
                if runs.size:
                    rows = groups * (runs.pad + 1)
                    nothing = (unit.no_offsets, unit.no_weights)
                    call(self._device, sort_rows, runs.row_start, keys, *nothing, runs.size, rows, sort)
                call(self._device, number_runs, sort.rows[sort.order][: groups * runs.size], runs)
            self.keys[: self._from_away] = self._own_runs.distinct
        self.keys[self._from_away :] = self._lists.given[away:]

    def inward(self, gradients: Array, scale: float, *, own: bool) -> None:
        """See ``Route``."""
        asked = self._lists.asked
        others = len(self._back_to)
        self._move(gradients, asked[:others], self._back, self._back_to, scale)
        if own:
            mine = self.gradients[len(self.gradients) - self._own :]
            self._move(gradients, asked[others:], mine, None, scale)
        exchange(
            self._topology.inside, self._back[: self._back_packed], self._back_counts, self._back[self._back_come :],
            self._back_come_counts,
        )  # fmt: skip
        begin = self._from_away
        here = self.gradients[begin : begin + len(self._own_from)]
        self._move(self._back, self._own_from, here, None)
        if not len(self._runs.totals):
            return
        self._move(self._back, self._relay_from, self._relayed, None)
        self._sums.fill(0)
        if self._runs.size:
            call(self._device, sum_runs, self._relayed, self._by_slot, self._sums, self._unit)
        self._move(self._sums, None, self._sums_out, None)
        exchange(self._topology.across, self._sums_out, self._sum_counts, self.gradients[:begin], self._own_counts)

    def _move(
        self, source: Array, source_rows: Array | None, target: Array, target_rows: Array | None, scale: float = 1.0
    ) -> None:
        call(self._device, move_rows, source, source_rows, target, target_rows, scale)
