"""Scores of all ranks sorted into ranges, one range per rank, with exact counts of both classes.

A sample sort: every rank sorts its own rows, a regular sample of all ranks' scores gives the borders of W
ranges, and rank r receives range r. What travels is (distinct score, rows, positives), so that many
equal scores weigh no more than one, and a range holds at most about twice a rank's share. Equal scores are
always in one range, hence ties are exact. All results are integers, the same on any number of ranks.

On a GPU rows, groups and ranges stay there; the host sees a sample and counts.

Source: Shi and Schaeffer, "Parallel Sorting by Regular Sampling" (1992).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.device import Array, Device, HostDevice
from dlrm.errors import DataError
from embedding.comm import Comm
from embedding.comm_staged import StagedComm
from pipeline.score_groups import Groups, count_bad_rows, groups_of_rows, groups_of_runs

HOST = HostDevice()

# Samples per rank and range: the largest range is then within some percent of the mean.
_OVERSAMPLING = 64
_MOST_INT32_ROWS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Ranking:
    """This rank's range of the sorted scores, and where it lies among all.

    Attributes:
        groups: of the range.
        range_rows: rows of each rank's range, rank 0 with the lowest scores.
        range_positives: positives of each rank's range.
        rank: this rank.
        device: holds the groups.
    """

    groups: Groups
    range_rows: tuple[int, ...]
    range_positives: tuple[int, ...]
    rank: int
    device: Device

    @property
    def num_positives(self) -> int:
        """Positives of all ranks."""
        return sum(self.range_positives)

    @property
    def num_negatives(self) -> int:
        """Negatives of all ranks."""
        return self.num_rows - self.num_positives

    @property
    def num_rows(self) -> int:
        """Rows of all ranks."""
        return sum(self.range_rows)

    @property
    def rows_below(self) -> int:
        """Rows in the ranges below this rank's."""
        return sum(self.range_rows[: self.rank])

    @property
    def above(self) -> tuple[int, int]:
        """Positives and negatives in the ranges above this rank's."""
        positives = sum(self.range_positives[self.rank + 1 :])
        return positives, sum(self.range_rows[self.rank + 1 :]) - positives


def gather_integers(comm: Comm, values: Sequence[int]) -> list[list[int]]:
    """Every rank's integers, as Python integers, so that sums over ranks cannot overflow (collective)."""
    send = np.asarray(values, dtype=np.int64)
    received = np.empty((comm.size, send.size), dtype=np.int64)
    comm.all_gather(send, received).wait()
    rows: list[list[int]] = received.tolist()
    return rows


def sum_integers(comm: Comm, values: Sequence[int]) -> list[int]:
    """Elementwise sum over ranks as Python integers (collective)."""
    return [sum(column) for column in zip(*gather_integers(comm, values), strict=True)]


def rank_scores(
    logits: Array, labels: Array, comm: Comm, device: Device = HOST, carrier: Comm | None = None
) -> Ranking:
    """Sort the scores of all ranks (collective).

    Args:
        logits: [n] float32 or float64; n differs between ranks and may be 0.
        labels: [n] of any number type, each 0 or 1.
        comm: the ranks that share the rows; carries numbers of the host.
        device: holds the rows. A GPU ranks float32 scores, up to 2^31 rows of all ranks; anything else goes to its
            host.
        carrier: the same ranks, for arrays of the device; ``None``: a GPU's travel over ``comm`` through pinned memory.

    Returns:
        This rank's range.

    Raises:
        DataError: on every rank, if any rank has a score that is NaN or infinite, a label other than 0
            and 1, or as many labels as it has no scores.
    """
    xp = device.xp
    scores = xp.ascontiguousarray(xp.asarray(logits).reshape(-1))
    if scores.dtype != np.float32:
        scores = scores.astype(np.float64, copy=False)
    truth = xp.ascontiguousarray(xp.asarray(labels).reshape(-1))
    num_rows, wide = _check(scores, truth, comm, device)
    if wide or num_rows > _MOST_INT32_ROWS:
        scores, truth, device = device.to_host(scores), device.to_host(truth), device.host
        scores = scores.astype(np.float64 if wide else np.float32, copy=False)
    # A count may reach the number of all rows once groups of several ranks are merged.
    groups = groups_of_rows(scores, truth, np.int32 if num_rows <= _MOST_INT32_ROWS else np.int64, device)
    if comm.size > 1:
        groups = _exchange(groups, comm, device, carrier)
    mine = [int(device.to_host(below[-1:])[0]) for below in (groups.rows_below, groups.positives_below)]
    sums = gather_integers(comm, mine)
    return Ranking(groups, tuple(rows for rows, _ in sums), tuple(ones for _, ones in sums), comm.rank, device)


def _check(scores: Array, labels: Array, comm: Comm, device: Device) -> tuple[int, bool]:
    """Agree on what is wrong, so that no rank waits for one that has raised; returns (rows, float64)."""
    found = count_bad_rows(scores, labels, device) if scores.size == labels.size else (0, 0)
    seen = gather_integers(comm, [scores.size, labels.size, *found, scores.dtype == np.float64])
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


def _exchange(groups: Groups, comm: Comm, device: Device, carrier: Comm | None) -> Groups:
    """Send every group to the rank of its range, and merge what arrives (collective)."""
    xp = device.xp
    borders = _borders(groups.scores, comm, device)
    cuts = np.zeros(len(borders), np.int64)
    if len(groups):
        cuts = device.to_host(xp.searchsorted(groups.scores, xp.asarray(borders), side="left"))
    send_counts = np.diff(np.concatenate(([0], cuts, [len(groups)]))).astype(np.int64)
    recv_counts = np.empty(comm.size, dtype=np.int64)
    comm.all_to_all(send_counts, recv_counts).wait()
    counts = (send_counts.tolist(), recv_counts.tolist())
    if carrier is None or device.host is device:
        carrier = comm if device.host is device else StagedComm(comm, device)
    received = []
    for part in (groups.scores, xp.diff(groups.rows_below), xp.diff(groups.positives_below)):
        received.append(device.empty(int(recv_counts.sum()), part.dtype))
        carrier.all_to_all_v(part, counts[0], received[-1], counts[1]).wait()
    scores, rows, positives = received
    return groups_of_runs(scores, rows, positives, counts[1], device)


def _borders(scores: Array, comm: Comm, device: Device) -> npt.NDArray[Any]:
    """W - 1 scores that part all ranks' distinct scores into about equal ranges (collective)."""
    num_samples = _OVERSAMPLING * comm.size
    # A rank's sample stands for as many groups as it has: ranks may hold very different numbers of rows.
    sample = np.full((2, num_samples), [[np.inf], [0.0]])
    if scores.size:
        places = np.arange(num_samples) * scores.size // num_samples
        sample[0] = device.to_host(scores[device.xp.asarray(places)])
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
