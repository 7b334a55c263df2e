"""Scores of all ranks sorted into ranges, one range per rank, with exact counts of both classes.

A sample sort: every rank sorts its own rows, a regular sample of all ranks' scores gives the borders of W
ranges, and rank r receives range r. What travels is (distinct score, positives, negatives), so that many
equal scores weigh no more than one, and a range holds at most about twice a rank's share. Equal scores are
always in one range, hence ties are exact. All results are integers, the same on any number of ranks.

Source: Shi and Schaeffer, "Parallel Sorting by Regular Sampling" (1992).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.errors import DataError
from embedding.comm import Comm
from pipeline import metrics_numba

# Samples per rank and range: the largest range is then within some percent of the mean.
_OVERSAMPLING = 64

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ranking:
    """This rank's range of the sorted scores, and where it lies among all.

    Attributes:
        scores: [G] distinct scores, ascending.
        positives: [G] int32 (int64 from 2^31 rows on) counts of label 1 at each score.
        negatives: [G] int32 (int64 from 2^31 rows on) counts of label 0 at each score.
        range_positives: positives of each rank's range, rank 0 with the lowest scores.
        range_negatives: negatives of each rank's range.
        rank: this rank.
    """

    scores: npt.NDArray[np.floating[Any]]
    positives: npt.NDArray[np.signedinteger[Any]]
    negatives: npt.NDArray[np.signedinteger[Any]]
    range_positives: tuple[int, ...]
    range_negatives: tuple[int, ...]
    rank: int

    @property
    def num_positives(self) -> int:
        """Positives of all ranks."""
        return sum(self.range_positives)

    @property
    def num_negatives(self) -> int:
        """Negatives of all ranks."""
        return sum(self.range_negatives)

    @property
    def num_rows(self) -> int:
        """Rows of all ranks."""
        return self.num_positives + self.num_negatives

    @property
    def rows_below(self) -> int:
        """Rows in the ranges below this rank's."""
        return sum(self.range_positives[: self.rank]) + sum(self.range_negatives[: self.rank])

    @property
    def above(self) -> tuple[int, int]:
        """Positives and negatives in the ranges above this rank's."""
        return sum(self.range_positives[self.rank + 1 :]), sum(self.range_negatives[self.rank + 1 :])


def gather_integers(comm: Comm, values: Sequence[int]) -> list[list[int]]:
    """Every rank's integers, as Python integers, so that sums over ranks cannot overflow (collective)."""
    send = np.asarray(values, dtype=np.int64)
    received = np.empty((comm.size, send.size), dtype=np.int64)
    comm.all_gather(send, received).wait()
    rows: list[list[int]] = received.tolist()
    return rows


def sum_integers(comm: Comm, values: IntArray) -> list[int]:
    """Elementwise sum over ranks as Python integers (collective)."""
    return [sum(column) for column in zip(*gather_integers(comm, values.ravel().tolist()), strict=True)]


def rank_scores(logits: npt.ArrayLike, labels: npt.ArrayLike, comm: Comm) -> Ranking:
    """Sort the scores of all ranks (collective).

    Args:
        logits: [n] float32 or float64; n differs between ranks and may be 0.
        labels: [n] of any number type, each 0 or 1.
        comm: the ranks that share the rows.

    Returns:
        This rank's range.

    Raises:
        DataError: on every rank, if any rank has a score that is NaN or infinite, a label other than 0
            and 1, or as many labels as it has no scores.
    """
    scores = np.ascontiguousarray(np.asarray(logits).reshape(-1))
    if scores.dtype != np.float32:
        scores = scores.astype(np.float64, copy=False)
    truth = np.ascontiguousarray(np.asarray(labels).reshape(-1))
    num_rows, wide = _check(scores, truth, comm)
    if wide:
        scores = scores.astype(np.float64, copy=False)
    # A count may reach the number of all rows once groups of several ranks are merged.
    count_type = np.int32 if num_rows < 2**31 else np.int64
    groups = _group(scores, truth, count_type)
    if comm.size > 1:
        groups = _exchange(groups, comm)
    sums = gather_integers(comm, [int(groups[1].sum(dtype=np.int64)), int(groups[2].sum(dtype=np.int64))])
    return Ranking(*groups, tuple(p for p, _ in sums), tuple(n for _, n in sums), comm.rank)


