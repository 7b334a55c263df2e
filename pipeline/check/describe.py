"""The figures of a check's report: of splits, dense columns and tables."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline.check.counters import Counters, fitted_exponent, plot_ranks
from pipeline.check.figures import (
    drift,
    finite_counts,
    grouped,
    histogram,
    quantile_groups,
)
from pipeline.check.scan import SplitScan
from pipeline.check.tally import KEYS, MISSING, OUTSIDE, UNSEEN, VALUE_BINS
from pipeline.manifest import Manifest

_NEGATIVE = slice(VALUE_BINS // 2 + 1, None)
"""Bins of what is below 0."""


class Describer:
    """Puts figures together out of counts."""

    def __init__(
        self, manifest: Manifest, counters: Counters, scans: dict[str, SplitScan], reference: str, threads: int
    ) -> None:
        """Take over what was counted.

        Args:
            manifest: of the set.
            counters: of the reference's look-ups.
            scans: by split.
            reference: the split that others are compared with.
            threads: that go through the counters.
        """
        self._threads = threads
        self._manifest = manifest
        self._counters = counters
        self._scans = scans
        self._reference = reference
        self._others = [name for name in scans if name != reference]

    def figures(self) -> dict[str, Any]:
        """``splits``, ``dense`` and ``tables``, as plain values."""
        with ThreadPoolExecutor(self._threads, thread_name_prefix="check") as pool:
            tables = list(pool.map(self._table, range(len(self._manifest.tables))))
        return {
            "splits": {name: self._split(name) for name in self._scans},
            "dense": [self._dense(n) for n in range(len(self._manifest.dense.names))],
            "tables": tables,
        }

    def _split(self, name: str) -> dict[str, Any]:
        zeros, ones, _ = (int(count) for count in self._scans[name].head.labels)
        rate = ones / (zeros + ones) if zeros + ones else None
        index = drift(self._scans[self._reference].head.labels[:2], self._scans[name].head.labels[:2])
        return {
            "rows": self._scans[name].rows,
            "positives": ones,
            "base_rate": rate,
            "drift": None if name == self._reference else index,
        }

    def _dense(self, n: int) -> dict[str, Any]:
        counts = self._manifest.dense.dtype == "int32"
        bins = {name: scan.head.bins[n] for name, scan in self._scans.items()}
        finite = {name: finite_counts(found) for name, found in bins.items()}
        totals = {name: int(found.sum()) for name, found in bins.items()}
        extremes = np.array([scan.head.extremes[n] for scan in self._scans.values()])
        low, high = float(extremes[:, 0].min()), float(extremes[:, 1].max())
        seen, moments = int(finite[self._reference].sum()), self._scans[self._reference].head.moments[n]
        mean = float(moments[0]) / seen if seen else None
        groups = quantile_groups(finite[self._reference])
        return {
            "name": self._manifest.dense.names[n],
            "minimum": low if np.isfinite(low) else None,
            "maximum": high if np.isfinite(high) else None,
            "mean": mean,
            "deviation": None if mean is None else float(np.sqrt(max(0.0, float(moments[1]) / seen - mean * mean))),
            "not_finite": {name: _part(totals[name] - int(finite[name].sum()), totals[name]) for name in bins},
            "missing": {name: _part(int(found[_NEGATIVE].sum()), totals[name]) for name, found in bins.items()}
            if counts
            else {},
            "transform": self._manifest.dense.transform,
            "histogram": histogram(finite, counts=counts, low=low, high=high),
            "drift": {
                name: drift(grouped(finite[self._reference], groups), grouped(finite[name], groups))
                for name in self._others
            },
        }

    def _table(self, t: int) -> dict[str, Any]:
        table, levels = self._manifest.tables[t], self._counters.levels(t)
        totals = {name: scan.totals[t] for name, scan in self._scans.items()}
        ranks = plot_ranks(levels.seen)
        learnt = self._counters.groups(t)
        hundredth = np.array([max(1, table.rows // 100)])
        return {
            "name": table.name,
            "rows": table.rows,
            "hotness": table.hotness,
            "frequency_ordered": table.frequency_ordered,
            "counted_every": 1 << int(self._counters.shifts[t]),
            "lookups": {name: int(found[KEYS]) for name, found in totals.items()},
            "missing": {
                name: _part(int(found[MISSING]), int(found[[KEYS, MISSING, OUTSIDE]].sum()))
                for name, found in totals.items()
            },
            "outside": {name: int(found[OUTSIDE]) for name, found in totals.items()},
            "seen_rows": min(levels.seen, table.rows),
            "top_hundredth": float(levels.share_of(hundredth)[0]) if levels.seen else None,
            "exponent": fitted_exponent(levels),
            "curve": {"rank": ranks.tolist(), "count": levels.count_at(ranks).tolist()} if levels.seen else {},
            "row_0": {
                name: _part(
                    int((learnt if name == self._reference else self._scans[name].groups[t])[0]), int(found[KEYS])
                )
                for name, found in totals.items()
            },
            "unseen": {name: _part(int(totals[name][UNSEEN]), int(totals[name][KEYS])) for name in self._others},
            "disorder": self._counters.disorder(t) if table.frequency_ordered else None,
            "drift": {name: drift(learnt, self._scans[name].groups[t]) for name in self._others},
        }


def _part(count: int, total: int) -> float | None:
    """A share, at most 1; ``None`` of nothing."""
    return min(1.0, count / total) if total else None
