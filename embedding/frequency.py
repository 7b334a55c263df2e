"""How often rows are looked up: counted from keys, or supposed, and kept small whatever the table's size.

Shapes: R rows of a table, K keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import ConfigError
from embedding.jagged import Jagged

Counts = NDArray[np.int32] | NDArray[np.int64]
Floats = NDArray[np.float64]

_SINGLE_EDGES = 64
"""So many first rows are bins of their own; after them a bin is 1/16 of an octave."""
_PLUG_IN_FROM = 1000
"""From so many times more counted look-ups than draws, drawing with and without replacement are the same."""


class RowCounts:
    """Counts look-ups by row over some batches; arrays reach to the last row seen.

    Attributes:
        samples: rows of data counted.
        counts: by table, [last row seen + 1 or more] int32.
        lookups: keys counted, by table.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        """Start at 0 for tables of ``rows`` rows."""
        self._rows = list(rows)
        self.samples = 0
        self.counts: list[NDArray[np.int32]] = [np.zeros(min(1024, size), np.int32) for size in self._rows]
        self.lookups = [0] * len(self._rows)

    def add(self, keys: Jagged, each: Callable[..., Iterable[None]] = map) -> None:
        """Count one batch's keys; they have been checked against the tables.

        Args:
            keys: of all tables.
            each: calls a function for every table, also in several threads.
        """
        self.samples += keys.num_rows
        for _ in each(partial(self._add, keys), range(len(self._rows))):
            pass

    def _add(self, keys: Jagged, table: int) -> None:
        step = keys.num_rows
        begin, end = (int(keys.offsets[(table + i) * step]) if keys.offsets is not None else (table + i) * step
                      for i in (0, 1))  # fmt: skip
        seen, times = np.unique(keys.keys[begin:end], return_counts=True)
        if not len(seen):
            return
        needed = int(seen[-1]) + 1
        if len(self.counts[table]) < needed:
            grown = np.zeros(min(self._rows[table], max(needed, 2 * len(self.counts[table]))), np.int32)
            grown[: len(self.counts[table])] = self.counts[table]
            self.counts[table] = grown
        self.counts[table][seen] += times.astype(np.int32)
        self.lookups[table] += end - begin

    def mean_hotness(self, table: int) -> float:
        """Keys of a bag on average; 1 where nothing was counted."""
        return self.lookups[table] / self.samples if self.samples and self.lookups[table] else 1.0

    def frequency(self, table: int) -> Frequency:
        """The counts of one table, binned."""
        return Frequency.from_counts(self.counts[table], self._rows[table])


def frequency_order(counts: Counts, rows: int) -> NDArray[np.int64]:
    """Rows by descending count, rows of equal count in their own order: ``order[new] = old``.

    Args:
        counts: [R or fewer]; rows beyond were never seen.
        rows: R.
    """
    order = np.argsort(-counts.astype(np.int64), kind="stable")
    rest = np.arange(len(counts), rows, dtype=np.int64)
    return np.concatenate([order.astype(np.int64), rest])


def is_descending(counts: Counts) -> bool:
    """Whether the data is numbered by descending frequency."""
    return bool((counts[1:] <= counts[:-1]).all())


