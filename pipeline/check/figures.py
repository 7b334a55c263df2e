"""Figures out of counts: histograms to look at, and how far two splits differ.

Shapes: N columns, K bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.check.tally import VALUE_BINS, VALUE_SHIFT

Counts = NDArray[np.int64]
DISPLAY_BINS = 50
_OUTER = 5e-4
"""Part of the values on either side that the axis of a histogram leaves out; they count into the end bins."""
_QUANTILES = 20

_HALF = VALUE_BINS // 2
_LARGEST = float(np.finfo(np.float32).max)


def _bin_edges() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Bins of finite values in ascending order, and their [bins + 1] edges."""
    magnitudes = np.arange(0xFF << (23 - VALUE_SHIFT), dtype=np.int64)
    lower = (magnitudes << VALUE_SHIFT).astype(np.uint32).view(np.float32).astype(np.float64)
    edges = np.append(lower, _LARGEST)
    order = np.concatenate([magnitudes[::-1] + _HALF, magnitudes])
    return order, np.concatenate([-edges[:0:-1], edges])


BIN_ORDER, BIN_EDGES = _bin_edges()


def finite_counts(bins: Counts) -> Counts:
    """[bins] of finite values in ascending order, of the bins of ``tally_dense``."""
    ordered: Counts = bins[BIN_ORDER]
    return ordered


def as_trained(values: Any, *, counts: bool) -> Any:
    """Stored values as training sees them: log(1 + max(x, 0)) of counts."""
    return np.log1p(np.maximum(values, 0)) if counts else values


def histogram(columns: dict[str, Counts], *, counts: bool, low: float, high: float) -> dict[str, Any]:
    """Histograms of one dense column to look at, over the same bins for every split.

    Args:
        columns: ``finite_counts`` of each split.
        counts: the stored values are counts, and shown as training sees them.
        low: least value of all splits, as stored.
        high: largest.

    Returns:
        ``edges`` [DISPLAY_BINS + 1] and, by split, ``shares`` [DISPLAY_BINS] of its values; empty without values.
    """
    total = np.sum(list(columns.values()), axis=0)
    if not total.sum():
        return {}
    edges = as_trained(np.clip(BIN_EDGES, low, high), counts=counts)
    ends = np.cumsum(total) / total.sum()
    first, last = np.searchsorted(ends, _OUTER, side="right"), np.searchsorted(ends, 1 - _OUTER)
    start, stop = edges[first], edges[min(int(last), total.size - 1) + 1]
    if not stop > start:
        start, stop = start - 0.5, start + 0.5
    wanted = np.linspace(start, stop, DISPLAY_BINS + 1)
    return {
        "edges": wanted.tolist(),
        "shares": {split: _shares(found, edges, wanted) for split, found in columns.items() if found.sum()},
    }


def _shares(found: Counts, edges: Any, wanted: Any) -> list[float]:
    """Parts of the values in wanted bins; a bin that lies across an edge is divided evenly, a single value is not."""
    shares = np.zeros(DISPLAY_BINS)
    for place in np.flatnonzero(found):
        low, high = edges[place], edges[place + 1]
        overlap = np.clip(np.minimum(wanted[1:], high) - np.maximum(wanted[:-1], low), 0, None)
        if high - low <= 1e-9 * (wanted[-1] - wanted[0]) or not overlap.sum():
            overlap = np.zeros(DISPLAY_BINS)
            overlap[np.clip(np.searchsorted(wanted, low, side="right") - 1, 0, DISPLAY_BINS - 1)] = 1
        elif low < wanted[0]:
            overlap[0] += wanted[0] - low
        elif high > wanted[-1]:
            overlap[-1] += high - wanted[-1]
        shares += found[place] * overlap / overlap.sum()
    return [float(share) for share in shares / found.sum()]


def quantile_groups(reference: Counts) -> NDArray[np.int64]:
    """A group for each bin, so that each group holds about a twentieth of the reference's values."""
    total = max(1, int(reference.sum()))
    middle = (np.cumsum(reference) - reference / 2) / total
    groups: NDArray[np.int64] = np.minimum((middle * _QUANTILES).astype(np.int64), _QUANTILES - 1)
    return groups


def grouped(found: Counts, groups: NDArray[np.int64]) -> Counts:
    """Counts by group."""
    sums: Counts = np.bincount(groups, weights=found.astype(np.float64)).astype(np.int64)
    return sums


def drift(reference: Counts, other: Counts) -> float | None:
    """Population stability index of a split against the reference, less what chance alone makes of it.

    sum (q - p) ln(q / p) over bins that one of them has, half a row added to each. Without drift its expectation is
    (bins - 1) (1/n + 1/m) for n and m rows, which is taken off.

    Args:
        reference: [K] counts.
        other: [K] counts.

    Returns:
        At least 0; below 0.1 is usually called stable, above 0.25 a shift; ``None`` where one of them is empty.

    Source: Yurdakul (2018), Statistical Properties of Population Stability Index.
    """
    n, m = int(reference.sum()), int(other.sum())
    if not n or not m:
        return None
    held = (reference > 0) | (other > 0)
    p, q = reference[held] + 0.5, other[held] + 0.5
    p, q = p / p.sum(), q / q.sum()
    chance = (p.size - 1) * (1 / n + 1 / m)
    index = float(((q - p) * np.log(q / p)).sum())
    return max(0.0, float(index - chance))
