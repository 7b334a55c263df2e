"""Metrics of binary predictions, exact over all ranks.

Scores are logits z, predictions p = 1 / (1 + exp(-z)), labels y in {0, 1}.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np

from dlrm.device import Array, Device
from embedding.comm import Comm
from pipeline.curves import Curves, trace_curves
from pipeline.ranking import HOST, Ranking, gather_integers, rank_scores, sum_integers
from pipeline.score_sums import LIMB, class_ends, loss_sums, rank_statistic

_LIMB = int(LIMB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Quality of one set of predictions. ``None`` stands where a number is not defined, never NaN.

    ======================  ===========================================  =========================
    field                   definition                                   ``None`` where
    ======================  ===========================================  =========================
    ``auc``                 P(z of a positive > z of a negative), ties   a class is absent
                            count one half
    ``log_loss``            mean of -y ln p - (1 - y) ln(1 - p), in      there are no rows
                            nats, from the logits, nothing clipped
    ``normalized_entropy``  log loss / entropy of the base rate; below   a class is absent
                            1 beats the constant prediction
    ``calibration``         mean prediction / base rate; 1 is perfect,   there is no positive
                            above 1 promises too many clicks
    ``accuracy``            share of rows with (z > 0) = y               there are no rows
    ``base_rate``           positives / samples                          there are no rows
    ======================  ===========================================  =========================

    Scores that are NaN or infinite and labels other than 0 and 1 are refused, so that they never pass as
    a number. Sources: normalised entropy, He et al., "Practical Lessons from Predicting Clicks on Ads at
    Facebook" (2014), section 3; AUC with ties, Hanley and McNeil (1982).
    """

    auc: float | None
    log_loss: float | None
    normalized_entropy: float | None
    calibration: float | None
    accuracy: float | None
    base_rate: float | None
    samples: int
    positives: int

    def to_values(self) -> dict[str, float | int | None]:
        """Plain JSON values by field name."""
        return asdict(self)


def evaluate_scores(
    logits: Array, labels: Array, comm: Comm, device: Device = HOST, carrier: Comm | None = None
) -> tuple[Metrics, Curves]:
    """Metrics and curves of all ranks' rows, the same object on every rank (collective).

    The result depends only on the rows: counts are integers, and sums of real numbers are taken in fixed
    point, so that neither the order of the rows nor the number of ranks changes a bit. A rank keeps about
    its share of the rows, 12 bytes each for float32 scores.

    A GPU gives the CPU's AUC, counts and curves to the last bit. Its exponentials and logarithms may differ from the
    CPU's in the last place, so that what is made of them (log loss, normalised entropy, calibration and mean
    predictions) agrees within 1e-14 of its value.

    Args:
        logits: [n] float32 or float64, this rank's scores before the sigmoid; n may be 0.
        labels: [n], each 0 or 1.
        comm: the ranks that share the rows; carries numbers of the host.
        device: holds the rows.
        carrier: the same ranks, for arrays of the device; ``None``: a GPU's travel over ``comm`` through pinned memory.

    Raises:
        DataError: on every rank, if any rank has a NaN or infinite score or a label other than 0 and 1.
    """
    ranking = rank_scores(logits, labels, comm, device, carrier)
    log_loss, correct = _log_loss(ranking, comm)
    curves, mean_prediction = trace_curves(ranking, comm)
    rows, positives = ranking.num_rows, ranking.num_positives
    base_rate = positives / rows if rows else None
    normalized_entropy = None
    if log_loss is not None and 0 < positives < rows:
        rate = positives / rows
        normalized_entropy = log_loss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
    calibration = mean_prediction / base_rate if mean_prediction is not None and base_rate else None
    metrics = Metrics(
        auc=_auc(ranking, comm),
        log_loss=log_loss,
        normalized_entropy=normalized_entropy,
        calibration=calibration,
        accuracy=correct / rows if rows else None,
        base_rate=base_rate,
        samples=rows,
        positives=positives,
    )
    return metrics, curves


def _auc(ranking: Ranking, comm: Comm) -> float | None:
    """Area under the ROC curve: U / (positives x negatives), correctly rounded."""
    local = rank_statistic(ranking.groups, ranking.device)
    doubled, below = 0, 0
    for (within,), rows, positives in zip(
        gather_integers(comm, [local]), ranking.range_rows, ranking.range_positives, strict=True
    ):
        doubled += within + 2 * positives * below
        below += rows - positives
    pairs = ranking.num_positives * ranking.num_negatives
    return doubled / (2 * pairs) if pairs else None


def _log_loss(ranking: Ranking, comm: Comm) -> tuple[float | None, int]:
    """Mean loss in nats, and the number of rows predicted right at 0.5."""
    largest = np.array([_largest_loss(ranking)])
    comm.all_reduce(largest, op="max").wait()
    # Terms are scaled into [0, 1): 60 bits below the largest one decide.
    exponent = max(math.frexp(float(largest[0]))[1], -1000)
    mine = loss_sums(ranking.groups, math.ldexp(1.0, -exponent), ranking.device)
    high, low, correct = sum_integers(comm, mine)
    if not ranking.num_rows:
        return None, 0
    scale = Fraction(2) ** exponent
    return float(Fraction(high * _LIMB + low, _LIMB * _LIMB * ranking.num_rows) * scale), correct


def _largest_loss(ranking: Ranking) -> float:
    """Loss of the lowest positive or the highest negative, whichever is worse; 0 without rows."""
    lowest_positive, highest_negative = class_ends(ranking.groups, ranking.device)
    worst = 0.0 if lowest_positive is None else _softplus(-lowest_positive)
    return worst if highest_negative is None else max(worst, _softplus(highest_negative))


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
