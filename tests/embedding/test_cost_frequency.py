"""Row frequencies: counting, binning, distinct rows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.errors import ConfigError
from embedding.frequency import (
    Frequency,
    RowCounts,
    bin_edges,
    candidate_thresholds,
    count_batches,
    frequency_order,
    hugectr_threshold,
    is_descending,
)
from embedding.jagged import Jagged
from pipeline.synthetic import key_probabilities


@given(rows=st.integers(1, 10**12))
def test_bins_cover_all_rows_once(rows: int) -> None:
    edges = bin_edges(rows)
    assert edges[0] == 0
    assert edges[-1] == rows
    assert (np.diff(edges) > 0).all()
    assert len(edges) < 1000
    assert (np.diff(edges)[:64] == 1).all()


@given(rows=st.integers(1, 10**10))
def test_candidate_thresholds_lie_inside(rows: int) -> None:
    found = candidate_thresholds(rows)
    assert found == sorted(set(found))
    assert all(0 < threshold < rows for threshold in found)
    assert rows < 3 or max(found) * 1.5 >= rows - 1


def jagged_batch(rng: np.random.Generator, rows: list[int], num_rows: int) -> Jagged:
    lengths = rng.integers(0, 4, len(rows) * num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    per_table = lengths.reshape(len(rows), num_rows).sum(axis=1)
    keys = np.concatenate([rng.integers(0, size, n) for size, n in zip(rows, per_table, strict=True)])
    return Jagged(keys, offsets, None, len(rows), num_rows)


def test_counts_are_those_of_the_keys(rng: np.random.Generator) -> None:
    rows = [5, 5000, 3]
    batches = [jagged_batch(rng, rows, n) for n in (17, 0, 40)]
    one_hot = Jagged(np.concatenate([rng.integers(0, size, 9) for size in rows]), None, None, 3, 9)
    counts = count_batches(rows, [*batches, one_hot])
    assert counts.samples == 17 + 40 + 9
    for table, size in enumerate(rows):
        pieces = [b.keys[b.offsets[table * b.num_rows] : b.offsets[(table + 1) * b.num_rows]] for b in batches]
        expected = np.bincount(np.concatenate([*pieces, one_hot.keys[9 * table : 9 * table + 9]]), minlength=size)
        held = counts.counts[table]
        assert (held == expected[: len(held)]).all()
        assert not expected[len(held) :].any()
        assert counts.mean_hotness(table) == expected.sum() / counts.samples
        frequency = counts.frequency(table)
        assert frequency.total == expected.sum()
        assert frequency.at(frequency.shares(), size) == pytest.approx(1)


def test_nothing_counted_is_even() -> None:
    frequency = RowCounts([1000]).frequency(0)
    assert frequency.at(frequency.shares(), 250) == pytest.approx(0.25)


def test_order_is_by_descending_count_and_stable(rng: np.random.Generator) -> None:
    counts = rng.integers(0, 5, 40).astype(np.int32)
    order = frequency_order(counts, 50)
    assert sorted(order.tolist()) == list(range(50))
    assert is_descending(counts[order[order < 40]])
    for earlier, later in itertools.pairwise(order):
        if later < 40 and earlier < 40 and counts[earlier] == counts[later]:
            assert earlier < later
    assert (order[40:] >= 0).all()


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.3])
def test_the_power_law_is_that_of_the_generator(exponent: float) -> None:
    rows = 20_000
    expected = key_probabilities(rows, exponent)
    frequency = Frequency.power_law(rows, exponent)
    for threshold in (1, 64, 1000, rows):
        assert frequency.at(frequency.shares(), threshold) == pytest.approx(expected[:threshold].sum(), rel=2e-3)
    exact = 1 - (1 - expected) ** 5000
    assert frequency.distinct(5000)[-1] == pytest.approx(exact.sum(), rel=2e-3)


def test_distinct_rows_from_few_counted_batches_are_unbiased(rng: np.random.Generator) -> None:
    """The plug-in estimate would miss by far more: most rows of a batch are in no other."""
    rows, draws = 200_000, 4000
    law = key_probabilities(rows, 0.8)
    estimates, plug_in = [], []
    for _ in range(5):
        counts = np.bincount(rng.choice(rows, 8 * draws, p=law), minlength=rows)
        estimates.append(Frequency.from_counts(counts, rows).distinct(draws)[-1])
        plug_in.append((1 - (1 - counts / counts.sum()) ** draws).sum())
    truth = (1 - (1 - law) ** draws).sum()
    assert np.mean(estimates) == pytest.approx(truth, rel=0.01)
    assert abs(np.mean(plug_in) / truth - 1) > 0.02


@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=30), share=st.floats(0, 1))
def test_rarefaction_is_the_exact_probability(counts: list[int], share: float) -> None:
    total = sum(counts)
    draws = max(1, round(share * total))
    if not total:
        return
    found = Frequency.from_counts(np.array(counts), len(counts)).distinct(draws)[-1]
    exact = sum(1 - math.comb(total - c, draws) / math.comb(total, draws) for c in counts)
    assert found == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 of them, for 2 rows"):
        Frequency.from_counts(np.array([1, 2, 3]), 2)
    with pytest.raises(ConfigError, match="at least 0"):
        Frequency.from_counts(np.array([1, -2]), 2)


def test_hugectr_threshold_follows_its_formula() -> None:
    counts = np.arange(1000, 0, -1)
    # 10 batches, 4 ranks, twice the rate: 10 * 4 * 2 * 0.5 * 4 / 3 = 53.3; counts 1000 .. 54 are 947 rows -> 948.
    assert hugectr_threshold(counts, batches=10, batch_size=64, ranks=4, bandwidth_ratio=2.0, efficiency=0.5) == 948
    # The same with N / (N - 1) = 2: at least 80, 921 rows -> 924.
    assert (
        hugectr_threshold(
            counts, batches=10, batch_size=64, ranks=4, nodes=2, communication="ib_nvlink_hier", bandwidth_ratio=2.0,
            efficiency=0.5,
        )
        == 924
    )  # fmt: skip
    # m = 16: 640 * sqrt(0.02 / 240) = 5.84; counts 1000 .. 6 are 995 rows -> 996.
    assert hugectr_threshold(counts, batches=10, batch_size=64, ranks=4, communication="nvlink_single_node") == 996
    assert hugectr_threshold(counts[-3:], batches=10, batch_size=64, ranks=4) == 0


def test_hugectr_threshold_needs_its_parties() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        hugectr_threshold(np.ones(3), batches=1, batch_size=8, ranks=1)
    with pytest.raises(ConfigError, match="more than one row"):
        hugectr_threshold(np.ones(3), batches=1, batch_size=2, ranks=2, communication="nvlink_single_node")
