"""Compiled passes over sorted scores; what they compute is said where ``pipeline.metrics`` calls them.

A *group* is one distinct score with the number of positives and of negatives that have it. Groups are
sorted by ascending score. Sums of real numbers are taken in fixed point, as two integer limbs of 30 bits,
so that they depend neither on the order of the rows nor on how they are spread over ranks.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

# Resolution of one limb. hi counts steps of 2^-30, lo what is left of a term in steps of 2^-60.
LIMB = 1073741824.0


@numba.njit(nogil=True, cache=True)
def check_rows(logits: Any, labels: Any) -> tuple[int, int, int]:
    """Count positives, scores that are not finite, and labels that are neither 0 nor 1."""
    positives = 0
    not_finite = 0
    bad_labels = 0
    for i in range(logits.size):
        if not math.isfinite(logits[i]):
            not_finite += 1
        label = labels[i]
        if label == 1:
            positives += 1
        elif label != 0:
            bad_labels += 1
    return positives, not_finite, bad_labels


@numba.njit(nogil=True, cache=True)
def group_scores(positive_scores: Any, negative_scores: Any, scores: Any, positives: Any, negatives: Any) -> int:
    """Merge two sorted runs of scores into groups; returns how many."""
    i = 0
    j = 0
    g = 0
    num_positives = positive_scores.size
    num_negatives = negative_scores.size
    while i < num_positives or j < num_negatives:
        if j >= num_negatives or (i < num_positives and positive_scores[i] < negative_scores[j]):
            score = positive_scores[i]
        else:
            score = negative_scores[j]
        first_i = i
        while i < num_positives and positive_scores[i] == score:
            i += 1
        first_j = j
        while j < num_negatives and negative_scores[j] == score:
            j += 1
        scores[g] = score
        positives[g] = i - first_i
        negatives[g] = j - first_j
        g += 1
    return g


@numba.njit(nogil=True, cache=True)
def merge_groups(
    scores_a: Any,
    positives_a: Any,
    negatives_a: Any,
    scores_b: Any,
    positives_b: Any,
    negatives_b: Any,
    scores: Any,
    positives: Any,
    negatives: Any,
) -> int:
    """Merge two sorted lists of groups, adding the counts of equal scores; returns how many."""
    i = 0
    j = 0
    g = 0
    while i < scores_a.size or j < scores_b.size:
        take_a = j >= scores_b.size or (i < scores_a.size and scores_a[i] <= scores_b[j])
        take_b = i >= scores_a.size or (j < scores_b.size and scores_b[j] <= scores_a[i])
        if take_a and take_b:
            scores[g] = scores_a[i]
            positives[g] = positives_a[i] + positives_b[j]
            negatives[g] = negatives_a[i] + negatives_b[j]
            i += 1
            j += 1
        elif take_a:
            scores[g] = scores_a[i]
            positives[g] = positives_a[i]
            negatives[g] = negatives_a[i]
            i += 1
        else:
            scores[g] = scores_b[j]
            positives[g] = positives_b[j]
            negatives[g] = negatives_b[j]
            j += 1
        g += 1
    return g


@numba.njit(nogil=True, cache=True)
def rank_statistic(positives: Any, negatives: Any) -> int:
    """Twice the Mann-Whitney U of these groups: a positive above a negative counts 2, beside one 1."""
    below = 0
    doubled = 0
    for g in range(positives.size):
        num_negatives = int(negatives[g])
        doubled += int(positives[g]) * (2 * below + num_negatives)
        below += num_negatives
    return doubled


@numba.njit(nogil=True, cache=True)
def group_at(positives: Any, negatives: Any, position: int) -> int:
    """Index of the group that holds the row at ``position`` of the sorted rows."""
    seen = 0
    for g in range(positives.size):
        seen += int(positives[g]) + int(negatives[g])
        if seen > position:
            return g
    return int(positives.size) - 1


@numba.njit(nogil=True, cache=True)
def sum_losses(scores: Any, positives: Any, negatives: Any, shrink: float, limbs: Any) -> int:
    """Add the losses, times ``shrink``, to ``limbs[0..1]``; returns the rows on the right side of 0.5."""
    correct = 0
    for g in range(scores.size):
        z = np.float64(scores[g])
        num_positives = int(positives[g])
        num_negatives = int(negatives[g])
        tail = math.log1p(math.exp(-abs(z)))
        if num_positives:
            term = (max(-z, 0.0) + tail) * shrink * LIMB
            high = math.floor(term)
            limbs[0] += num_positives * high
            limbs[1] += num_positives * math.floor((term - high) * LIMB)
        if num_negatives:
            term = (max(z, 0.0) + tail) * shrink * LIMB
            high = math.floor(term)
            limbs[0] += num_negatives * high
            limbs[1] += num_negatives * math.floor((term - high) * LIMB)
        correct += int(num_positives if z > 0.0 else num_negatives)
    return correct


@numba.njit(nogil=True, cache=True)
def sum_bins(scores: Any, positives: Any, negatives: Any, rows_below: int, num_rows: int, bins: Any) -> None:
    """Spread the rows over equal-count bins.

    ``bins[k]`` gets (rows, positives, limbs of the sum of predictions). A group goes whole into the bin of
    its middle row: equal scores are never parted.
    """
    num_bins = bins.shape[0]
    below = rows_below
    for g in range(scores.size):
        z = np.float64(scores[g])
        num_positives = int(positives[g])
        rows = num_positives + int(negatives[g])
        k = min(num_bins - 1, int(num_bins * ((below + 0.5 * rows) / num_rows)))
        below += rows
        small = math.exp(-abs(z))
        term = (1.0 / (1.0 + small) if z >= 0.0 else small / (1.0 + small)) * LIMB
        high = math.floor(term)
        bins[k, 0] += rows
        bins[k, 1] += num_positives
        bins[k, 2] += rows * high
        bins[k, 3] += rows * math.floor((term - high) * LIMB)


@numba.njit(nogil=True, cache=True)
def sum_histogram(scores: Any, positives: Any, negatives: Any, low: float, high: float, bins: Any) -> None:
    """Count positives (``bins[0]``) and negatives (``bins[1]``) in equal steps of the score.

    The end bins hold what lies beyond ``low`` and ``high`` as well.
    """
    num_bins = bins.shape[1]
    for g in range(scores.size):
        k = int(min(max((np.float64(scores[g]) - low) / (high - low), 0.0), 1.0) * num_bins)
        k = min(k, num_bins - 1)
        bins[0, k] += int(positives[g])
        bins[1, k] += int(negatives[g])


@numba.njit(nogil=True, cache=True)
def sum_precision(positives: Any, negatives: Any, positives_above: int, negatives_above: int, limbs: Any) -> None:
    """Add precision x positives, from the highest score down, to ``limbs``."""
    true_positives = positives_above
    false_positives = negatives_above
    for g in range(positives.size - 1, -1, -1):
        here = int(positives[g])
        true_positives += here
        false_positives += int(negatives[g])
        if here:
            term = true_positives / (true_positives + false_positives) * LIMB
            high = math.floor(term)
            limbs[0] += here * high
            limbs[1] += here * math.floor((term - high) * LIMB)


@numba.njit(nogil=True, cache=True)
def thin_curve(
    positives: Any,
    negatives: Any,
    above: tuple[int, int],
    totals: tuple[int, int],
    steps: tuple[int, int],
    groups: Any,
    counts: Any,
) -> int:
    """Pick the groups, from the highest score down, at which the curve has gone another step.

    Pairs are (of positives, of negatives). The way gone is ``steps[0] * true positive rate + steps[1] *
    false positive rate``. Each picked group gives its index and the true and false positives at its score;
    returns how many.
    """
    true_positives, false_positives = above
    num_positives, num_negatives = totals
    reached = math.floor(steps[0] * (true_positives / num_positives) + steps[1] * (false_positives / num_negatives))
    num_points = 0
    for g in range(positives.size - 1, -1, -1):
        true_positives += int(positives[g])
        false_positives += int(negatives[g])
        now = math.floor(steps[0] * (true_positives / num_positives) + steps[1] * (false_positives / num_negatives))
        if now > reached:
            reached = now
            groups[num_points] = g
            counts[num_points, 0] = true_positives
            counts[num_points, 1] = false_positives
            num_points += 1
    return num_points
