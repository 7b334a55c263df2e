"""Gradients of the rows that lie on every GPU: summed row by row on each rank, then over all ranks.

Over the ranks all of them, or those alone that the batch touches (``touched_rows``).

Shapes: T tables of one key a bag, B rows of this rank, F places of the vectors, D columns, H replicated rows, R places
of the list of touched ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dlrm.device import Array, Device
from embedding.captured_placement import CapturedPlacement
from embedding.comm import Comm
from embedding.exchange_route import call
from embedding.pair_lists import PairLists
from embedding.reduce_way import ReduceWay, dense_is_faster
from embedding.row_moves import move_rows
from embedding.row_sort import COUNT, RowSort, sort_rows
from embedding.runs import UnitUpdate
from embedding.sorted_update import origins_of, update_sorted, update_summed
from embedding.sparse_optim import sgd_one_hot
from embedding.touched_rows import TouchedRows, list_touched


class CapturedSums:
    """The sums, which one batch uses at a time.

    Args:
        placed: what this rank holds.
        device: holds it.
        comm: the ranks.
        kind: of the tables' optimiser.
        ordered: rows are brought into order first (``prepare``), and a sum has the same bits every time; otherwise
            gradients are added as they come.
    """

    def __init__(self, placed: CapturedPlacement, device: Device, comm: Comm, kind: str, *, ordered: bool) -> None:
        self._placed, self._device, self._comm, self._kind, self._ordered = placed, device, comm, kind, ordered
        xp, store = device.xp, placed.store
        self._tables, self._dim = len(placed.layout.threshold), store.weight.shape[1]
        self._origins = xp.asarray(origins_of(store.shards))
        self._mean = xp.asarray(np.zeros(self._tables, np.bool_))
        # One row more for the keys of other rows.
        self._sums = device.zeros((placed.frequent + 1, self._dim), np.float32)
        self._side_by_side = device.empty((0, self._dim), np.float32)
        self._unit = UnitUpdate.create(device)

    def num_bytes(self, touched: TouchedRows | None) -> int:
        """What all ranks sum."""
        return 4 * (self._placed.frequent if touched is None else len(touched.rows)) * int(self._dim)

    def touched(self, room: int | None, way: ReduceWay) -> TouchedRows | None:
        """Room for the list of a batch's touched rows; ``None``: all rows are summed, which is faster.

        Args:
            room: most rows that a batch touches; ``None``: not known.
            way: what the plan predicts.
        """
        row_bytes, frequent = 4 * int(self._dim), self._placed.frequent
        if room is None or room >= frequent:
            return None
        if dense_is_faster(room * row_bytes, frequent * row_bytes, way.start_bytes):
            return None
        if room > len(self._side_by_side):
            self._side_by_side = self._device.zeros((room, self._dim), np.float32)
        return TouchedRows.create(self._device, frequent, self._side_by_side[:room])

    def order(self, rows: int) -> RowSort | None:
        """Room for the order of a batch's keys; ``None``: nobody asks.

        Args:
            rows: most rows of this rank.
        """
        if not (self._ordered and self._placed.frequent):
            return None
        keys = max(1, self._tables * rows)
        return RowSort.create(self._device, keys, self._placed.frequent + 1, self._dim, weighted=False)

    def prepare(self, lists: PairLists, rows: int, order: RowSort | None, touched: TouchedRows | None) -> None:
        """Bring a batch's keys into order.

        Args:
            lists: of the batch; ``flag`` is set where more rows are touched than there is room for.
            rows: B.
            order: written.
            touched: written.
        """
        if touched is not None:
            call(self._device, list_touched, lists.touched, touched, lists.flag)
        if order is None or not rows:
            return
        unit, frequent = self._unit, lists.frequent[: self._tables * rows]
        call(
            self._device, sort_rows, self._placed.layout.frequent_start, frequent, unit.no_offsets, unit.no_weights,
            rows, self._placed.frequent + 1, order,
        )  # fmt: skip
        # Keys of other rows stand for the last one, and so behind all that are summed.
        order.info[COUNT : COUNT + 1] = lists.replicated

    def sum(self, lists: PairLists, rows: int, order: RowSort | None, gradients: Array) -> None:
        """Sum a batch's gradients on this rank.

        Args:
            lists: of the batch.
            rows: B.
            order: as ``prepare`` left it.
            gradients: [B or more, F, D]; those of other rows are not looked at.
        """
        if not self._placed.frequent:
            return
        self._sums.fill(0)
        if rows:
            self._sum(lists.frequent[: self._tables * rows], rows, order, gradients)

    def reduce(self, touched: TouchedRows | None) -> None:
        """Sum what ``sum`` has summed over the ranks (collective); ``touched`` as ``prepare`` left it."""
        if not self._placed.frequent:
            return
        if touched is None:
            self._comm.all_reduce(self._sums[: self._placed.frequent]).wait()
            return
        # What lies behind the last row is summed too, and has to stay a number.
        going = touched.gradients
        going.fill(0)
        call(self._device, move_rows, self._sums, touched.rows, going, None)
        self._comm.all_reduce(going).wait()
        call(self._device, move_rows, going, None, self._sums, touched.rows)

    def _sum(self, keys: Array, rows: int, order: RowSort | None, gradients: Array) -> None:
        layout, unit = self._placed.layout, self._unit
        if order is None:
            call(
                self._device, sgd_one_hot, self._sums, layout.frequent_start, keys, layout.place, rows, gradients,
                unit.scalars, unit.guard,
            )  # fmt: skip
            return
        call(
            self._device, update_sorted, "sgd", self._sums, [], layout.frequent_start, keys, unit.no_offsets,
            unit.no_weights, self._mean, layout.place, rows, gradients, self._origins, unit.scalars, unit.guard, order,
        )  # fmt: skip

    def update(self, lists: PairLists, scalars: Any, guard: Any) -> None:
        """Update the rows that the global batch looked up.

        Args:
            lists: of the batch.
            scalars: see ``dlrm.scalars``.
            guard: see ``dlrm.scalars``.
        """
        store, frequent = self._placed.store, self._placed.frequent
        if frequent:
            call(
                self._device, update_summed, self._kind, store.weight, list(store.state.values()),
                self._sums[:frequent], lists.touched, self._origins, scalars, guard,
            )  # fmt: skip
