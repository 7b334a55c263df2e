"""The charts of the evaluation report, from the values of ``report.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.charts import Axis, Mark, Point, draw, linear_axis, logit, outline, percent, plain, probability_axis

Values = Mapping[str, Any]

_SPLIT_TONES = ("a", "b", "c", "d")
# A line with more points than pixels is noise.
_MAX_LOSS_POINTS = 280


def roc_chart(report: Values) -> str:
    """ROC, or nothing where a class is absent."""
    roc = report["curves"]["roc"]
    if not roc:
        return ""
    points = list(zip(roc["false_positive_rate"], roc["true_positive_rate"], strict=True))
    return draw(
        title="ROC curve",
        description=f"True positive rate over false positive rate; the area below the curve is {report['auc']:.5f}.",
        x=linear_axis("False positive rate", (), low=0, high=1),
        y=linear_axis("True positive rate", (), low=0, high=1),
        marks=[
            Mark(points=[(0, 0), (1, 1)], tone="muted", kind="rule", label="chance"),
            Mark(points=points, kind="area", label=f"model, AUC {report['auc']:.4f}"),
        ],
    )


def precision_recall_chart(report: Values) -> str:
    """Precision over recall, or nothing where a class is absent."""
    curve = report["curves"]["precision_recall"]
    if not curve:
        return ""
    points = list(zip(curve["recall"], curve["precision"], strict=True))
    average, rate = report["curves"]["average_precision"], report["base_rate"]
    return draw(
        title="Precision and recall",
        description=f"Precision over recall; average precision is {average:.4f}, the base rate {rate:.4f}.",
        x=linear_axis("Recall", (), low=0, high=1),
        y=linear_axis("Precision", (), low=0, high=1),
        marks=[
            Mark(points=[(0, rate), (1, rate)], tone="muted", kind="rule", label=f"base rate {rate:.4g}"),
            Mark(points=points, tone="b", kind="area", label=f"model, AP {average:.4f}"),
        ],
    )


def calibration_chart(report: Values) -> str:
    """Observed rate over mean prediction with 95 % intervals, both axes in logits."""
    bins = report["curves"]["calibration"]
    if not bins:
        return ""
    rows = list(zip(bins["mean_prediction"], bins["observed_rate"], bins["count"], strict=True))
    # A rate of 0 or 1 has no logit: half a row stands in for none, as its interval shows.
    places = [
        (_held_logit(mean, 1e-9), _held_logit(rate, 0.5 / count), _wilson(rate, count), mean, rate, count)
        for mean, rate, count in rows
    ]
    # Intervals may leave the frame; the bins themselves decide it.
    ends = [value for place in places for value in place[:2]]
    low, high = min(ends) - 0.35, max(ends) + 0.35
    whiskers: list[Point] = []
    for x, _, (lower, upper), *_ in places:
        whiskers += [(x, lower), (x, upper)]
    return draw(
        title="Calibration",
        description=f"Observed rate over mean prediction in {len(rows)} bins; on the diagonal both are equal.",
        x=probability_axis("Mean prediction (logit scale)", low, high),
        y=probability_axis("Observed rate (logit scale)", low, high),
        marks=[
            Mark(points=[(low, low), (high, high)], tone="muted", kind="rule", label="perfect"),
            Mark(points=whiskers, tone="c", kind="whiskers"),
            Mark(
                points=[(place[0], place[1]) for place in places],
                tone="c",
                kind="dots",
                label="bin, with 95 % interval",
                hints=[
                    f"predicted {percent(mean)}, observed {percent(rate)}, {int(count):,} rows"
                    for *_, mean, rate, count in places
                ],
            ),
        ],
    )


def histogram_chart(report: Values) -> str:
    """Distribution of the predictions of each class."""
    histogram = report["curves"]["histogram"]
    if not histogram:
        return ""
    edges = histogram["edges"]
    marks, tops = [], [0.0]
    for name, tone, label in (("negatives", "a", "label 0"), ("positives", "b", "label 1")):
        counts = histogram[name]
        total = sum(counts)
        if total:
            shares = [count / total for count in counts]
            tops.append(max(shares))
            marks.append(Mark(points=outline(edges, shares), tone=tone, kind="area", label=f"{label}, {total:,} rows"))
    return draw(
        title="Predictions by class",
        description="Share of the rows of each class in 50 bins of the predicted probability, on a logit scale.",
        x=probability_axis("Predicted probability (logit scale)", edges[0], edges[-1]),
        y=linear_axis("Share of the class", tops, low=0, text=percent),
        marks=marks,
    )


def loss_chart(report: Values) -> str:
    """Training loss over steps."""
    points = [(record["step"], record["loss"]) for record in _records(report, "step") if _number(record.get("loss"))]
    if len(points) < 2:
        return ""
    marks = [Mark(points=_bucket_means(points, _MAX_LOSS_POINTS), tone="faint", label="progress records")]
    marks.append(Mark(points=_bucket_means(_smooth(points), _MAX_LOSS_POINTS), tone="a", label="smoothed"))
    ordered = sorted(value for _, value in points)
    # The first steps of a run often lie far above the rest; the axis leaves out what is rare.
    top = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]
    values = [ordered[0], top]
    entropy = _base_entropy(report["base_rate"])
    if entropy is not None and ordered[0] < entropy < 1.3 * top:
        marks.append(
            Mark(
                points=[(points[0][0], entropy), (points[-1][0], entropy)],
                tone="muted",
                kind="rule",
                label="base rate alone",
            )
        )
        values.append(entropy)
    return draw(
        title="Training loss",
        description=f"Log loss of the training batches over steps, at the end {_smooth(points)[-1][1]:.4f}.",
        x=_step_axis([step for step, _ in points]),
        y=linear_axis("Log loss", values),
        marks=marks,
    )


def auc_chart(report: Values) -> str:
    """AUC of the evaluations over steps, one line per split."""
    splits: dict[str, list[Point]] = {}
    for record in _records(report, "eval"):
        auc = record.get("metrics", {}).get("auc")
        if _number(auc):
            splits.setdefault(str(record.get("split", "")), []).append((record["step"], auc))
    if not splits:
        return ""
    steps = [step for points in splits.values() for step, _ in points]
    steps += [record["step"] for record in _records(report, "step")]
    marks: list[Mark] = []
    values = [auc for points in splits.values() for _, auc in points]
    ceiling = (report["dataset"].get("ceilings") or {}).get("best")
    if isinstance(ceiling, float):
        marks.append(
            Mark(
                points=[(min(steps), ceiling), (max(steps), ceiling)], tone="muted", kind="rule", label="best possible"
            )
        )
        values.append(ceiling)
    for number, (split, points) in enumerate(splits.items()):
        tone = _SPLIT_TONES[number % len(_SPLIT_TONES)]
        if len(points) > 1:
            marks.append(Mark(points=points, tone=tone))
        hints = [f"step {step:,}: AUC {auc:.5f}" for step, auc in points]
        marks.append(Mark(points=points, tone=tone, kind="dots", label=split, hints=hints))
    return draw(
        title="AUC during training",
        description=f"AUC of each evaluation over steps, at most {max(values):.5f}.",
        x=_step_axis(steps),
        y=linear_axis("AUC", values),
        marks=marks,
    )


def _step_axis(steps: Sequence[float]) -> Axis:
    return linear_axis("Step", steps, low=0, high=max(*steps, 1), text=plain)


def _records(report: Values, kind: str) -> list[Any]:
    return [record for record in report["history"] if record.get("type") == kind]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _held_logit(probability: float, margin: float) -> float:
    margin = min(margin, 0.25)
    return logit(min(max(probability, margin), 1 - margin))


def _wilson(rate: float, count: float) -> tuple[float, float]:
    """95 % interval of a rate, in logits. Source: Wilson (1927)."""
    z = 1.96
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return _held_logit(middle - half, 1e-9), _held_logit(middle + half, 1e-9)


def _base_entropy(rate: float | None) -> float | None:
    if rate is None or not 0 < rate < 1:
        return None
    return -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a fortieth of the records, unbiased at its start."""
    decay = 1 - 1 / max(2.0, min(len(points) / 40, 50.0))
    total = weight = 0.0
    smoothed = []
    for step, value in points:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append((step, total / weight))
    return smoothed


def _bucket_means(points: Sequence[Point], buckets: int) -> list[Point]:
    if len(points) <= buckets:
        return list(points)
    means = []
    for bucket in range(buckets):
        part = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        means.append((part[-1][0], sum(value for _, value in part) / len(part)))
    return means
