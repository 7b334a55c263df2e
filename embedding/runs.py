"""Number the distinct rows of sorted lists, so that the gradients of a row can be summed before they travel.

Shapes: G groups of S sorted rows each, N tiles of a group, U_g most distinct rows of group g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlrm.device import Array, Device
from dlrm.scalars import SIZE, SPARSE, write_guard
from embedding.pair_lists import tiles_of
from embedding.row_sort import RowSort
from embedding.sparse_optim import widened


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitUpdate:
    """What makes an update by SGD an addition; arrays on the device.

    Attributes:
        scalars: see ``dlrm.scalars``; the rate is -1.
        guard: see ``dlrm.scalars``; nothing is in its way.
        zero: [1] int64, 0.
        mean: [1] bool, false.
        origins: [1, 5] int64.
        no_offsets: [0] int64.
        no_weights: [0] float32.
    """

    scalars: Array
    guard: Array
    zero: Array
    mean: Array
    origins: Array
    no_offsets: Array
    no_weights: Array

    @classmethod
    def create(cls, device: Device) -> UnitUpdate:
        """Put it on a device."""
        xp, scalars = device.xp, np.zeros(SIZE, np.float32)
        scalars[SPARSE] = -1.0
        return cls(
            scalars=xp.asarray(scalars),
            guard=xp.asarray(write_guard(np.empty(SIZE, np.float32), 1.0)),
            zero=xp.asarray(np.zeros(1, np.int64)),
            mean=xp.asarray(np.zeros(1, np.bool_)),
            origins=xp.asarray(np.zeros((1, 5), np.int64)),
            no_offsets=xp.asarray(np.empty(0, np.int64)),
            no_weights=xp.asarray(np.empty(0, np.float32)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """What the groups' rows come to; arrays on the device.

    Attributes:
        size: S.
        pad: row of padding, the highest number in a group.
        row_start: [G] int64, what is added to a group's rows; groups are ``pad + 1`` apart.
        slot_start: [G + 1] int32, first slot of each group; a group has U_g + 1 of them, the last for its padding.
        room: [G] int32, U_g.
        counts: [G, N] uint32: runs that begin in the tiles before this one.
        totals: [G] uint32: distinct rows, whatever the room.
        flag: [1] int32: set to 1 if a group has more than its room; nobody sets it to 0.
        slots: [G * S] uint32, slot of each sorted row.
        distinct: [sum (U_g + 1)] int32, the row of each slot; padded.
    """

    size: int
    pad: int
    row_start: Array
    slot_start: Array
    room: Array
    counts: Array
    totals: Array
    flag: Array
    slots: Array
    distinct: Array

    @classmethod
    def create(cls, device: Device, size: int, pad: int, room: Sequence[int], slots: Array, flag: Array) -> Runs:
        """Allocate all but ``slots`` and ``flag``."""
        xp, groups = device.xp, len(room)
        starts = np.cumsum([0, *(own + 1 for own in room)]).astype(np.int32)
        return cls(
            size=size,
            pad=pad,
            row_start=xp.asarray(np.arange(groups) * (pad + 1)),
            slot_start=xp.asarray(starts),
            room=xp.asarray(np.array(room, np.int32)),
            counts=device.zeros((groups, max(1, tiles_of(size))), np.uint32),
            totals=device.zeros(groups, np.uint32),
            flag=flag,
            slots=slots,
            distinct=xp.asarray(np.full(int(starts[-1]), pad, np.int32)),
        )


def number_runs(rows: Array, runs: Runs) -> None:
    """Number every group's distinct rows in ascending order.

    Args:
        rows: [G * S] uint32, ascending: ``row_start[g]`` + a row, or + ``pad``.
        runs: ``counts`` (undefined afterwards), ``totals``, ``flag``, ``slots`` and ``distinct`` are written.
    """
    for group, first in enumerate(runs.row_start.tolist()):
        own = rows[group * runs.size : (group + 1) * runs.size].astype(np.int64) - first
        begin, room = int(runs.slot_start[group]), int(runs.room[group])
        distinct = np.unique(own[own != runs.pad])
        runs.totals[group] = len(distinct)
        if len(distinct) > room:
            runs.flag[0] = 1
        slots = np.searchsorted(distinct, own)
        fits = (own != runs.pad) & (slots < room)
        runs.slots[group * runs.size : (group + 1) * runs.size] = begin + np.where(fits, slots, room)
        runs.distinct[begin : begin + room + 1] = runs.pad
        runs.distinct[begin : begin + min(room, len(distinct))] = distinct[:room]


def put_numbers(numbers: Array, places: Array, out: Array) -> None:
    """``out[places[i]] = numbers[i]``, such as slots of sorted rows where the rows were.

    Args:
        numbers: [n or more] uint32 or int32, below 2^31.
        places: [n] uint32; one that stands there more often gets any of its numbers.
        out: int32, written.
    """
    out[places] = numbers[: len(places)]


def sum_runs(gradients: Array, sort: RowSort, sums: Array, unit: UnitUpdate) -> None:  # noqa: ARG001
    """Sum gradients by slot, in the order of the list: ``sums[rows[i]] += gradients[named[i]]``.

    Args:
        gradients: [K, D] float32, float16 or bfloat16.
        sort: at ``order``, ``rows`` has K ascending slots and ``named`` the gradient of each.
        sums: [slots, D] float32, all 0 before.
        unit: what makes the compiled form's update an addition.
    """
    count = len(gradients)
    slots, named = (pair[sort.order][:count] for pair in (sort.rows, sort.named))
    np.add.at(sums, slots, widened(gradients)[named])
