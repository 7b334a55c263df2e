"""Rows that travel once for each pair of ranks and batch, however often they are asked for.

Owner and asker know what is asked for (``pair_lists``), sort it, and number the distinct rows in ascending order, so
that the i-th that one packs is again the i-th that the other expects. The asker copies each row that has come to all
its places, and sums its gradients before they go back.

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
from embedding.pair_lists import PairLayout, PairLists
from embedding.row_moves import move_rows
from embedding.row_sort import RowSort, sort_rows
from embedding.runs import Runs, UnitUpdate, number_runs, sum_runs, unsort_slots


class DistinctRoute:
    """See ``exchange_route.Route``: every pair of ranks by itself, which alone know whether their distinct rows fit."""

    def __init__(
        self,
        layout: PairLayout,
        lists: PairLists,
        comm: Comm,
        device: Device,
        dim: int,
        wire: Any,
        distinct: Sequence[int],
        vectors: Any,
        *,
        trains: bool,
    ) -> None:
        """Allocate.

        Args:
            layout: of the tables; chunks in the order of the ranks.
            lists: of the batch, ``even`` and with relays of what this rank asks for (``own_relays``).
            comm: the ranks.
            device: holds everything.
            dim: D.
            wire: type of what travels.
            distinct: U_o of each rank.
            vectors: type of the gradients.
            trains: gradients come back.
        """
        self._lists, self._device = lists, device
        ranks, own = layout.ranks, lists.capacities[layout.rank]
        stride = len(lists.asked) // ranks
        rooms = [min(room, capacity) for room, capacity in zip(distinct, lists.capacities, strict=True)]
        self._asked = self._number(stride, layout.relay_pad, [rooms[owner] for owner in layout.order], dim * trains)
        self._given = self._number(own, layout.total_rows, [rooms[layout.rank]] * ranks, 0)
        self._slots = device.zeros(max(1, ranks * stride), np.int32)[: ranks * stride]
        # A slot more for each pair, which takes what fills lists up.
        pairs = replace(lists, capacities=tuple(room + 1 for room in rooms), given=self._given[1].distinct)
        self._pairs = FlatRoute(pairs, comm, device, dim, wire)
        self.keys, self.gradients = self._pairs.keys, self._pairs.gradients
        self.own, self.sent_rows = self._pairs.own, self._pairs.sent_rows
        self._others = (ranks - 1) * stride
        self._unit = UnitUpdate.create(device)
        if trains:
            sort = self._asked[0]
            self._by_slot = replace(sort, rows=(sort.rows[1], sort.rows[0]))
            self._packed = device.zeros((ranks * stride, dim), vectors)
            self._sums = device.zeros((len(self._asked[1].distinct), dim), np.float32)

    def _number(self, size: int, pad: int, rooms: Sequence[int], dim: int) -> tuple[RowSort, Runs]:
        """What numbers the distinct rows of lists of ``size`` rows each; ``dim``: of gradients that are summed."""
        device, groups = self._device, len(rooms)
        sort = RowSort.create(device, max(1, groups * size), groups * (pad + 1), dim, weighted=False)
        return sort, Runs.create(device, size, pad, rooms, sort.rows[1 - sort.order], self._lists.flag)

    def prepare(self) -> None:
        """See ``Route``: number the distinct rows of every pair that this rank belongs to."""
        lists, unit = self._lists, self._unit
        for keys, (sort, runs) in ((lists.relay, self._asked), (lists.given, self._given)):
            count = len(runs.totals) * runs.size
            if count:
                rows = len(runs.totals) * (runs.pad + 1)
                call(
                    self._device, sort_rows, runs.row_start, keys, unit.no_offsets, unit.no_weights, runs.size, rows,
                    sort,
                )  # fmt: skip
                call(self._device, number_runs, sort.rows[sort.order][:count], runs)
        if len(self._slots):
            sort, runs = self._asked
            call(self._device, unsort_slots, runs.slots, sort.named[sort.order], self._slots)

    def pack(self, weight: Array) -> None:
        """See ``Route``."""
        self._pairs.pack(weight)

    def outward(self, vectors: Array) -> None:
        """See ``Route``."""
        self._pairs.outward(None)
        places = self._lists.asked[: self._others]
        call(self._device, move_rows, self._pairs.come, self._slots[: self._others], vectors, places)

    def inward(self, gradients: Array, scale: float, *, own: bool) -> None:
        """See ``Route``."""
        pairs = self._pairs
        self._sums.fill(0)
        if len(self._packed):
            call(self._device, move_rows, gradients, self._lists.asked, self._packed, None)
            call(self._device, sum_runs, self._packed, self._by_slot, self._sums, self._unit)
        come = len(pairs.come)
        call(self._device, move_rows, self._sums[:come], None, pairs.come, None, scale)
        if own:
            call(self._device, move_rows, self._sums[come:], None, pairs.own_gradients, None, scale)
        pairs.inward(None, scale, own=own)


def own_relays(layout: PairLayout, stride: int) -> tuple[Array, int]:
    """Where lists have the rows that this rank asks for itself: beside ``PairLists.asked``, in chunks of ``stride``.

    Returns:
        [W, W] int32, see ``PairLists.relay_start``; numbers in all.
    """
    starts = np.full((layout.ranks, layout.ranks), -1, np.int32)
    starts[list(layout.order), layout.rank] = np.arange(layout.ranks) * stride
    return starts, layout.ranks * stride
