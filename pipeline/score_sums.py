"""Exact sums over groups of equal scores: what the metrics and curves are made of.

Sums of real numbers are taken in fixed point, as two integer limbs of 30 bits, so that they depend neither on the
order of the rows nor on how they are spread over ranks. Every result is added to an int64 array.

Shapes: G groups (see ``score_groups.Groups``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dlrm.device import Array, Device
from pipeline.score_groups import Groups

LIMB = 1073741824.0
"""Resolution of one limb: the first counts steps of 2^-30, the second what is left of a term in steps of 2^-60."""


def rank_statistic(groups: Groups, device: Device) -> int:
    """See ``add_rank_statistic``."""
    kernel = device.kernel(__name__, "add_rank_statistic") or add_rank_statistic
    doubled = device.zeros(1, np.int64)
    kernel(groups.rows_below, groups.positives_below, doubled)
    return int(device.to_host(doubled)[0])


def class_ends(groups: Groups, device: Device) -> tuple[float | None, float | None]:
    """The lowest score of a positive and the highest of a negative; ``None`` where a class is absent."""
    kernel = device.kernel(__name__, "find_class_ends") or find_class_ends
    found = device.empty(2, np.int64)
    kernel(groups.rows_below, groups.positives_below, found)
    lowest, highest = device.to_host(found).tolist()
    return (
        None if lowest < 0 else score_of(groups, lowest, device),
        None if highest < 0 else score_of(groups, highest, device),
    )


def score_of(groups: Groups, place: int, device: Device) -> float:
    """Score of one group."""
    return float(device.to_host(groups.scores[place : place + 1])[0])


def score_at(groups: Groups, position: int, device: Device) -> float:
    """Score of the row at ``position`` of the sorted rows."""
    wanted = device.xp.asarray(np.array([position], groups.rows_below.dtype))
    place = device.xp.searchsorted(groups.rows_below, wanted, side="right") - 1
    return score_of(groups, int(device.to_host(place)[0]), device)


def loss_sums(groups: Groups, shrink: float, device: Device) -> list[int]:
    """Both limbs of the losses times ``shrink``, and the rows on the right side; see ``add_losses``."""
    kernel = device.kernel(__name__, "add_losses") or add_losses
    sums = device.zeros(3, np.int64)
    kernel(groups.scores, groups.rows_below, groups.positives_below, shrink, sums)
    return _integers(device.to_host(sums))


def bin_sums(groups: Groups, rows_before: int, num_rows: int, num_bins: int, device: Device) -> list[int]:
    """Four integers of each bin, see ``add_bins``."""
    kernel = device.kernel(__name__, "add_bins") or add_bins
    bins = device.zeros((num_bins, 4), np.int64)
    kernel(groups.scores, groups.rows_below, groups.positives_below, rows_before, num_rows, bins)
    return _integers(device.to_host(bins))


def histogram_sums(groups: Groups, low: float, high: float, num_bins: int, device: Device) -> list[int]:
    """Positives of each bin, then negatives; see ``add_histogram``."""
    kernel = device.kernel(__name__, "add_histogram") or add_histogram
    bins = device.zeros((2, num_bins), np.int64)
    kernel(groups.scores, groups.rows_below, groups.positives_below, low, high, bins)
    return _integers(device.to_host(bins))


def precision_sums(groups: Groups, above: tuple[int, int], device: Device) -> list[int]:
    """Both limbs, see ``add_precision``; ``above``: positives and negatives with higher scores."""
    kernel = device.kernel(__name__, "add_precision") or add_precision
    limbs = device.zeros(2, np.int64)
    kernel(groups.rows_below, groups.positives_below, *above, limbs)
    return _integers(device.to_host(limbs))


def curve_points(
    groups: Groups, above: tuple[int, int], totals: tuple[int, int], steps: tuple[int, int], device: Device
) -> list[tuple[float, int, int]]:
    """(Score, true positives, false positives) of the points of a thinned curve, highest score first.

    Args:
        groups: of this rank.
        above: positives and negatives with higher scores on other ranks.
        totals: positives and negatives of all ranks, neither of them 0.
        steps: see ``pick_points``.
        device: holds the groups.
    """
    kernel = device.kernel(__name__, "pick_points") or pick_points
    points = device.zeros((sum(steps) + 1, 3), np.int64)
    count = device.zeros(1, np.int64)
    kernel(groups.rows_below, groups.positives_below, *above, *totals, *steps, points, count)
    picked = device.to_host(points)[: int(device.to_host(count)[0])]
    if not len(picked):
        return []
    picked = picked[np.argsort(-picked[:, 0])]
    scores = device.to_host(groups.scores[device.xp.asarray(picked[:, 0])]).astype(np.float64)
    return [(score, true, false) for score, (_, true, false) in zip(scores.tolist(), picked.tolist(), strict=True)]


def _integers(array: Any) -> list[int]:
    integers: list[int] = array.reshape(-1).tolist()
    return integers


def _counts(rows_below: Array, positives_below: Array) -> tuple[Array, Array]:
    """Positives and negatives of each group."""
    positives = np.diff(positives_below.astype(np.int64))
    return positives, np.diff(rows_below.astype(np.int64)) - positives


def _add_terms(terms: Array, counts: Array, limbs: Array) -> None:
    """Add ``counts * terms`` to two limbs."""
    scaled = terms * LIMB
    high = np.floor(scaled)
    limbs[0] += (counts * high.astype(np.int64)).sum()
    limbs[1] += (counts * np.floor((scaled - high) * LIMB).astype(np.int64)).sum()


def add_rank_statistic(rows_below: Array, positives_below: Array, doubled: Array) -> None:
    """Add twice the Mann-Whitney U of the groups: a positive above a negative counts 2, beside one 1.

    Args:
        rows_below: [G + 1].
        positives_below: [G + 1].
        doubled: [1] int64.
    """
    positives, negatives = _counts(rows_below, positives_below)
    negatives_below = (rows_below - positives_below)[:-1].astype(np.int64)
    doubled[0] += (positives * (2 * negatives_below + negatives)).sum()


def find_class_ends(rows_below: Array, positives_below: Array, found: Array) -> None:
    """Write the first group that holds a positive and the last one that holds a negative, -1 where none does.

    Args:
        rows_below: [G + 1].
        positives_below: [G + 1].
        found: [2] int64.
    """
    positives, negatives = _counts(rows_below, positives_below)
    found[0] = np.flatnonzero(positives)[0] if positives.any() else -1
    found[1] = np.flatnonzero(negatives)[-1] if negatives.any() else -1


def add_losses(scores: Array, rows_below: Array, positives_below: Array, shrink: float, sums: Array) -> None:
    """Add the losses -y ln p - (1 - y) ln(1 - p) of all rows.

    Args:
        scores: [G].
        rows_below: [G + 1].
        positives_below: [G + 1].
        shrink: factor that brings every loss below 1.
        sums: [3] int64: two limbs of ``shrink`` times the losses, and the rows with (z > 0) = y.
    """
    z = scores.astype(np.float64)
    positives, negatives = _counts(rows_below, positives_below)
    tail = np.log1p(np.exp(-np.abs(z)))
    _add_terms(np.where(positives > 0, (np.maximum(-z, 0.0) + tail) * shrink, 0.0), positives, sums)
    _add_terms(np.where(negatives > 0, (np.maximum(z, 0.0) + tail) * shrink, 0.0), negatives, sums)
    sums[2] += np.sum(np.where(z > 0.0, positives, negatives))


def add_bins(
    scores: Array, rows_below: Array, positives_below: Array, rows_before: int, num_rows: int, bins: Array
) -> None:
    """Fill bins of about equal count: a group goes whole into the bin of its middle row.

    Args:
        scores: [G].
        rows_below: [G + 1].
        positives_below: [G + 1].
        rows_before: rows of other ranks with lower scores.
        num_rows: rows of all ranks.
        bins: [bins, 4] int64: rows, positives, two limbs of the sum of the predictions sigmoid(z).
    """
    z = scores.astype(np.float64)
    positives, negatives = _counts(rows_below, positives_below)
    rows = positives + negatives
    middle = (rows_below[:-1].astype(np.int64) + rows_before) + 0.5 * rows
    places = np.minimum(len(bins) - 1, (len(bins) * (middle / num_rows)).astype(np.int64))
    small = np.exp(-np.abs(z))
    scaled = np.where(z >= 0.0, 1.0 / (1.0 + small), small / (1.0 + small)) * LIMB
    high = np.floor(scaled)
    low = np.floor((scaled - high) * LIMB)
    for column, values in enumerate((rows, positives, rows * high.astype(np.int64), rows * low.astype(np.int64))):
        np.add.at(bins[:, column], places, values)


def add_histogram(
    scores: Array, rows_below: Array, positives_below: Array, low: float, high: float, bins: Array
) -> None:
    """Count both classes in equal steps of the score; the end bins hold what lies beyond as well.

    Args:
        scores: [G].
        rows_below: [G + 1].
        positives_below: [G + 1].
        low: where the first bin begins.
        high: where the last one ends.
        bins: [2, bins] int64: positives, negatives.
    """
    num_bins = bins.shape[1]
    with np.errstate(over="ignore"):  # a score may be further off than float64 reaches
        shares = np.clip((scores.astype(np.float64) - low) / (high - low), 0.0, 1.0)
    places = np.minimum((shares * num_bins).astype(np.int64), num_bins - 1)
    positives, negatives = _counts(rows_below, positives_below)
    np.add.at(bins[0], places, positives)
    np.add.at(bins[1], places, negatives)


def add_precision(
    rows_below: Array, positives_below: Array, positives_above: int, negatives_above: int, limbs: Array
) -> None:
    """Add precision x positives of every group, where the precision counts all rows of its score or a higher one.

    Args:
        rows_below: [G + 1].
        positives_below: [G + 1].
        positives_above: of other ranks, with higher scores.
        negatives_above: likewise.
        limbs: [2] int64.
    """
    true, false = _reached(rows_below, positives_below, positives_above, negatives_above)
    positives, _ = _counts(rows_below, positives_below)
    _add_terms(true[:-1] / (true[:-1] + false[:-1]), positives, limbs)


def _reached(
    rows_below: Array, positives_below: Array, positives_above: int, negatives_above: int
) -> tuple[Array, Array]:
    """[G + 1] true and false positives at the score of each group, and above all of them."""
    true = positives_below[-1:].astype(np.int64) - positives_below + positives_above
    rows = rows_below[-1:].astype(np.int64) - rows_below + positives_above + negatives_above
    return true, rows - true


def pick_points(
    rows_below: Array,
    positives_below: Array,
    positives_above: int,
    negatives_above: int,
    num_positives: int,
    num_negatives: int,
    positive_steps: int,
    negative_steps: int,
    points: Array,
    count: Array,
) -> None:
    """Pick the groups at which the curve, from the highest score down, has gone another step.

    The way gone is ``positive_steps * true positive rate + negative_steps * false positive rate``.

    Args:
        rows_below: [G + 1].
        positives_below: [G + 1].
        positives_above: of other ranks, with higher scores.
        negatives_above: likewise.
        num_positives: of all ranks.
        num_negatives: of all ranks.
        positive_steps: steps along the positives.
        negative_steps: steps along the negatives.
        points: [positive_steps + negative_steps + 1, 3] int64: group, true positives, false positives, in any order.
        count: [1] int64, how many, added.
    """
    true, false = _reached(rows_below, positives_below, positives_above, negatives_above)
    gone = np.floor(positive_steps * (true / num_positives) + negative_steps * (false / num_negatives))
    picked = np.flatnonzero(gone[:-1] > gone[1:])
    start = int(count[0])
    for column, values in enumerate((picked, true[picked], false[picked])):
        points[start : start + len(picked), column] = values
    count[0] += len(picked)
