"""Histograms to look at, and drift between splits, against plain counting."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.check import figures, tally
from pipeline.check.figures import BIN_EDGES, drift, finite_counts, grouped, histogram, quantile_groups


def counted(values: np.ndarray) -> np.ndarray:
    """``finite_counts`` of values."""
    column = values.astype(np.float32).reshape(-1, 1)
    bins = np.zeros((1, tally.VALUE_BINS), np.int64)
    tally.tally_dense(column, column.view(np.int32), bins, np.zeros((1, 2)), np.zeros((1, 2), np.float32))
    return finite_counts(bins[0])


def test_every_value_falls_between_the_edges_of_its_bin(rng: np.random.Generator) -> None:
    assert (np.diff(BIN_EDGES) > 0).all()
    sizes = 10.0 ** rng.uniform(-44, 38, 300)
    for value in (*sizes, *-sizes, 0.0, 1.0, -1.0, 3.4028234e38):
        [place] = np.flatnonzero(counted(np.array([value])))
        stored = float(np.float32(value))
        assert BIN_EDGES[place] <= stored <= BIN_EDGES[place + 1]
        assert abs(BIN_EDGES[place + 1] - BIN_EDGES[place]) <= max(abs(stored) / 31, 1e-39)


def test_values_that_are_not_finite_stay_out() -> None:
    assert counted(np.array([np.nan, np.inf, -np.inf, 2.0])).sum() == 1


def test_a_histogram_is_that_of_the_values(rng: np.random.Generator) -> None:
    values = rng.normal(3, 2, 40_000).astype(np.float32)
    found = histogram({"train": counted(values)}, counts=False, low=float(values.min()), high=float(values.max()))
    edges, shares = np.array(found["edges"]), np.array(found["shares"]["train"])
    assert shares.sum() == pytest.approx(1)
    inner = np.clip(values, edges[0], np.nextafter(edges[-1], -np.inf))
    wanted, _ = np.histogram(inner, edges)
    # Bins of 3 % of a value are divided evenly: next to an edge that much may be on the other side.
    np.testing.assert_allclose(np.cumsum(shares), np.cumsum(wanted) / values.size, atol=0.01)


def test_single_values_are_not_smeared() -> None:
    found = histogram({"a": counted(np.array([0.0] * 60 + [1.0] * 40))}, counts=False, low=0, high=1)
    shares = found["shares"]["a"]
    assert shares[0] == pytest.approx(0.6)
    assert sum(shares[:2]) == pytest.approx(0.6)
    assert sum(shares[-2:]) == pytest.approx(0.4)


@pytest.mark.parametrize("value", [0.0, -7.5, 1e30, -3e38])
def test_one_value_alone_still_makes_a_histogram(value: float) -> None:
    found = histogram({"a": counted(np.full(5, value))}, counts=False, low=value, high=value)
    assert np.isfinite(found["edges"]).all()
    assert sum(found["shares"]["a"]) == pytest.approx(1)


def test_counts_are_shown_as_training_reads_them() -> None:
    found = histogram({"a": counted(np.array([-5.0, 0, 9, 99]))}, counts=True, low=-5, high=99)
    assert found["edges"][0] == pytest.approx(0, abs=1e-6)
    assert found["edges"][-1] == pytest.approx(np.log(100), abs=0.05)
    assert found["shares"]["a"][0] == pytest.approx(0.5)


def test_no_values_make_no_histogram() -> None:
    nothing = np.zeros_like(counted(np.array([1.0])))
    assert histogram({"a": nothing}, counts=False, low=np.inf, high=-np.inf) == {}
    assert drift(nothing, nothing) is None


def test_drift_is_the_index_less_chance(rng: np.random.Generator) -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    index = float(((q - p) * np.log(q / p)).sum())
    assert drift((p * 1e9).astype(np.int64), (q * 1e9).astype(np.int64)) == pytest.approx(index, rel=1e-6)
    same = rng.multinomial(100_000, [1 / 128] * 128), rng.multinomial(2_000, [1 / 128] * 128)
    # Without drift the index times 1 / (1/n + 1/m) is about chi-squared with 127 degrees: 15 sigmas are 0.12.
    assert drift(*same) < 0.15
    assert drift(same[0], np.roll(np.arange(128), 3) * 10) > 0.3


def test_quantile_groups_hold_about_a_twentieth_each(rng: np.random.Generator) -> None:
    reference = counted(rng.normal(size=50_000))
    groups = quantile_groups(reference)
    sums = grouped(reference, groups)
    assert sums.sum() == 50_000
    assert (np.diff(groups) >= 0).all()
    assert sums.max() < 0.09 * 50_000  # a bin of 3 % of the value is not divided
    other = counted(rng.normal(0.8, 1, 50_000))
    assert drift(sums, grouped(other, groups)) > 0.25
    assert drift(sums, grouped(counted(rng.normal(size=50_000)), groups)) < 0.05


def test_as_trained() -> None:
    np.testing.assert_allclose(figures.as_trained(np.array([-3.0, 0, 1]), counts=True), [0, 0, np.log(2)])
    assert figures.as_trained(-3.0, counts=False) == -3.0
