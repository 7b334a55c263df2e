"""Compiled counts agree with their references, on fresh rows with every kind of wrong value among them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.check import tally, tally_numba
from pipeline.check.tally import FULL, GROUPS, HEAD, SINGLES, VALUE_BINS


def both(name: str, inputs: list[Any], changed: list[int]) -> None:
    """Call reference and compiled function on copies; results and changed arrays must be equal."""
    outcomes = []
    for module in (tally, tally_numba):
        arguments = [value.copy() if number in changed else value for number, value in enumerate(inputs)]
        result = getattr(module, name)(*arguments)
        outcomes.append((result, [arguments[number] for number in changed]))
    (one, ones), (other, others) = outcomes
    assert np.array_equal(one, other)
    for mine, theirs in zip(ones, others, strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-12, atol=0)


@pytest.mark.parametrize("one", [1, 0x3F80_0000])
def test_labels(rng: np.random.Generator, one: int) -> None:
    words = rng.integers(0, 2, (700, 5)).astype(np.int32) * one
    both("tally_labels", [words[:, 0], one, np.zeros(3, np.int64)], [2])
    words[rng.integers(0, 700, 9), 0] = 7
    both("tally_labels", [words[:, 0], one, rng.integers(0, 9, 3)], [2])


def test_dense(rng: np.random.Generator) -> None:
    values = (rng.normal(size=(900, 6)) * 10.0 ** rng.integers(-40, 30, (900, 6))).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = 0
    for wrong in (np.nan, np.inf, -np.inf):
        values[rng.integers(0, 900, 3), rng.integers(0, 6, 3)] = wrong
    extremes = np.tile(np.array([np.inf, -np.inf], np.float32), (4, 1))
    part = values[:, 1:5]
    both("tally_dense", [part, part.view(np.int32), np.zeros((4, VALUE_BINS), np.int64), np.zeros((4, 2)), extremes],
         [2, 3, 4])  # fmt: skip


def key_inputs(rng: np.random.Generator, *, wide: bool, learn: bool, missing: bool) -> list[Any]:
    table_rows = np.array([3, HEAD + 5000, 40, 2**31 if not wide else 2**40])
    shifts = np.array([0, 2, 0, 18 if not wide else 27])
    columns = np.array([2, 3, 5, 6, 7])
    sizes = np.minimum(table_rows, HEAD) + (np.maximum(table_rows - HEAD, 0) >> shifts) + 1
    keys = np.concatenate(
        [rng.integers(-1, rows, (600, 2 if t == 1 else 1)) for t, rows in enumerate(table_rows)], axis=1
    )
    keys[rng.random(keys.shape) < 0.2] = 0
    tail = rng.random((600, 2)) < 0.5
    keys[:, 1:3][tail] = HEAD + 4 * rng.integers(0, 1250, int(tail.sum()))
    keys[rng.integers(0, 600, 5), rng.integers(0, 5, 5)] = [-2, 2**31 - 1, -1, 3, -(2**31)]
    words = rng.integers(0, 2**31, (600, 20)).astype(np.int32)
    place = 1 + 2 * (2 if wide else 1)
    stored = keys.astype(np.int64 if wide else np.int32).view(np.int32)
    words[:, place : place + stored.shape[1]] = stored
    counters = rng.choice(np.array([0, 1, 5, FULL - 1, FULL], np.uint16), int(sizes.sum()))
    return [words, 1, wide, columns, table_rows, missing, np.cumsum(sizes) - sizes, shifts, learn, counters,
            np.zeros((4, 4), np.int64), np.zeros((4, GROUPS), np.int64), np.zeros(600 * 5, np.int64)]  # fmt: skip


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_keys(rng: np.random.Generator, wide: bool, learn: bool, missing: bool) -> None:
    inputs = key_inputs(rng, wide=wide, learn=learn, missing=missing)
    results = []
    for module in (tally, tally_numba):
        arguments = [value.copy() if isinstance(value, np.ndarray) else value for value in inputs]
        row, column, full = module.tally_keys(*arguments)
        counters, totals, groups, carried = arguments[9:]
        results.append([[row, column, full], counters, totals, groups, np.sort(carried[:full])])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    assert results[0][2].sum() >= 600 * 5  # every key was taken for something
    assert results[0][0][2] > 0 or not learn  # some counters were full


def test_keys_that_are_sound_have_no_fault(rng: np.random.Generator) -> None:
    words = rng.integers(0, 9, (50, 3)).astype(np.int32)
    rest = [np.zeros((2, 4), np.int64), np.zeros((2, GROUPS), np.int64), np.zeros(100, np.int64)]
    for module in (tally, tally_numba):
        counters = np.zeros(18, np.uint16)
        found = module.tally_keys(words, 1, False, np.array([0, 1, 2]), np.array([9, 9]), False, np.array([0, 9]),
                                  np.zeros(2, np.int64), True, counters, *rest)  # fmt: skip
        assert found == (-1, -1, 0)
        np.testing.assert_array_equal(counters[9:], np.bincount(words[:, 2], minlength=9))


@pytest.mark.parametrize("wide", [False, True])
def test_weights(rng: np.random.Generator, wide: bool) -> None:
    keys = rng.integers(-1, 3, (400, 3)).astype(np.int64 if wide else np.int32)
    weights = rng.normal(size=(400, 3)).astype(np.float32)
    weights[rng.random(weights.shape) < 0.05] = np.nan
    weights[7, 0], keys[7, 0] = -np.inf, 2
    words = np.concatenate([np.zeros((400, 1), np.int32), keys.view(np.int32), weights.view(np.int32)], axis=1)
    place = 1 + (6 if wide else 3)
    both("tally_weights", [words, 1, wide, np.array([0, 1, 3]), place, np.zeros(2, np.int64)], [5])


def test_groups_of_the_first_keys_are_their_own(rng: np.random.Generator) -> None:
    np.testing.assert_array_equal(tally.key_groups(np.arange(SINGLES)), np.arange(SINGLES))
    others = tally.key_groups(rng.integers(SINGLES, 2**40, 10_000))
    assert (others >= SINGLES).all()
    assert (others < GROUPS).all()
    assert len(np.unique(others)) == GROUPS - SINGLES  # a group missed by 10,000 keys: 64 (63/64)^10000 < 1e-66
