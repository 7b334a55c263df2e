"""The replicated rows that a batch looks up, side by side: their gradients are all that ranks have to sum.

Every rank has all ranks' keys and so the same list, without a message; it has a fixed length, and whether it ran over
all ranks know alike.

Shapes: H replicated rows, R places of the list, N tiles of the rows, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlrm.device import Array, Device
from embedding.column_groups import uncut
from embedding.pair_lists import NOWHERE, tiles_of
from embedding.placement import Plan


@dataclass(frozen=True, slots=True)
class TouchedRows:
    """One batch's list; arrays on the device.

    Attributes:
        rows: [R] int32, replicated rows in ascending order; -1 behind the last one.
        counts: [N] uint32, touched rows in the tiles before this one.
        total: [1] uint32, touched rows, whatever the room.
        room: [1] int32, R.
        gradients: [R, D] float32, room for their gradients.
    """

    rows: Array
    counts: Array
    total: Array
    room: Array
    gradients: Array

    @classmethod
    def create(cls, device: Device, frequent: int, gradients: Array) -> TouchedRows:
        """Allocate for as many of ``frequent`` rows as there is room for ``gradients``."""
        room = len(gradients)
        return cls(
            device.zeros(room, np.int32),
            device.zeros(max(1, tiles_of(frequent)), np.uint32),
            device.zeros(1, np.uint32),
            device.xp.asarray(np.array([room], np.int32)),
            gradients,
        )


def list_touched(touched: Array, rows: TouchedRows, flag: Array) -> None:
    """List the touched rows; what there is no room for is left out.

    Args:
        touched: [H] uint8, 1 for the rows that the global batch looks up.
        rows: written.
        flag: [1] int32, set to 1 if there are more than R; nobody sets it to 0.
    """
    found = np.flatnonzero(touched)
    room = len(rows.rows)
    rows.total[0] = len(found)
    rows.rows.fill(NOWHERE)
    rows.rows[: min(room, len(found))] = found[:room]
    if len(found) > room:
        flag[0] = 1


def most_touched(plan: Plan, keys: Sequence[Array], sigmas: float) -> int:
    """How many replicated rows a batch may touch.

    Args:
        plan: placements of all tables.
        keys: of each table, those of a whole batch.
        sigmas: standard deviations above what these keys show; a count of distinct rows varies no more than its root.
    """
    found = 0
    for own, placed in zip(keys, plan.placements, strict=True):
        placement = uncut(placed)
        if placement is not None and placement.threshold:
            rows = np.unique(np.asarray(own, np.int64))
            found += int(((rows >= 0) & (rows < placement.threshold)).sum())
    return max(0, int(np.ceil(found + sigmas * np.sqrt(found))))
