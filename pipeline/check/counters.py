"""Look-ups of every row of every table, counted exactly in two bytes a row, or of every 2^n-th row of large tables.

Shapes: T tables, L levels (counts that occur).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import ConfigError
from pipeline.check.tally import FULL, GROUPS, HEAD, key_groups

_PIECE = 1 << 18
_SIGMAS = 10
"""How far counts must contradict the order of frequency to be no matter of chance, also among millions of rows."""


@dataclass(frozen=True, slots=True)
class Levels:
    """How many rows of a table have which count.

    Attributes:
        counts: [L] int64, descending, at least 1.
        sizes: [L] int64, rows of each (as many as the counted ones stand for).
    """

    counts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @property
    def seen(self) -> int:
        """Rows that were looked up at all."""
        return int(self.sizes.sum())

    @property
    def lookups(self) -> int:
        """All look-ups."""
        return int(self.counts @ self.sizes)

    def count_at(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The count of the most frequent row but ``ranks - 1``; 0 beyond those seen."""
        level = np.searchsorted(np.cumsum(self.sizes), ranks, side="left")
        return np.append(self.counts, 0)[level]

    def share_of(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """The part of all look-ups that the most frequent ``ranks`` rows take together."""
        ends = np.concatenate([[0], np.cumsum(self.sizes)])
        taken = np.concatenate([[0.0], np.cumsum(self.counts.astype(np.float64) * self.sizes)])
        return np.asarray(np.interp(ranks, ends, taken) / max(1.0, taken[-1]))


class Counters:
    """The counters of all tables.

    A 16-bit counter that is full starts at 1 again, and ``carried`` keeps how often, which is rare: at most once in
    65,535 look-ups.

    Attributes:
        values: uint16.
        starts: [T] int64, first counter of each table.
        shifts: [T] int64, of rows from ``HEAD`` on every 2^shift-th has one.
    """

    def __init__(self, table_rows: Sequence[int], budget_bytes: int) -> None:
        """Choose how many rows of the largest tables are counted, so that all fit.

        Raises:
            ConfigError: the budget is too small for the first rows alone.
        """
        self.table_rows = np.array(table_rows, np.int64)
        shifts = np.zeros_like(self.table_rows)
        while 2 * (sizes := self._sizes(shifts)).sum() > budget_bytes:
            if sizes.max(initial=0) <= HEAD:
                raise ConfigError(
                    f"memory limit: leaves {max(0, budget_bytes) / 2**20:.0f} MiB for counters, but "
                    f"{len(table_rows)} tables need at least {2 * sizes.sum() / 2**20:.0f} MiB; raise --memory-limit"
                )
            shifts[sizes == sizes.max()] += 1
        self.shifts = shifts
        self.starts: NDArray[np.int64] = np.cumsum(sizes) - sizes
        self.values: NDArray[np.uint16] = np.zeros(int(sizes.sum()), np.uint16)
        self._carried: dict[int, int] = {}

    def _sizes(self, shifts: NDArray[np.int64]) -> NDArray[np.int64]:
        beyond = np.maximum(self.table_rows - HEAD, 0)
        sizes: NDArray[np.int64] = np.minimum(self.table_rows, HEAD) + ((beyond + (1 << shifts) - 1) >> shifts)
        return sizes

    def carry(self, counters: NDArray[np.int64]) -> None:
        """Take in counters that were full; safe from several threads for different tables."""
        for counter, times in zip(*np.unique(counters, return_counts=True), strict=True):
            self._carried[int(counter)] = self._carried.get(int(counter), 0) + int(times)

    def pieces(self, table: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
        """For parts of a table in ascending order: rows, their counts, and how many rows each stands for."""
        start, shift = int(self.starts[table]), int(self.shifts[table])
        size = int(self._sizes(self.shifts)[table])
        head = min(size, HEAD)
        carried = sorted(counter - start for counter in self._carried if start <= counter < start + size)
        for begin in (0, *range(head, size, _PIECE)):
            end = head if begin == 0 else min(size, begin + _PIECE)
            counts = self.values[start + begin : start + end].astype(np.int64)
            for place in carried[np.searchsorted(carried, begin) : np.searchsorted(carried, end)]:
                counts[place - begin] += FULL * self._carried[start + place]
            rows = np.arange(begin, end, dtype=np.int64)
            yield (rows, counts, 1) if begin == 0 else (HEAD + ((rows - HEAD) << shift), counts, 1 << shift)

    def levels(self, table: int) -> Levels:
        """How many rows have which count."""
        sizes: NDArray[np.int64] = np.zeros(FULL + 1, np.int64)
        rare: dict[int, int] = {}
        for _, counts, stands_for in self.pieces(table):
            large = counts > FULL
            sizes += stands_for * np.bincount(counts[~large], minlength=FULL + 1)
            for count in counts[large].tolist():
                rare[count] = rare.get(count, 0) + stands_for
        found = np.flatnonzero(sizes[1:]) + 1
        counts = np.concatenate([np.array(sorted(rare, reverse=True), np.int64), found[::-1]])
        of_each = np.concatenate([np.array([rare[count] for count in sorted(rare, reverse=True)], np.int64),
                                  sizes[found[::-1]]])  # fmt: skip
        return Levels(counts, of_each)

    def groups(self, table: int) -> NDArray[np.int64]:
        """[GROUPS] look-ups by the groups in which splits are compared."""
        found: NDArray[np.int64] = np.zeros(GROUPS, np.int64)
        for rows, counts, stands_for in self.pieces(table):
            sums = np.bincount(key_groups(rows), weights=counts.astype(np.float64), minlength=GROUPS)
            found += stands_for * sums.astype(np.int64)
        return found

    def disorder(self, table: int) -> tuple[int, int, int, int] | None:
        """Two rows whose counts contradict a numbering by descending frequency, whose row 0 stands apart.

        Returns:
            The earlier row and its count, the later one and its larger count; ``None`` where the counts fit.
        """
        least_row, least = -1, -1
        for rows, counts, _ in self.pieces(table):
            start = 1 if rows.size and rows[0] == 0 else 0
            rows, counts = rows[start:], counts[start:]
            if not rows.size:
                continue
            lowest = np.minimum.accumulate(counts if least < 0 else np.minimum(counts, least))
            before = np.concatenate([[counts[0] if least < 0 else least], lowest[:-1]])
            wrong = counts - before > _SIGMAS * (1 + np.sqrt(counts + before))
            if wrong.any():
                later = int(np.argmax(wrong))
                earlier = int(np.argmin(counts[:later])) if later else -1
                if earlier < 0 or (0 <= least <= counts[earlier]):
                    return least_row, least, int(rows[later]), int(counts[later])
                return int(rows[earlier]), int(counts[earlier]), int(rows[later]), int(counts[later])
            place = int(np.argmin(counts))
            if least < 0 or counts[place] < least:
                least_row, least = int(rows[place]), int(counts[place])
        return None


def fitted_exponent(levels: Levels, least_count: int = 10) -> float | None:
    """Exponent a of counts ~ rank^-a, by the median slope between points even in log(rank).

    Rows with few look-ups are left out: which of them come first is chance. The median takes no notice of single rows
    that stand apart, such as the one that all rare values share.

    Args:
        levels: of a table.
        least_count: of the rows that count.

    Returns:
        The exponent; ``None`` with fewer than 8 rows to fit.

    Source: Theil (1950), Sen (1968).
    """
    last = int(levels.sizes[levels.counts >= least_count].sum())
    if last < 8:
        return None
    ranks = np.unique(np.rint(np.geomspace(1, last, 96)).astype(np.int64))
    x, y = np.log(ranks), np.log(levels.count_at(ranks))
    one, other = np.triu_indices(ranks.size, 1)
    exponent: float = -float(np.median((y[other] - y[one]) / (x[other] - x[one])))
    return exponent


def plot_ranks(rows: int, points: int = 64) -> NDArray[Any]:
    """Ranks even in their logarithm, from 1 to ``rows``."""
    return np.unique(np.rint(np.geomspace(1, max(1, rows), points)).astype(np.int64))
