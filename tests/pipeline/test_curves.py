"""Every point of a curve lies on scikit-learn's, and bins hold what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve, roc_curve

from embedding.comm import SingleComm
from pipeline.metrics import evaluate_scores


@pytest.fixture(params=[None, 1], ids=["distinct", "tied"])
def scored(rng, request):
    logits = rng.normal(-1, 2, 6_000)
    labels = (rng.random(6_000) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    if request.param is not None:
        logits = np.round(logits, request.param)
    return logits, labels, evaluate_scores(logits, labels, SingleComm())[1]


def test_roc_points_lie_on_the_exact_curve(scored) -> None:
    logits, labels, curves = scored
    exact = {
        threshold: (false, true)
        for false, true, threshold in zip(*roc_curve(labels, logits, drop_intermediate=False), strict=True)
    }
    roc = curves.roc
    points = list(zip(roc["false_positive_rate"], roc["true_positive_rate"], roc["threshold"], strict=True))
    assert points[0] == (0.0, 0.0, None)
    assert points[-1][:2] == (1.0, 1.0)
    assert len(points) <= 400
    for false, true, threshold in points[1:]:
        assert (false, true) == pytest.approx(exact[threshold], abs=1e-12)


def test_roc_keeps_its_area(scored) -> None:
    logits, labels, curves = scored
    roc = curves.roc
    area = np.trapezoid(roc["true_positive_rate"], roc["false_positive_rate"])
    exact = np.trapezoid(*roc_curve(labels, logits)[1::-1])
    assert area == pytest.approx(exact, abs=1e-3)  # 400 points of a curve of 6,000


def test_precision_recall_points_lie_on_the_exact_curve(scored) -> None:
    logits, labels, curves = scored
    precision, recall, thresholds = precision_recall_curve(labels, logits)
    exact = {threshold: (r, p) for p, r, threshold in zip(precision, recall, thresholds, strict=False)}
    thin = curves.precision_recall
    points = list(zip(thin["recall"], thin["precision"], thin["threshold"], strict=True))
    assert points[0] == (0.0, 1.0, None)
    assert points[-1][0] == 1.0
    assert len(points) <= 400
    for r, p, threshold in points[1:]:
        assert (r, p) == pytest.approx(exact[threshold], abs=1e-12)


def test_few_scores_give_every_point() -> None:
    _, curves = evaluate_scores(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0, 1, 0, 1]), SingleComm())
    assert curves.roc["threshold"] == [None, 3.0, 2.0, 1.0, 0.0]
    assert curves.roc["true_positive_rate"] == [0.0, 0.5, 0.5, 1.0, 1.0]
    assert curves.roc["false_positive_rate"] == [0.0, 0.0, 0.5, 0.5, 1.0]


def test_calibration_bins_add_up_to_the_rows(scored) -> None:
    logits, labels, curves = scored
    bins = {name: np.array(values) for name, values in curves.calibration.items()}
    assert bins["count"].sum() == logits.size
    assert (bins["count"] * bins["observed_rate"]).sum() == pytest.approx(labels.sum(), rel=1e-12)
    sums = (bins["count"] * bins["mean_prediction"]).sum()
    assert sums == pytest.approx((1 / (1 + np.exp(-logits))).sum(), rel=1e-12)
    assert np.all(np.diff(bins["mean_prediction"]) > 0)


def test_calibration_bins_follow_the_sorted_rows(rng) -> None:
    logits = rng.permutation(np.linspace(-4, 4, 2_000))
    labels = rng.integers(0, 2, 2_000)
    _, curves = evaluate_scores(logits, labels, SingleComm())
    order = np.argsort(logits).reshape(20, 100)
    assert curves.calibration["observed_rate"] == pytest.approx(labels[order].mean(axis=1), abs=1e-12)
    expected = (1 / (1 + np.exp(-logits)))[order].mean(axis=1)
    assert curves.calibration["mean_prediction"] == pytest.approx(expected, rel=1e-12)


def test_histogram_counts_each_class(scored) -> None:
    logits, labels, curves = scored
    edges = np.array(curves.histogram["edges"])
    assert len(edges) == 51
    clipped = np.clip(logits, edges[0], edges[-1])
    inner = slice(1, -1)  # rounding may part rows on an edge from NumPy's bins only where scores are tied
    for name, wanted in (("positives", 1), ("negatives", 0)):
        counts = np.array(curves.histogram[name])
        assert counts.sum() == (labels == wanted).sum()
        expected = np.histogram(clipped[labels == wanted], edges)[0]
        if len(np.unique(logits)) == logits.size:
            assert np.array_equal(counts[inner], expected[inner])


def test_one_stray_score_does_not_squeeze_the_histogram(rng) -> None:
    logits = np.append(rng.normal(0, 1, 10_000), 1e6)
    _, curves = evaluate_scores(logits, rng.integers(0, 2, logits.size), SingleComm())
    assert curves.histogram["edges"][-1] < 5
    assert sum(curves.histogram["positives"]) + sum(curves.histogram["negatives"]) == logits.size


def test_curves_are_json(scored) -> None:
    curves = scored[2]
    values = curves.to_values()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