def _check(scores: npt.NDArray[Any], labels: npt.NDArray[Any], comm: Comm) -> tuple[int, bool]:
    """Agree on what is wrong, so that no rank waits for one that has raised; returns (rows, float64)."""
    same_size = scores.size == labels.size
    found = metrics_numba.check_rows(scores, labels) if same_size else (0, 0, 0)
    seen = gather_integers(comm, [scores.size, labels.size, *found[1:], scores.dtype == np.float64])
    for rank, (num_scores, num_labels, not_finite, bad_labels, _) in enumerate(seen):
        if num_scores != num_labels:
            raise DataError(
                f"metrics: {num_scores} scores but {num_labels} labels on rank {rank}; pass one of each per row"
            )
        if not_finite:
            raise DataError(
                f"metrics: {not_finite} of {num_scores} scores on rank {rank} are NaN or infinite; the model has "
                "diverged or its input is damaged: lower the learning rate or check the data"
            )
        if bad_labels:
            raise DataError(
                f"metrics: {bad_labels} of {num_labels} labels on rank {rank} are neither 0 nor 1; fix the data set"
            )
    return sum(row[0] for row in seen), any(row[4] for row in seen if row[0])


Groups = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


def _group(scores: npt.NDArray[Any], labels: npt.NDArray[Any], count_type: type[np.signedinteger[Any]]) -> Groups:
    """Sort one rank's rows into groups; sorting the classes apart needs no permutation."""
    is_positive = labels != 0
    positive_scores, negative_scores = scores[is_positive], scores[~is_positive]
    positive_scores.sort()
    negative_scores.sort()
    out = _empty_groups(scores.size, scores.dtype, count_type)
    return _trim(out, metrics_numba.group_scores(positive_scores, negative_scores, *out))


def _exchange(groups: Groups, comm: Comm) -> Groups:
    """Send every group to the rank of its range, and merge what arrives (collective)."""
    cuts = np.searchsorted(groups[0], _borders(groups[0], comm), side="left")
    send_counts = np.diff(np.concatenate(([0], cuts, [groups[0].size]))).astype(np.int64)
    recv_counts = np.empty(comm.size, dtype=np.int64)
    comm.all_to_all(send_counts, recv_counts).wait()
    received = tuple(np.empty(int(recv_counts.sum()), dtype=part.dtype) for part in groups)
    for part, target in zip(groups, received, strict=True):
        comm.all_to_all_v(part, send_counts.tolist(), target, recv_counts.tolist()).wait()
    ends = np.cumsum(recv_counts)
    runs: list[Groups] = [
        (received[0][end - count : end], received[1][end - count : end], received[2][end - count : end])
        for count, end in zip(recv_counts, ends, strict=True)
    ]
    while len(runs) > 1:  # a tournament: log2(W) passes over the rows
        pairs = [_merge(runs[i], runs[i + 1]) for i in range(0, len(runs) - 1, 2)]
        runs = pairs + runs[2 * len(pairs) :]
    return runs[0]


def _borders(scores: npt.NDArray[Any], comm: Comm) -> npt.NDArray[Any]:
    """W - 1 scores that part all ranks' distinct scores into about equal ranges (collective)."""
    num_samples = _OVERSAMPLING * comm.size
    # A rank's sample stands for as many groups as it has: ranks may hold very different numbers of rows.
    sample = np.full((2, num_samples), [[np.inf], [0.0]])
    if scores.size:
        sample[0] = scores[np.arange(num_samples) * scores.size // num_samples]
        sample[1] = scores.size / num_samples
    samples = np.empty((comm.size, 2, num_samples))
    comm.all_gather(sample, samples).wait()
    values, weights = samples[:, 0].ravel(), samples[:, 1].ravel()
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[order])
    targets = cumulative[-1] * np.arange(1, comm.size) / comm.size
    picked = np.minimum(np.searchsorted(cumulative, targets), values.size - 1)
    # float32 scores survive the way through float64 unchanged, so that every rank cuts alike.
    borders: npt.NDArray[Any] = values[order][picked].astype(scores.dtype)
    return borders


def _merge(a: Groups, b: Groups) -> Groups:
    out = _empty_groups(a[0].size + b[0].size, a[0].dtype, a[1].dtype.type)
    return _trim(out, metrics_numba.merge_groups(*a, *b, *out))


def _empty_groups(size: int, score_type: np.dtype[Any], count_type: type[Any]) -> Groups:
    return np.empty(size, score_type), np.empty(size, count_type), np.empty(size, count_type)


def _trim(groups: Groups, size: int) -> Groups:
    return groups[0][:size], groups[1][:size], groups[2][:size]
