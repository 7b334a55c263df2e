"""Compiled sums over groups of equal scores; references in ``score_sums.py``."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from pipeline.score_sums import LIMB


@numba.njit(nogil=True, cache=True)
def add_rank_statistic(rows_below: Any, positives_below: Any, doubled: Any) -> None:
    """See ``score_sums.add_rank_statistic``."""
    total = 0
    for g in range(rows_below.size - 1):
        below = int(positives_below[g])
        positives = int(positives_below[g + 1]) - below
        # Negatives below, twice, and those of the group: those below it and those below the next one.
        total += positives * (int(rows_below[g]) - below + int(rows_below[g + 1]) - below - positives)
    doubled[0] += total


@numba.njit(nogil=True, cache=True)
def find_class_ends(rows_below: Any, positives_below: Any, found: Any) -> None:
    """See ``score_sums.find_class_ends``."""
    found[0] = found[1] = -1
    for g in range(rows_below.size - 1):
        if positives_below[g + 1] > positives_below[g]:
            found[0] = g
            break
    for g in range(rows_below.size - 2, -1, -1):
        if rows_below[g + 1] - rows_below[g] > positives_below[g + 1] - positives_below[g]:
            found[1] = g
            break


@numba.njit(nogil=True, cache=True)
def add_losses(scores: Any, rows_below: Any, positives_below: Any, shrink: float, sums: Any) -> None:
    """See ``score_sums.add_losses``."""
    for g in range(scores.size):
        z = np.float64(scores[g])
        num_positives = int(positives_below[g + 1]) - int(positives_below[g])
        num_negatives = int(rows_below[g + 1]) - int(rows_below[g]) - num_positives
        tail = math.log1p(math.exp(-abs(z)))
        if num_positives:
            term = (max(-z, 0.0) + tail) * shrink * LIMB
            high = math.floor(term)
            sums[0] += num_positives * high
            sums[1] += num_positives * math.floor((term - high) * LIMB)
        if num_negatives:
            term = (max(z, 0.0) + tail) * shrink * LIMB
            high = math.floor(term)
            sums[0] += num_negatives * high
            sums[1] += num_negatives * math.floor((term - high) * LIMB)
        sums[2] += num_positives if z > 0.0 else num_negatives


@numba.njit(nogil=True, cache=True)
def add_bins(scores: Any, rows_below: Any, positives_below: Any, rows_before: int, num_rows: int, bins: Any) -> None:
    """See ``score_sums.add_bins``."""
    num_bins = bins.shape[0]
    for g in range(scores.size):
        z = np.float64(scores[g])
        rows = int(rows_below[g + 1]) - int(rows_below[g])
        k = min(num_bins - 1, int(num_bins * ((int(rows_below[g]) + rows_before + 0.5 * rows) / num_rows)))
        small = math.exp(-abs(z))
        term = (1.0 / (1.0 + small) if z >= 0.0 else small / (1.0 + small)) * LIMB
        high = math.floor(term)
        bins[k, 0] += rows
        bins[k, 1] += int(positives_below[g + 1]) - int(positives_below[g])
        bins[k, 2] += rows * high
        bins[k, 3] += rows * math.floor((term - high) * LIMB)


@numba.njit(nogil=True, cache=True)
def add_histogram(scores: Any, rows_below: Any, positives_below: Any, low: float, high: float, bins: Any) -> None:
    """See ``score_sums.add_histogram``."""
    num_bins = bins.shape[1]
    for g in range(scores.size):
        k = int(min(max((np.float64(scores[g]) - low) / (high - low), 0.0), 1.0) * num_bins)
        k = min(k, num_bins - 1)
        num_positives = int(positives_below[g + 1]) - int(positives_below[g])
        bins[0, k] += num_positives
        bins[1, k] += int(rows_below[g + 1]) - int(rows_below[g]) - num_positives


@numba.njit(nogil=True, cache=True)
def add_precision(
    rows_below: Any, positives_below: Any, positives_above: int, negatives_above: int, limbs: Any
) -> None:
    """See ``score_sums.add_precision``."""
    all_positives = int(positives_below[-1]) + positives_above
    all_rows = int(rows_below[-1]) + positives_above + negatives_above
    for g in range(rows_below.size - 1):
        here = int(positives_below[g + 1]) - int(positives_below[g])
        if here:
            term = (all_positives - int(positives_below[g])) / (all_rows - int(rows_below[g])) * LIMB
            high = math.floor(term)
            limbs[0] += here * high
            limbs[1] += here * math.floor((term - high) * LIMB)


@numba.njit(nogil=True, cache=True)
def pick_points(
    rows_below: Any,
    positives_below: Any,
    positives_above: int,
    negatives_above: int,
    num_positives: int,
    num_negatives: int,
    positive_steps: int,
    negative_steps: int,
    points: Any,
    count: Any,
) -> None:
    """See ``score_sums.pick_points``."""
    all_positives = int(positives_below[-1]) + positives_above
    all_rows = int(rows_below[-1]) + positives_above + negatives_above
    reached = -1
    for g in range(rows_below.size - 1, -1, -1):
        true = all_positives - int(positives_below[g])
        false = all_rows - int(rows_below[g]) - true
        gone = math.floor(positive_steps * (true / num_positives) + negative_steps * (false / num_negatives))
        if reached >= 0 and gone > reached:
            points[count[0], 0] = g
            points[count[0], 1] = true
            points[count[0], 2] = false
            count[0] += 1
        reached = gone
