"""Computed permutations: one to one, the same in any piece, compiled as in NumPy, and without a pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import permutation, permutation_numba
from pipeline.permutation import ROUNDS
from pipeline.row_order import RowOrder


def order_of(size: int, keys: Any, start: int = 0, stop: int | None = None, module: Any = permutation_numba) -> Any:
    out = np.full((size if stop is None else stop) - start, -1, np.int64)
    module.permute(start, keys, size, out)
    return out


def drawn_keys(rng: np.random.Generator) -> Any:
    return rng.integers(0, 1 << 32, ROUNDS, dtype=np.uint32)


@given(size=st.integers(2, 3000), seed=st.integers(0, 2**32), data=st.data())
@settings(deadline=None)
def test_every_number_comes_once_and_pieces_fit(size: int, seed: int, data: st.DataObject) -> None:
    keys = drawn_keys(np.random.default_rng(seed))
    whole = order_of(size, keys)
    np.testing.assert_array_equal(np.sort(whole), np.arange(size))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    np.testing.assert_array_equal(order_of(size, keys, start, stop), whole[start:stop])


@pytest.mark.parametrize("size", [2, 3, 65_537, 1 << 31, (1 << 33) + 5, 1 << 62])
def test_compiled_is_the_reference(rng: np.random.Generator, size: int) -> None:
    keys = drawn_keys(rng)
    start = int(rng.integers(0, max(1, size - 999)))
    ends = start, min(size, start + 999)
    expected = order_of(size, keys, *ends, module=permutation)
    np.testing.assert_array_equal(order_of(size, keys, *ends), expected)
    assert expected.min() >= 0
    assert expected.max() < size


def test_a_million_rows_lie_without_a_pattern(rng: np.random.Generator) -> None:
    """Of a random order: place and number, and numbers of neighbours, are uncorrelated; batches hold their share of
    every part of the file; few neighbours stay neighbours. Six standard errors each."""
    size = 1_000_003
    order = order_of(size, drawn_keys(rng))
    places = np.arange(size)
    assert abs(np.corrcoef(places, order)[0, 1]) < 6 / np.sqrt(size)
    for distance in (1, 2, 3, 64):
        assert abs(np.corrcoef(order[:-distance], order[distance:])[0, 1]) < 6 / np.sqrt(size)
    counts = np.histogram2d(places, order, bins=100)[0]  # 100 rows a cell, hypergeometric
    chi = ((counts - size / 1e4) ** 2).sum() / (size / 1e4)
    assert abs(chi - 99**2) < 6 * np.sqrt(2) * 99
    assert np.count_nonzero(np.diff(order) == 1) < 1 + 6 * np.sqrt(1) + 6


def test_keys_give_orders_that_have_nothing_in_common(rng: np.random.Generator) -> None:
    """Two orders agree in one place on average (Poisson: more than 14 less often than once in 10^10)."""
    orders = [order_of(100_000, drawn_keys(rng)) for _ in range(4)]
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert np.count_nonzero(order == other) < 15


class Shards:
    name = "x"
    shards = (150_000, 200_001)
    rows = sum(shards)

    def will_need(self, start: int, stop: int) -> None:
        assert 0 <= start < stop <= self.rows


@pytest.mark.parametrize("block", [1, 2])
def test_large_windows_are_visited_in_the_documented_order(rng: np.random.Generator, block: int) -> None:
    seed, window = int(rng.integers(0, 2**63)), 150_000
    firsts, stops = [0, 150_000, 300_000], [150_000, 300_000, 350_001]

    def generator(stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, stream, 2]))

    expected = []
    for w in generator(0).permutation(3):
        count = -(-(stops[w] - firsts[w]) // block)
        if count <= 1 << 16:
            blocks = generator(1 + w).permutation(count)
        else:
            blocks = order_of(count, generator(1 + w).integers(0, 1 << 32, ROUNDS, dtype=np.uint32), module=permutation)
        rows = firsts[w] + blocks[:, None] * block + np.arange(block)
        expected.append(rows[rows < stops[w]])
    order = RowOrder(Shards(), seed=seed, shuffle=True, window=window, block=block)
    whole = np.concatenate(expected)
    np.testing.assert_array_equal(order.rows(2, 0, Shards.rows), whole)
    start = int(rng.integers(0, Shards.rows - 70_000))
    np.testing.assert_array_equal(order.rows(2, start, start + 70_000), whole[start : start + 70_000])
