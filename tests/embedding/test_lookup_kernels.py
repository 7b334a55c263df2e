"""Look-up: the compiled form and the reference against one bag at a time in float64."""

from __future__ import annotations

import numpy as np
import pytest

from dlrm.device import HostDevice
from embedding.lookup import bad_key, gather_pool

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
DEVICES = {"compiled": HostDevice(2), "reference": HostDevice(1, compiled=False)}
NO_OFFSETS, NO_WEIGHTS = np.empty(0, np.int64), np.empty(0, np.float32)


@pytest.mark.parametrize("form", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("key_dtype", ["int32", "int64"])
@pytest.mark.parametrize("hotness", [1, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_bag_is_the_sum_or_mean_of_its_rows(
    form: str, dtype: str, key_dtype: str, hotness: int, weighted: bool, rng: np.random.Generator
) -> None:
    rows, num_rows, dim = np.array([30, 4, 500]), 37, int(rng.integers(1, 40))
    bags = len(rows) * num_rows
    lengths = np.ones(bags, np.int64) if hotness == 1 else rng.integers(0, hotness + 1, bags)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    table_of_key = np.repeat(np.arange(bags) // num_rows, lengths)
    keys = rng.integers(0, rows[table_of_key]).astype(key_dtype)
    weights = rng.uniform(-2, 2, len(keys)).astype(np.float32) if weighted else NO_WEIGHTS
    weight = rng.standard_normal((rows.sum(), dim)).astype(dtype)
    row_start = np.cumsum(rows) - rows
    mean, place = np.array([True, False, True]), np.array([4, 0, 2])
    out = np.full((num_rows + 2, 5, dim), 8, dtype)

    given = NO_OFFSETS if hotness == 1 else offsets
    gather_pool(weight, row_start, keys, given, weights, mean, place, num_rows, out, device=DEVICES[form])

    expected = np.full(out.shape, 8.0)
    for table in range(len(rows)):
        for b in range(num_rows):
            bag = slice(offsets[table * num_rows + b], offsets[table * num_rows + b + 1])
            total = np.zeros(dim)
            for k in range(bag.start, bag.stop):
                factor = float(weights[k]) if weighted else 1.0
                total += factor * weight[row_start[table] + keys[k]].astype(np.float64)
            expected[b, place[table]] = total / max(1, bag.stop - bag.start) if mean[table] else total
    np.testing.assert_allclose(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("form", DEVICES)
@pytest.mark.parametrize("one_hot", [True, False])
def test_the_first_key_outside_its_table_is_found(form: str, one_hot: bool, rng: np.random.Generator) -> None:
    rows, num_rows = np.array([10, 3, 100]), 25
    table_of_key = np.repeat(np.arange(3), num_rows)
    offsets = NO_OFFSETS if one_hot else np.arange(3 * num_rows + 1)
    for _ in range(10):
        keys = rng.integers(0, rows[table_of_key]).astype(np.int32)
        assert bad_key(keys, offsets, rows, num_rows, one_hot, device=DEVICES[form]) == (-1, -1)
        position = int(rng.integers(0, len(keys)))
        table = table_of_key[position]
        keys[position] = rng.choice([-1, rows[table], 2**31 - 1, -(2**31)])
        assert bad_key(keys, offsets, rows, num_rows, one_hot, device=DEVICES[form]) == (table, position)


@pytest.mark.parametrize("form", DEVICES)
@pytest.mark.parametrize(
    ("offsets", "table"),
    [([0, 2, 1, 3, 4], 0), ([1, 2, 3, 3, 4], 0), ([0, 1, 2, 3, 5], 1), ([0, 1, 3, 2, 4], 1), ([0, 1, -2, 3, 4], 0)],
)
def test_offsets_that_describe_no_bags_are_found(form: str, offsets: list[int], table: int) -> None:
    keys, rows = np.zeros(4, np.int64), np.array([5, 5])
    found = bad_key(keys, np.array(offsets, np.int64), rows, 2, False, device=DEVICES[form])
    assert found == (table, -1)


@pytest.mark.parametrize("form", DEVICES)
def test_one_key_a_bag_means_as_many_keys_as_bags(form: str) -> None:
    assert bad_key(np.zeros(5, np.int32), NO_OFFSETS, np.array([9, 9]), 3, True, device=DEVICES[form]) == (0, -1)
