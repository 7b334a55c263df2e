"""Checks, sums and transforms of blocks: compiled against reference, and what they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.convert import adapt
from pipeline.formats import block, block_numba
from pipeline.formats.block import RowSum, Schema, make_block
from pipeline.manifest import TableInfo


def random_arrays(rng: np.random.Generator, hotness: list[int], num_dense: int, rows: int) -> dict[str, Any]:
    """Arrays of which few values must not be."""
    columns = np.cumsum([0, *hotness]).astype(np.int64)
    table_rows = rng.integers(1, 2**33, len(hotness))
    keys = rng.integers(0, np.repeat(table_rows, hotness), (rows, int(columns[-1])))
    keys[rng.random(keys.shape) < 0.1] = -1
    weighted = rng.random() < 0.5
    return {
        "labels": rng.integers(0, 2, rows).astype(np.int32),
        "dense": rng.normal(size=(rows, num_dense)).astype(np.float32).view(np.int32),
        "keys": keys,
        "weights": rng.normal(size=keys.shape if weighted else (rows, 0)).astype(np.float32).view(np.int32),
        "columns": columns,
        "table_rows": table_rows,
    }


shapes = {
    "seed": st.integers(0, 2**32 - 1),
    "hotness": st.lists(st.integers(1, 3), max_size=4),
    "num_dense": st.integers(0, 3),
    "rows": st.integers(0, 12),
}


@given(**shapes, faults=st.integers(0, 3), is_float=st.booleans(), missing=st.booleans())
@settings(deadline=None, max_examples=150)
def test_find_fault_equals_its_reference(
    seed: int, hotness: list[int], num_dense: int, rows: int, faults: int, is_float: bool, missing: bool
) -> None:
    rng = np.random.default_rng(seed)
    arrays = random_arrays(rng, hotness, num_dense, rows)
    wrong = {
        "labels": [-1, 2, 2**31 - 1],
        "dense": np.array([np.nan, np.inf, -np.inf], np.float32).view(np.int32),
        "keys": [-2, -(2**63), 2**33],
        "weights": np.array([np.nan, np.inf, -np.inf], np.float32).view(np.int32),
    }
    for _ in range(faults):
        name = rng.choice(list(wrong))
        if arrays[name].size:
            arrays[name].reshape(-1)[rng.integers(arrays[name].size)] = rng.choice(np.array(wrong[name]))
    found = block_numba.find_fault(is_float=is_float, missing_keys=missing, **arrays)
    assert found == block.find_fault(is_float=is_float, missing_keys=missing, **arrays)
    if not faults and (missing or (arrays["keys"] >= 0).all()):
        assert found == (-1, 0)


@given(**shapes, state=st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=100)
def test_sum_rows_equals_its_reference(seed: int, hotness: list[int], num_dense: int, rows: int, state: int) -> None:
    arrays = random_arrays(np.random.default_rng(seed), hotness, num_dense, rows)
    arrays.pop("table_rows")
    assert block_numba.sum_rows(np.uint64(state), **arrays) == block.sum_rows(state, **arrays)


def schema_of(*shape: tuple[int, int], num_dense: int = 2, **fields: Any) -> Schema:
    tables = tuple(TableInfo(name=f"T{t}", rows=rows, hotness=hotness) for t, (rows, hotness) in enumerate(shape))
    names = tuple(f"d{n}" for n in range(num_dense))
    return Schema(**{"name": "x", "dense_names": names, "dense": "float32", "tables": tables, **fields})


def sum_of(schema: Schema, *blocks: block.Block) -> str:
    total = RowSum(schema)
    for one in blocks:
        total.add(one)
    return total.text


def test_the_sum_depends_on_rows_alone(rng: np.random.Generator) -> None:
    schema = schema_of((9, 2), (9, 1))
    labels, dense = rng.integers(0, 2, 200), rng.normal(size=(200, 2)).astype(np.float32)
    keys = rng.integers(-1, 9, (200, 3))
    whole = sum_of(schema, make_block(labels, dense, keys))
    for size in (1, 7, 199):  # many blocks: a sum below 2^63 and one above must be taken on alike
        parts = [slice(start, start + size) for start in range(0, 200, size)]
        assert sum_of(schema, *(make_block(labels[part], dense[part], keys[part]) for part in parts)) == whole
    # Where in its columns a bag has its keys, and how many columns there are, says nothing.
    wide = np.insert(keys, 2, -1, axis=1)
    wide[:, :3] = np.where(keys[:, :1] < 0, np.stack([keys[:, 1], wide[:, 2], keys[:, 0]], axis=1), wide[:, :3])
    assert sum_of(schema_of((9, 3), (9, 1)), make_block(labels, dense, wide)) == whole


def test_the_sum_notices_every_change(rng: np.random.Generator) -> None:
    schema = schema_of((9, 2), (9, 1), weighted=True)
    labels, dense = rng.integers(0, 2, 6), rng.normal(size=(6, 2)).astype(np.float32)
    keys, weights = rng.integers(0, 9, (6, 3)), rng.normal(size=(6, 3)).astype(np.float32)
    arrays = (labels, dense, keys, weights)
    seen = {sum_of(schema, make_block(*arrays))}
    for place, array in enumerate(arrays):
        for index in np.ndindex(array.shape):
            changed = array.copy()
            changed[index] = (array[index] + 1) % 9 if array.dtype.kind == "i" else np.nextafter(array[index], 9)
            seen.add(sum_of(schema, make_block(*arrays[:place], changed, *arrays[place + 1 :])))
    seen.add(sum_of(schema, make_block(*(array[::-1] for array in arrays))))
    seen.add(sum_of(schema, make_block(labels, dense, np.where([[True, False, True]], keys, -1), weights)))
    # The same keys in bags of other lengths.
    seen.add(sum_of(schema_of((9, 1), (9, 2), weighted=True), make_block(*arrays)))
    assert len(seen) == 1 + 6 + 12 + 18 + 18 + 3


def test_log1p_of_counts_equals_its_reference(rng: np.random.Generator) -> None:
    counts = np.concatenate([rng.integers(-(2**31), 2**31, (500, 3)), rng.integers(-2, 9, (500, 3))]).astype(np.int32)
    ours, theirs = np.empty(counts.shape, np.float32), np.empty(counts.shape, np.float32)
    block_numba.log1p_counts(counts, ours)
    block.log1p_counts(counts, theirs)
    np.testing.assert_allclose(ours, theirs, rtol=2**-23)
    np.testing.assert_array_equal(ours[counts <= 0], 0)


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.9, True), (65520.0, False), (-7e4, False)])
def test_rounding_to_16_bits_ends_where_they_end(value: float, fits: bool) -> None:
    schema = schema_of((1, 1), num_dense=1, dense="float16")
    one = make_block(np.zeros(1), np.array([[value]]), np.zeros((1, 1)))
    if fits:
        assert adapt(one, schema, frozenset(), ("", 0)).dense.tolist() == [[65504.0]]
    else:
        with pytest.raises(block.DataError, match="16 bits end at 65504"):
            adapt(one, schema, frozenset(), ("", 0))


def test_blocks_stay_small_whatever_a_row_takes() -> None:
    for hotness in (1, 1000, 10_000_000):
        schema = schema_of((9, hotness))
        assert 1 <= schema.block_rows() * max(1, hotness) * 8 <= max(1 << 25, hotness * 8)
