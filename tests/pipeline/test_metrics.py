"""Metrics against scikit-learn and against themselves on other numbers of ranks."""

from __future__ import annotations

import json
import math
import runpy
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, log_loss, roc_auc_score

from dlrm.errors import DataError
from embedding.comm import SingleComm
from pipeline.curves import CALIBRATION_BINS
from pipeline.metrics import Metrics, evaluate_scores
from pipeline.ranking import rank_scores

on_ranks = runpy.run_path(str(Path(__file__).with_name("thread_ranks.py")))["run_ranks"]

# Equal to the judge up to the rounding of float64 sums.
TOLERANCE = 1e-12


def predictions(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def click_data(rng, rows, *, decimals=None, dtype=np.float32, shift=-2.0):
    """Logits of a useful model, in steps of 10^-decimals so that many are equal."""
    logits = rng.normal(shift, 1.5, rows)
    labels = (rng.random(rows) < predictions(logits)).astype(np.int32)
    if decimals is not None:
        logits = np.round(logits, decimals)
    return logits.astype(dtype), labels


def evaluate(logits, labels):
    return evaluate_scores(logits, labels, SingleComm())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decimals", [None, 2, 0])
def test_metrics_equal_scikit_learn(rng, dtype, decimals) -> None:
    logits, labels = click_data(rng, 5_000, decimals=decimals, dtype=dtype)
    metrics, curves = evaluate(logits, labels)
    p = predictions(logits)
    assert metrics.auc == pytest.approx(roc_auc_score(labels, logits), abs=TOLERANCE)
    assert metrics.log_loss == pytest.approx(log_loss(labels, p), rel=TOLERANCE)
    assert metrics.accuracy == pytest.approx(accuracy_score(labels, logits > 0), abs=TOLERANCE)
    assert curves.average_precision == pytest.approx(average_precision_score(labels, logits), abs=TOLERANCE)
    rate = labels.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert metrics.base_rate == pytest.approx(rate, rel=TOLERANCE)
    assert metrics.normalized_entropy == pytest.approx(log_loss(labels, p) / entropy, rel=TOLERANCE)
    assert metrics.calibration == pytest.approx(p.mean() / rate, rel=TOLERANCE)
    assert (metrics.samples, metrics.positives) == (5_000, labels.sum())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.one_of(st.sampled_from([-1.0, -0.0, 0.0, 0.5]), st.floats(-40, 40)), st.booleans()),
        min_size=1,
        max_size=40,
    )
)
def test_auc_is_the_share_of_pairs_in_order(rows) -> None:
    pairs = [(p > n) + Fraction(p == n, 2) for p, y in rows if y for n, other in rows if not other]
    metrics, _ = evaluate(np.array([z for z, _ in rows]), np.array([y for _, y in rows]))
    assert metrics.auc == (float(sum(pairs) / len(pairs)) if pairs else None)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("decimals", [None, 1])
def test_ranks_change_no_bit(rng, size, decimals) -> None:
    logits, labels = click_data(rng, 3_001, decimals=decimals)
    expected = evaluate(logits, labels)
    order = rng.permutation(logits.size)
    cuts = np.sort(rng.integers(0, logits.size, size - 1))
    parts = np.split(order, cuts)
    results = on_ranks(size, lambda comm: evaluate_scores(logits[parts[comm.rank]], labels[parts[comm.rank]], comm))
    for metrics, curves in results:
        assert metrics == expected[0]
        assert curves == expected[1]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_ranks_with_any_number_of_rows_agree(data) -> None:
    size = data.draw(st.integers(2, 4))
    row = st.tuples(st.one_of(st.sampled_from([-1.0, 0.0, 2.0]), st.floats(-50, 50, width=32)), st.booleans())
    parts = [data.draw(st.lists(row, max_size=12)) for _ in range(size)]

    def arrays(rows):
        return np.array([z for z, _ in rows], np.float32), np.array([y for _, y in rows], np.int32)

    expected = evaluate(*arrays([row for part in parts for row in part]))
    assert on_ranks(size, lambda comm: evaluate_scores(*arrays(parts[comm.rank]), comm)) == [expected] * size


def test_a_rank_in_the_other_precision_is_widened(rng) -> None:
    logits, labels = click_data(rng, 400)
    halves = [(logits[:200], labels[:200]), (logits[200:].astype(np.float64), labels[200:])]
    expected = evaluate(logits, labels)
    assert on_ranks(2, lambda comm: evaluate_scores(*halves[comm.rank], comm)) == [expected] * 2


@pytest.mark.parametrize("cuts", [(10_000, 20_000, 30_000), (36_000, 36_000, 38_000)], ids=["even", "uneven"])
def test_work_is_shared_between_ranks(rng, cuts) -> None:
    # Sorted input is the hard case: every rank's rows belong to few ranges.
    logits, labels = click_data(rng, 40_000)
    parts = np.split(np.argsort(logits), cuts)
    ranges = on_ranks(4, lambda comm: rank_scores(logits[parts[comm.rank]], labels[parts[comm.rank]], comm))
    sizes = [ranking.groups.scores.size for ranking in ranges]
    assert max(sizes) < 1.2 * np.mean(sizes)
    joined = np.concatenate([ranking.groups.scores for ranking in ranges])
    assert np.array_equal(joined, np.unique(logits))


