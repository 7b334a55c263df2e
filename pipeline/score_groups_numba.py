"""Compiled sorting of rows into groups; references in ``score_groups.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np

from pipeline.score_groups import Room


@numba.njit(nogil=True, cache=True)
def check_rows(scores: Any, labels: Any, found: Any) -> None:
    """See ``score_groups.check_rows``."""
    not_finite = 0
    bad_labels = 0
    for i in range(scores.size):
        if not math.isfinite(scores[i]):
            not_finite += 1
    for i in range(labels.size):
        if labels[i] != 1 and labels[i] != 0:
            bad_labels += 1
    found[0] += not_finite
    found[1] += bad_labels


def group_rows(
    scores: Any,
    labels: Any,
    out_scores: Any,
    rows_below: Any,
    positives_below: Any,
    count: Any,
    room: Room,  # noqa: ARG001 the GPU's
) -> None:
    """See ``score_groups.group_rows``; sorting the classes apart needs no permutation."""
    is_positive = labels != 0
    positive_scores, negative_scores = scores[is_positive], scores[~is_positive]
    positive_scores.sort()
    negative_scores.sort()
    count[0] = _join_classes(positive_scores, negative_scores, out_scores, rows_below, positives_below)


@numba.njit(nogil=True, cache=True)
def _join_classes(
    positive_scores: Any, negative_scores: Any, scores: Any, rows_below: Any, positives_below: Any
) -> int:
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
        scores[g] = score
        rows_below[g] = i + j
        positives_below[g] = i
        while i < num_positives and positive_scores[i] == score:
            i += 1
        while j < num_negatives and negative_scores[j] == score:
            j += 1
        g += 1
    rows_below[g] = i + j
    positives_below[g] = i
    return g


def merge_groups(
    scores: Any,
    rows: Any,
    positives: Any,
    run_counts: Sequence[int],
    out_scores: Any,
    rows_below: Any,
    positives_below: Any,
    count: Any,
    room: Room,  # noqa: ARG001 the GPU's
) -> None:
    """See ``score_groups.merge_groups``: a tournament, log2(W) passes over the groups of W runs."""
    ends = np.cumsum(np.asarray(run_counts, np.int64))
    runs = [
        (scores[end - length : end], _sums(rows[end - length : end]), _sums(positives[end - length : end]))
        for length, end in zip(run_counts, ends.tolist(), strict=True)
    ]
    while len(runs) > 1:
        pairs = [_merged(runs[i], runs[i + 1]) for i in range(0, len(runs) - 1, 2)]
        runs = pairs + runs[2 * len(pairs) :]
    found = len(runs[0][0])
    count[0] = found
    out_scores[:found] = runs[0][0]
    rows_below[: found + 1] = runs[0][1]
    positives_below[: found + 1] = runs[0][2]


_Run = tuple[Any, Any, Any]


def _sums(counts: Any) -> Any:
    sums = np.zeros(counts.size + 1, counts.dtype)
    np.cumsum(counts, out=sums[1:])
    return sums


def _merged(a: _Run, b: _Run) -> _Run:
    size = a[0].size + b[0].size
    scores = np.empty(size, a[0].dtype)
    rows_below, positives_below = np.empty(size + 1, a[1].dtype), np.empty(size + 1, a[1].dtype)
    found = _merge_two(*a, *b, scores, rows_below, positives_below)
    return scores[:found], rows_below[: found + 1], positives_below[: found + 1]


@numba.njit(nogil=True, cache=True)
def _merge_two(
    scores_a: Any,
    rows_a: Any,
    positives_a: Any,
    scores_b: Any,
    rows_b: Any,
    positives_b: Any,
    scores: Any,
    rows_below: Any,
    positives_below: Any,
) -> int:
    i = 0
    j = 0
    g = 0
    while i < scores_a.size or j < scores_b.size:
        rows_below[g] = rows_a[i] + rows_b[j]
        positives_below[g] = positives_a[i] + positives_b[j]
        take_a = j >= scores_b.size or (i < scores_a.size and scores_a[i] <= scores_b[j])
        take_b = i >= scores_a.size or (j < scores_b.size and scores_b[j] <= scores_a[i])
        scores[g] = scores_a[i] if take_a else scores_b[j]
        if take_a:
            i += 1
        if take_b:
            j += 1
        g += 1
    rows_below[g] = rows_a[i] + rows_b[j]
    positives_below[g] = positives_a[i] + positives_b[j]
    return g
