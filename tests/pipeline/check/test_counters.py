"""Counters: exact beyond 16 bits, every n-th row where memory is short, and what they tell of a table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.errors import ConfigError
from pipeline.check import tally_numba
from pipeline.check.counters import Counters, Levels, fitted_exponent, plot_ranks
from pipeline.check.tally import FULL, GROUPS, HEAD, key_groups


def count(counters: Counters, table: int, keys: np.ndarray) -> None:
    """Count keys of one table."""
    part = slice(table, table + 1)
    carried = np.empty(keys.size, np.int64)
    words = keys.astype(np.int64).view(np.int32).reshape(-1, 2)
    *fault, full = tally_numba.tally_keys(
        words, 0, True, np.array([0, 1]), counters.table_rows[part], False,
        counters.starts[part], counters.shifts[part], True, counters.values, np.zeros((1, 4), np.int64),
        np.zeros((1, GROUPS), np.int64), carried,
    )  # fmt: skip
    assert fault == [-1, -1]
    counters.carry(carried[:full])


def levels_of(counts: np.ndarray) -> Levels:
    values, sizes = np.unique(counts[counts > 0], return_counts=True)
    return Levels(values[::-1].astype(np.int64), sizes[::-1].astype(np.int64))


def test_counts_are_exact_beyond_16_bits(rng: np.random.Generator) -> None:
    wanted = [rng.integers(0, 50, 7), np.array([0, 3 * FULL + 5, FULL, FULL + 1, 2 * FULL, 1])]
    counters = Counters([7, 6], 1 << 20)
    for table, counts in enumerate(wanted):
        keys = rng.permutation(np.repeat(np.arange(counts.size), counts))
        for part in np.array_split(keys, 3):
            count(counters, table, part)
    for table, counts in enumerate(wanted):
        [(rows, found, stands_for)] = counters.pieces(table)
        np.testing.assert_array_equal(rows, np.arange(counts.size))
        np.testing.assert_array_equal(found, counts)
        assert stands_for == 1
        levels, exact = counters.levels(table), levels_of(counts)
        np.testing.assert_array_equal(levels.counts, exact.counts)
        np.testing.assert_array_equal(levels.sizes, exact.sizes)
        assert (levels.seen, levels.lookups) == (np.count_nonzero(counts), counts.sum())
        groups = np.bincount(key_groups(np.arange(counts.size)), weights=counts, minlength=GROUPS)
        np.testing.assert_array_equal(counters.groups(table), groups)


def test_rows_beyond_the_first_are_counted_every_nth_where_memory_is_short(rng: np.random.Generator) -> None:
    rows = HEAD + 100_001
    counters = Counters([rows, 50], 2 * (HEAD + 50 + 30_000))
    assert counters.shifts.tolist() == [2, 0]
    counts = rng.integers(0, 9, rows)
    count(counters, 0, np.repeat(np.arange(rows), counts))
    found = {int(row): (int(one), stands) for part, ones, stands in counters.pieces(0)
             for row, one in zip(part, ones, strict=True)}  # fmt: skip
    assert sorted(found) == [*range(HEAD), *range(HEAD, rows, 4)]
    assert all(one == counts[row] and stands == (1 if row < HEAD else 4) for row, (one, stands) in found.items())
    assert counters.levels(0).lookups == counts[:HEAD].sum() + 4 * counts[HEAD::4].sum()


def test_a_budget_below_the_first_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory limit: leaves 0 MiB .* 2 tables need at least 0 MiB"):
        Counters([HEAD * 9, 3], 2 * HEAD)
    assert Counters([HEAD * 9, 3], 2 * (HEAD + 3) + 2).shifts[0] == 19


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.integers(1, 50))
@settings(deadline=None)
def test_counts_and_shares_by_rank(counts: list[int], rank: int) -> None:
    ordered = np.sort(counts)[::-1]
    levels = levels_of(ordered)
    ranks = np.array([rank])
    assert levels.count_at(ranks)[0] == (ordered[rank - 1] if rank <= ordered.size else 0)
    if ordered.sum():
        assert levels.share_of(ranks)[0] == pytest.approx(ordered[:rank].sum() / ordered.sum(), abs=1e-12)


@pytest.mark.parametrize("exponent", [0.5, 1.1, 2.0])
def test_the_exponent_of_a_power_law_is_found_whatever_single_rows_do(exponent: float) -> None:
    counts = np.rint(1e7 * np.arange(1, 2001) ** -exponent).astype(np.int64)
    assert fitted_exponent(levels_of(counts)) == pytest.approx(exponent, abs=0.01)
    counts[0] *= 300
    assert fitted_exponent(levels_of(counts)) == pytest.approx(exponent, abs=0.02)


def test_too_few_rows_have_no_exponent() -> None:
    assert fitted_exponent(levels_of(np.array([900, 80, 20, 9, 9, 9, 9, 9, 9, 9]))) is None
    assert fitted_exponent(levels_of(np.array([0]))) is None


def test_an_order_of_frequency_that_counts_contradict_is_seen(rng: np.random.Generator) -> None:
    rows = 3000
    falling = np.sort(rng.poisson(1000 / np.sqrt(1 + np.arange(rows))))[::-1]
    for swapped in (None, (10, 2900)):
        counts = falling.copy()
        if swapped:
            counts[list(swapped)] = counts[list(swapped)[::-1]]
        counts[0] = 3  # the row of rare values stands apart
        counters = Counters([rows], 1 << 20)
        count(counters, 0, np.repeat(np.arange(rows), counts))
        found = counters.disorder(0)
        if swapped is None:
            assert found is None
        else:
            assert found is not None
            earlier, less, later, more = found
            assert earlier < later
            assert (less, more) == (counts[earlier], counts[later])
            assert more > less


def test_chance_among_rows_of_equal_probability_is_no_disorder(rng: np.random.Generator) -> None:
    counters = Counters([200_000], 1 << 20)
    count(counters, 0, rng.integers(0, 200_000, 2_000_000))
    assert counters.disorder(0) is None  # 10 sigmas and more off, in 200,000 rows: below 1e-12


def test_ranks_of_a_plot() -> None:
    assert plot_ranks(0).tolist() == [1]
    assert plot_ranks(5).tolist() == [1, 2, 3, 4, 5]
    assert plot_ranks(10**8)[-1] == 10**8
