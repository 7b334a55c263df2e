"""Rows sorted by score and joined into groups of equal scores, with exact counts of both classes.

Shapes: n rows, G groups (distinct scores), R groups of several ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.device import Array, Device
from embedding.row_sort import TILE, digits_of

KEY_DIGITS, KEY_BITS = digits_of(2**32)
"""Digits of a float32 score's sort key on a GPU, and the bits of a digit."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Distinct scores in ascending order, and what lies below each.

    The counts are int32, or int64 where they may reach 2^31.

    Attributes:
        scores: [G] float32 or float64.
        rows_below: [G + 1], rows with a lower score; the last one is the number of all rows.
        positives_below: [G + 1], those of them with label 1.
    """

    scores: Array
    rows_below: Array
    positives_below: Array

    def __len__(self) -> int:
        """G."""
        return len(self.scores)


@dataclass(frozen=True, slots=True)
class Room:
    """What a GPU needs to sort n rows; on the host it is never touched, and so takes no memory.

    Attributes:
        keys: [n] uint32, scores as integers of the same order.
        named: [n] uint32, the label of a row, or the number of a group.
        counts: [tiles * 2^bits] uint32.
        totals: [2^bits] uint32.
        info: [4] uint32, see ``embedding.row_sort.RowSort``.
    """

    keys: Array
    named: Array
    counts: Array
    totals: Array
    info: Array

    @classmethod
    def create(cls, device: Device, size: int) -> Room:
        """Allocate for n = ``size``."""
        tiles = -(-size // TILE)
        sizes = (size, size, tiles << KEY_BITS, 1 << KEY_BITS, 4)
        return cls(*(device.empty(count, np.uint32) for count in sizes))


def count_bad_rows(scores: Array, labels: Array, device: Device) -> tuple[int, int]:
    """How many scores are NaN or infinite, and how many labels are neither 0 nor 1."""
    kernel = device.kernel(__name__, "check_rows") or check_rows
    found = device.zeros(2, np.int64)
    kernel(scores, labels, found)
    not_finite, bad_labels = device.to_host(found).tolist()
    return not_finite, bad_labels


def groups_of_rows(scores: Array, labels: Array, count_type: Any, device: Device) -> Groups:
    """Sort one rank's rows.

    Args:
        scores: [n] finite float32, or float64 on the host; neither of them is changed.
        labels: [n], each 0 or 1.
        count_type: int32 or int64; on a GPU int32, and n < 2^31.
        device: holds the arrays.
    """
    kernel = device.kernel(__name__, "group_rows") or group_rows
    return _grouped(kernel, (scores, labels), len(scores), scores.dtype, count_type, device)


def groups_of_runs(scores: Array, rows: Array, positives: Array, counts: Sequence[int], device: Device) -> Groups:
    """Join sorted groups of several ranks.

    Args:
        scores: [R], a run of each rank one behind the other, each ascending without repetition.
        rows: [R], rows of each group.
        positives: [R], those of them with label 1.
        counts: groups of each run, R together.
        device: holds the arrays.
    """
    kernel = device.kernel(__name__, "merge_groups") or merge_groups
    return _grouped(kernel, (scores, rows, positives, counts), len(scores), scores.dtype, rows.dtype, device)


def _grouped(
    kernel: Any, inputs: tuple[Any, ...], size: int, score_type: Any, count_type: Any, device: Device
) -> Groups:
    if size == 0:
        nothing = device.zeros(1, count_type)
        return Groups(device.empty(0, score_type), nothing, nothing)
    scores = device.empty(size, score_type)
    rows_below, positives_below = device.empty(size + 1, count_type), device.empty(size + 1, count_type)
    count = device.empty(1, np.int64)
    kernel(*inputs, scores, rows_below, positives_below, count, Room.create(device, size))
    found = int(device.to_host(count)[0])
    return Groups(scores[:found], rows_below[: found + 1], positives_below[: found + 1])


def check_rows(scores: Array, labels: Array, found: Array) -> None:
    """Count scores that are not finite (``found[0]``) and labels that are neither 0 nor 1 (``found[1]``)."""
    found[0] += len(scores) - np.count_nonzero(np.isfinite(scores))
    found[1] += len(labels) - np.count_nonzero((labels == 0) | (labels == 1))


def group_rows(
    scores: Array,
    labels: Array,
    out_scores: Array,
    rows_below: Array,
    positives_below: Array,
    count: Array,
    room: Room,  # noqa: ARG001 for the kernel
) -> None:
    """Sort rows and join those of equal score; -0 equals 0.

    Args:
        scores: [n], finite; n > 0.
        labels: [n], each 0 or 1.
        out_scores: [n], ``Groups.scores`` in its first G places.
        rows_below: [n + 1], likewise.
        positives_below: [n + 1], likewise.
        count: [1] int64, G.
        room: to work in.
    """
    order = np.argsort(scores, kind="stable")
    _join(scores[order], np.ones_like(order), labels[order] != 0, out_scores, rows_below, positives_below, count)


def merge_groups(
    scores: Array,
    rows: Array,
    positives: Array,
    run_counts: Sequence[int],  # noqa: ARG001 for the kernel
    out_scores: Array,
    rows_below: Array,
    positives_below: Array,
    count: Array,
    room: Room,  # noqa: ARG001 for the kernel
) -> None:
    """Join the groups of several ranks, adding the counts of equal scores.

    Args:
        scores: [R], runs one behind the other; R > 0.
        rows: [R], rows of each group.
        positives: [R], those of them with label 1.
        run_counts: groups of each run.
        out_scores: [R], ``Groups.scores`` in its first G places.
        rows_below: [R + 1], likewise.
        positives_below: [R + 1], likewise.
        count: [1] int64, G.
        room: to work in.
    """
    order = np.argsort(scores, kind="stable")
    _join(scores[order], rows[order], positives[order], out_scores, rows_below, positives_below, count)


def _join(
    ordered: Array,
    rows: Array,
    positives: Array,
    scores: Array,
    rows_below: Array,
    positives_below: Array,
    count: Array,
) -> None:
    heads = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    found = len(heads)
    count[0] = found
    scores[:found] = ordered[heads]
    for values, below in ((rows, rows_below), (positives, positives_below)):
        sums = np.cumsum(values, dtype=below.dtype)
        below[0] = 0
        below[1:found] = sums[heads[1:] - 1]
        below[found] = sums[-1]