def bin_edges(rows: int) -> NDArray[np.int64]:
    """First row of each bin, and R: single rows at first, then bins that grow with the row number."""
    octaves = max(0.0, math.log2(rows / _SINGLE_EDGES)) if rows else 0.0
    beyond = np.rint(_SINGLE_EDGES * 2 ** (np.arange(1, math.ceil(16 * octaves) + 1) / 16)).astype(np.int64)
    edges = np.concatenate([np.arange(min(rows, _SINGLE_EDGES) + 1), beyond, [rows]])
    return np.unique(edges[edges <= rows])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frequency:
    """Probabilities of one table's rows, in row order, as bins of rows that hold groups of equal probability.

    Attributes:
        rows: R.
        edges: [bins + 1] int64, first row of each bin, and R.
        bins: [groups] int64, the bin of each group.
        members: [groups] int64, rows in the group.
        weights: [groups], look-ups counted of each row of the group, or its probability.
        total: look-ups counted; 0: ``weights`` are probabilities.
    """

    rows: int
    edges: NDArray[np.int64]
    bins: NDArray[np.int64]
    members: NDArray[np.int64]
    weights: Floats
    total: int = 0

    @classmethod
    def from_counts(cls, counts: Counts, rows: int) -> Frequency:
        """From look-ups by row.

        Args:
            counts: [R or fewer] by row number, in any order (descending where the data is in frequency order).
            rows: R; rows beyond ``counts`` were never seen.

        Raises:
            ConfigError: there are more counts than rows, or one is negative.
        """
        if len(counts) > rows or (len(counts) and int(counts.min()) < 0):
            raise ConfigError(f"counts: {len(counts)} of them, for {rows} rows; give one of at least 0 for each row")
        total = int(counts.sum(dtype=np.int64))
        if not total:
            return cls.power_law(rows, 0.0)
        edges = bin_edges(rows)
        bins, members, weights = [], [], []
        for number, (begin, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            values, sizes = np.unique(counts[begin:end], return_counts=True)
            unseen = end - max(begin, min(end, len(counts)))
            if unseen:
                values, sizes = np.append(values, 0), np.append(sizes, unseen)
            bins.append(np.full(len(values), number, np.int64))
            members.append(sizes.astype(np.int64))
            weights.append(values.astype(np.float64))
        return cls(
            rows=rows,
            edges=edges,
            bins=np.concatenate(bins),
            members=np.concatenate(members),
            weights=np.concatenate(weights),
            total=total,
        )

    @classmethod
    def from_steps(cls, counts: Sequence[int], sizes: Sequence[int], rows: int) -> Frequency:
        """As ``from_counts`` of ``np.repeat(counts, sizes)``, without making it.

        Args:
            counts: look-ups of one row.
            sizes: so many neighbouring rows have it.
            rows: R; rows beyond were never seen.

        Raises:
            ConfigError: there are more counts than rows, or one is negative.
        """
        ends = np.cumsum([0, *sizes], dtype=np.int64)
        if int(ends[-1]) > rows or min(counts, default=0) < 0:
            raise ConfigError(f"counts: {ends[-1]} of them, for {rows} rows; give one of at least 0 for each row")
        total = sum(count * size for count, size in zip(counts, sizes, strict=True))
        if not total:
            return cls.power_law(rows, 0.0)
        edges = bin_edges(rows)
        cuts = np.unique(np.concatenate([edges, ends]))
        places = np.searchsorted(ends, cuts[:-1], side="right") - 1
        weights = np.array([*counts, 0], np.float64)[places]
        bins = np.searchsorted(edges, cuts[:-1], side="right") - 1
        # One group for each count of a bin, in ascending order, as ``np.unique`` makes them.
        keys, group = np.unique(np.stack([bins, weights]), axis=1, return_inverse=True)
        members = np.bincount(group.reshape(-1), np.diff(cuts)).astype(np.int64)
        return cls(
            rows=rows, edges=edges, bins=keys[0].astype(np.int64), members=members, weights=keys[1], total=int(total)
        )

    @classmethod
    def power_law(cls, rows: int, exponent: float) -> Frequency:
        """What a power law gives: row k has the part of x^-exponent between k + 1 and k + 2, out of 1 .. R + 1.

        The law of ``crosslane synth``; exponent 0 is uniform.
        """
        edges = bin_edges(rows)
        x = np.log(edges + 1.0)
        cumulative = x if exponent == 1.0 else np.expm1((1.0 - exponent) * x)
        members = np.diff(edges)
        weights = np.diff(cumulative / cumulative[-1]) / members
        return cls(rows=rows, edges=edges, bins=np.arange(len(members)), members=members, weights=weights)

    @property
    def probabilities(self) -> Floats:
        """[groups] probability that one look-up is of one given row of the group."""
        return self.weights / self.total if self.total else self.weights

    def shares(self) -> Floats:
        """[bins + 1] part of the look-ups that are of the rows before each edge."""
        return self._before(self.members * self.probabilities)

    def distinct(self, draws: float) -> Floats:
        """[bins + 1] distinct rows before each edge that ``draws`` look-ups are expected to touch.

        From counts it is the unbiased estimate for draws without replacement out of what was counted (Hurlbert 1971,
        rarefaction): 1 - C(N - c, n) / C(N, n) for a row seen c times in N look-ups. Plugging c / N into
        1 - (1 - p)^n would miss the rows that no counted batch holds.
        """
        return self._before(self.members * self.touched(draws))

    def touched(self, draws: float) -> Floats:
        """[groups] probability that ``draws`` look-ups touch one given row of the group."""
        if self.total and draws <= self.total < _PLUG_IN_FROM * draws:
            return 1.0 - np.exp(_log_absent(self.weights.astype(np.int64), self.total, max(1, round(draws))))
        with np.errstate(divide="ignore"):
            touched: Floats = -np.expm1(draws * np.log1p(-np.minimum(self.probabilities, 1.0)))
        return touched

    def at(self, cumulative: Floats, row: float) -> float:
        """What lies before ``row`` of an array by edge; linear inside a bin."""
        return float(np.interp(row, self.edges, cumulative))

    def _before(self, values: Floats) -> Floats:
        return np.concatenate([[0.0], np.cumsum(np.bincount(self.bins, values, len(self.edges) - 1))])


def _log_absent(counts: NDArray[np.int64], total: int, draws: int) -> Floats:
    """Logarithm of C(N - c, n) / C(N, n) for each count c: the product over i < c of (N - n - i) / (N - i)."""
    most = min(int(counts.max()), 40 * (total // draws + 1))  # beyond it is below e^-40
    i = np.arange(most, dtype=np.float64)
    with np.errstate(divide="ignore"):
        steps = np.log(np.maximum(total - draws - i, 0.0)) - np.log(total - i)
    table: Floats = np.concatenate([[0.0], np.cumsum(steps)])
    return table[np.minimum(counts, most)]


def candidate_thresholds(rows: int) -> list[int]:
    """Thresholds that a plan looks at: a step every half octave, strictly inside the rows."""
    if rows < 2:
        return []
    steps = np.rint(2 ** (np.arange(0, 2 * math.log2(rows)) / 2)).astype(np.int64)
    return sorted({int(step) for step in steps if 0 < step < rows})


def count_batches(rows: Sequence[int], batches: Iterable[Jagged]) -> RowCounts:
    """Count the keys of some batches."""
    counts = RowCounts(rows)
    for keys in batches:
        counts.add(keys)
    return counts


def hugectr_threshold(
    counts: Counts,
    *,
    batches: int,
    batch_size: int,
    ranks: int,
    nodes: int = 1,
    communication: Literal["ib_nvlink", "ib_nvlink_hier", "nvlink_single_node"] = "ib_nvlink",
    bandwidth_ratio: float = 1.0,
    efficiency: float = 1.0,
    max_duplicates: float = 0.01,
) -> int:
    """Rows that HugeCTR 23.12 would call frequent: those counted at least so often, rounded up to a multiple of W.

    ``ib_nvlink``: batches * W * (all-to-all rate / all-reduce rate) * efficiency * W / (W - 1); ``ib_nvlink_hier``:
    the last factor is N / (N - 1); ``nvlink_single_node``: G * batches * sqrt(2 p / (m (m - 1))), m = G / W
    (its ``calibration_data.cu``; there over the categories of all tables at once, here table by table).

    Args:
        counts: look-ups by row over ``batches`` batches, descending.
        batches: counted.
        batch_size: G.
        ranks: W.
        nodes: N.
        communication: which of its three forms.
        bandwidth_ratio: rate of the all-to-all by that of the all-reduce.
        efficiency: its ``efficiency``.
        max_duplicates: p, its ``p_dup_max``.

    Raises:
        ConfigError: the form needs more ranks or nodes, or rows of a batch.
    """
    if communication == "nvlink_single_node":
        share = batch_size / ranks
        if share <= 1:
            raise ConfigError(f"batch {batch_size} on {ranks} ranks: the formula needs more than one row a rank")
        least = batch_size * batches * float(np.sqrt(2 * max_duplicates / (share * (share - 1))))
    else:
        parties = nodes if communication == "ib_nvlink_hier" else ranks
        if parties < 2:
            raise ConfigError(f"{communication}: {parties} of ranks or nodes; the formula needs at least 2")
        least = batches * ranks * bandwidth_ratio * efficiency * parties / (parties - 1)
    frequent = int((counts >= least).sum())
    return min(len(counts), -(-frequent // ranks) * ranks)