def test_row_order_changes_no_bit(rng) -> None:
    logits, labels = click_data(rng, 2_000, dtype=np.float64)
    order = rng.permutation(logits.size)
    assert evaluate(logits, labels) == evaluate(logits[order], labels[order])


def test_extreme_logits_neither_clip_nor_overflow() -> None:
    metrics, _ = evaluate(np.array([800.0, -700.0, 3e38]), np.array([0, 1, 1]))
    assert metrics.log_loss == pytest.approx((800 + 700) / 3, rel=TOLERANCE)
    right, _ = evaluate(np.array([1e30, 0.25, -0.25]), np.array([1, 1, 0]))
    assert right.log_loss == pytest.approx(2 * math.log1p(math.exp(-0.25)) / 3, rel=TOLERANCE)
    huge, curves = evaluate(np.array([1.7e308, -1.7e308]), np.array([0, 1]))
    assert huge.log_loss == pytest.approx(1.7e308, rel=TOLERANCE)
    assert sum(curves.histogram["positives"]) == 1
    json.dumps(curves.to_values(), allow_nan=False)


def test_saturated_predictions_still_count_in_the_auc() -> None:
    # In float32 all of these probabilities are 1; their logits differ.
    logits, labels = np.array([40, 41, 42, 43], np.float32), np.array([0, 1, 0, 1])
    assert evaluate(logits, labels)[0].auc == 0.75


def test_no_rows_define_nothing() -> None:
    empty = Metrics(
        auc=None,
        log_loss=None,
        normalized_entropy=None,
        calibration=None,
        accuracy=None,
        base_rate=None,
        samples=0,
        positives=0,
    )
    for size in (1, 2):
        for metrics, curves in on_ranks(size, lambda comm: evaluate_scores(np.empty(0, np.float32), [], comm)):
            assert metrics == empty
            assert set(curves.to_values().values()) == {None}


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_defines_what_it_can(label) -> None:
    metrics, curves = evaluate(np.array([0.5, -1.0, 2.0]), np.full(3, label))
    p = predictions([0.5, -1.0, 2.0])
    assert metrics.auc is None
    assert metrics.normalized_entropy is None
    assert metrics.log_loss == pytest.approx(-np.log(p if label else 1 - p).mean(), rel=TOLERANCE)
    assert metrics.base_rate == label
    if label:
        assert metrics.calibration == pytest.approx(p.mean(), rel=TOLERANCE)
    else:
        assert metrics.calibration is None
    assert curves.roc is None
    assert curves.precision_recall is None
    assert curves.average_precision is None
    assert sum(curves.calibration["count"]) == 3
    json.dumps({**metrics.to_values(), **curves.to_values()}, allow_nan=False)


def test_a_constant_model_scores_one_half(rng) -> None:
    labels = rng.integers(0, 2, 101)
    labels[:2] = 0, 1
    metrics, curves = evaluate(np.full(101, math.log(0.25 / 0.75)), labels)
    assert metrics.auc == 0.5
    assert metrics.calibration == pytest.approx(0.25 / labels.mean(), rel=TOLERANCE)
    assert curves.calibration["count"] == [101]
    assert curves.average_precision == pytest.approx(labels.mean(), rel=TOLERANCE)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_that_are_no_numbers_are_refused_on_every_rank(rng, bad, dtype) -> None:
    logits, labels = click_data(rng, 300, dtype=dtype)
    logits[rng.integers(150, 300)] = bad
    parts = [slice(0, 150), slice(150, 300)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = on_ranks(2, lambda comm: evaluate_scores(logits[parts[comm.rank]], labels[parts[comm.rank]], comm))
    for result in results:
        assert isinstance(result, DataError)
        assert "1 of 150 scores on rank 1 are NaN or infinite" in str(result)


@pytest.mark.parametrize("bad", [2, -1, 0.5, math.nan])
def test_labels_other_than_0_and_1_are_refused(bad) -> None:
    with pytest.raises(DataError, match="1 of 3 labels on rank 0 are neither 0 nor 1"):
        evaluate(np.zeros(3, np.float32), np.array([0, 1, bad]))


def test_missing_labels_are_refused() -> None:
    with pytest.raises(DataError, match="3 scores but 2 labels"):
        evaluate(np.zeros(3, np.float32), np.array([0, 1]))


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float32])
def test_labels_may_have_any_number_type(rng, dtype) -> None:
    logits, labels = click_data(rng, 200)
    assert evaluate(logits, labels.astype(dtype)) == evaluate(logits, labels)


def test_bins_hold_equal_counts(rng) -> None:
    _, curves = evaluate(*click_data(rng, 10_000, dtype=np.float64))
    assert curves.calibration["count"] == [10_000 / CALIBRATION_BINS] * CALIBRATION_BINS
