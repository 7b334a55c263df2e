"""Curves behind the metrics: ROC, precision-recall, calibration and the distribution of scores.

All of them come from exact counts. Points are left out of a curve, never moved: each one given lies on it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from embedding.comm import Comm, all_gather_bytes
from pipeline.ranking import Ranking, sum_integers
from pipeline.score_sums import LIMB, bin_sums, curve_points, histogram_sums, precision_sums, score_at

CALIBRATION_BINS = 20
HISTOGRAM_BINS = 50
# ROC: 199 steps along each axis; precision-recall: 398 steps of recall. With the first point below 400.
_ROC_STEPS = (199, 199)
_RECALL_STEPS = (398, 0)
# The histogram spans all but the outermost rows, so that one stray score does not squeeze the rest.
_TAIL = 2000

_LIMB = int(LIMB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """JSON-able curves; ``None`` where a class (or every row) is absent.

    Attributes:
        roc: ``false_positive_rate``, ``true_positive_rate`` and ``threshold`` (a logit; ``None`` at the
            first point, above every score), at most 400 points from (0, 0) to (1, 1).
        precision_recall: ``recall``, ``precision`` and ``threshold``, at most 400 points, recall from 0
            (where precision is 1 by convention) to 1.
        average_precision: sum over all distinct scores of precision x step of recall (no interpolation).
        calibration: up to 20 bins of equal count in ascending score: ``mean_prediction``,
            ``observed_rate`` and ``count`` each. Equal scores are never parted, so that counts may
            differ where there are many; bins left empty by that are dropped.
        histogram: ``edges`` [51] in logits, ``positives`` [50] and ``negatives`` [50]. The edges leave out
            the outermost 0.05 % of rows on either side, which count into the end bins.
    """

    roc: dict[str, list[float | None]] | None
    precision_recall: dict[str, list[float | None]] | None
    average_precision: float | None
    calibration: dict[str, list[float]] | None
    histogram: dict[str, list[float]] | None

    def to_values(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)


def trace_curves(ranking: Ranking, comm: Comm) -> tuple[Curves, float | None]:
    """Curves of all ranks' rows, and the mean prediction (collective, the same on every rank)."""
    rows = ranking.num_rows
    if not rows:
        return Curves(roc=None, precision_recall=None, average_precision=None, calibration=None, histogram=None), None
    calibration, mean_prediction = _calibration(ranking, comm)
    histogram = _histogram(ranking, comm)
    roc = precision_recall = average_precision = None
    if ranking.num_positives and ranking.num_negatives:
        roc = _roc(ranking, comm)
        precision_recall = _precision_recall(ranking, comm)
        average_precision = _average_precision(ranking, comm)
    curves = Curves(
        roc=roc,
        precision_recall=precision_recall,
        average_precision=average_precision,
        calibration=calibration,
        histogram=histogram,
    )
    return curves, mean_prediction


def _points(ranking: Ranking, steps: tuple[int, int], comm: Comm) -> list[tuple[float, int, int]]:
    """(Threshold, true positives, false positives), highest threshold first, always with the last one."""
    totals = (ranking.num_positives, ranking.num_negatives)
    mine = curve_points(ranking.groups, ranking.above, totals, steps, ranking.device)
    parts = [json.loads(part) for part in all_gather_bytes(comm, json.dumps(mine).encode())]
    return [(point[0], point[1], point[2]) for part in reversed(parts) for point in part]


def _roc(ranking: Ranking, comm: Comm) -> dict[str, list[float | None]]:
    points = _points(ranking, _ROC_STEPS, comm)
    return {
        "false_positive_rate": [0.0, *(false / ranking.num_negatives for _, _, false in points)],
        "true_positive_rate": [0.0, *(true / ranking.num_positives for _, true, _ in points)],
        "threshold": [None, *(threshold for threshold, _, _ in points)],
    }


def _precision_recall(ranking: Ranking, comm: Comm) -> dict[str, list[float | None]]:
    points = _points(ranking, _RECALL_STEPS, comm)
    return {
        "recall": [0.0, *(true / ranking.num_positives for _, true, _ in points)],
        "precision": [1.0, *(true / (true + false) for _, true, false in points)],
        "threshold": [None, *(threshold for threshold, _, _ in points)],
    }


def _average_precision(ranking: Ranking, comm: Comm) -> float:
    high, low = sum_integers(comm, precision_sums(ranking.groups, ranking.above, ranking.device))
    return float(Fraction(high * _LIMB + low, _LIMB * _LIMB * ranking.num_positives))


def _calibration(ranking: Ranking, comm: Comm) -> tuple[dict[str, list[float]], float]:
    mine = bin_sums(ranking.groups, ranking.rows_below, ranking.num_rows, CALIBRATION_BINS, ranking.device)
    sums = sum_integers(comm, mine)
    table = [tuple(sums[i : i + 4]) for i in range(0, len(sums), 4)]
    curve: dict[str, list[float]] = {"mean_prediction": [], "observed_rate": [], "count": []}
    for rows, positives, high, low in table:
        if rows:
            curve["mean_prediction"].append(float(Fraction(high * _LIMB + low, _LIMB * _LIMB * rows)))
            curve["observed_rate"].append(positives / rows)
            curve["count"].append(rows)
    total = sum(high * _LIMB + low for _, _, high, low in table)
    return curve, float(Fraction(total, _LIMB * _LIMB * ranking.num_rows))


def _histogram(ranking: Ranking, comm: Comm) -> dict[str, list[float]]:
    tail = ranking.num_rows // _TAIL
    ends = np.array([_score_at(ranking, tail), _score_at(ranking, ranking.num_rows - 1 - tail)])
    comm.all_reduce(ends, op="max").wait()
    low, high = (float(end) for end in ends)
    # Equal ends leave no width; and a width beyond float64 leaves no finite one.
    if not low < high or not math.isfinite(high - low):
        low, high = (low - 0.5, high + 0.5) if abs(low) < 2**50 else (-1.0, 1.0)
    mine = histogram_sums(ranking.groups, low, high, HISTOGRAM_BINS, ranking.device)
    counts: list[float] = [*sum_integers(comm, mine)]
    return {
        "edges": np.linspace(low, high, HISTOGRAM_BINS + 1).tolist(),
        "positives": counts[:HISTOGRAM_BINS],
        "negatives": counts[HISTOGRAM_BINS:],
    }


def _score_at(ranking: Ranking, position: int) -> float:
    """Score of the row at this place of all sorted rows, -inf where another rank has it."""
    local = position - ranking.rows_below
    if not 0 <= local < ranking.range_rows[ranking.rank]:
        return -math.inf
    return score_at(ranking.groups, local, ranking.device)
