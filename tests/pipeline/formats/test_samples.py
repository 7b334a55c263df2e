"""The compiled readers and writers of Norm samples and Criteo text against their references."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.formats import criteo_tsv, criteo_tsv_numba, norm_samples, norm_samples_numba


def random_samples(rng: np.random.Generator, hotness: list[int], num_dense: int, rows: int, wide: bool) -> Any:
    """Arrays of samples: labels, words of dense columns, keys, columns, and what keys are raised by."""
    columns = np.cumsum([0, *hotness]).astype(np.int64)
    limit = 2**40 if wide else 2**31
    keys = rng.integers(-1, limit, (rows, int(columns[-1])))
    keys[rng.random(keys.shape) < 0.3] = -1
    raised = rng.integers(0, 2**31, len(hotness))
    dense = rng.integers(-(2**31), 2**31, (rows, num_dense)).astype(np.int32)
    return rng.integers(0, 2, rows).astype(np.int32), dense, keys, columns, raised


def bags_of(keys: Any, columns: Any) -> list[list[list[int]]]:
    """The keys that are there, by row and table."""
    ends = list(pairwise(columns.tolist()))
    return [[[key for key in row[start:stop] if key >= 0] for start, stop in ends] for row in keys.tolist()]


shapes = {
    "seed": st.integers(0, 2**32 - 1),
    "hotness": st.lists(st.integers(1, 3), max_size=4),
    "num_dense": st.integers(0, 3),
    "rows": st.integers(1, 8),
    "wide": st.booleans(),
    "framed": st.booleans(),
}


@given(**shapes, damage=st.integers(0, 2), short=st.integers(0, 1))
@settings(deadline=None, max_examples=200)
def test_norm_samples(
    seed: int, hotness: list[int], num_dense: int, rows: int, wide: bool, framed: bool, damage: int, short: int
) -> None:
    rng = np.random.default_rng(seed)
    labels, dense, keys, columns, raised = random_samples(rng, hotness, num_dense, rows, wide)
    written = []
    for module in (norm_samples, norm_samples_numba):
        out = np.zeros(rows * (9 + 4 * (num_dense + len(hotness)) + 8 * keys.shape[1]), np.uint8)
        size = module.write_samples(labels, dense, keys, columns, raised, wide, framed, out)
        written.append(out[:size])
    np.testing.assert_array_equal(*written)
    data = written[0].copy()
    for _ in range(damage):
        data[rng.integers(data.size)] = rng.integers(256)
    if short:
        data = data[: rng.integers(data.size)].copy()
    if len(hotness) and damage:
        columns = np.cumsum([0, *(max(1, count - 1) for count in hotness)]).astype(np.int64)

    results: list[list[Any]] = []
    for module in (norm_samples, norm_samples_numba):
        read = [np.zeros(rows, np.int32), np.zeros_like(dense), np.full((rows, int(columns[-1])), -1, np.int64)]
        starts = np.zeros(rows, np.int64)
        outcome = module.read_samples(data, 0, framed, wide, columns, raised, *read, starts)
        whole = outcome[1]  # of a faulty row nothing is promised
        longest, largest = np.zeros(len(hotness), np.int64), np.full(len(hotness), -1, np.int64)
        walked = module.scan_samples(data, 0, rows, framed, num_dense, wide, longest, largest)
        done = walked[0] == norm_samples.OK
        results.append(
            [
                outcome,
                *(array[:whole].tolist() for array in (*read, starts)),
                walked,
                (longest.tolist(), largest.tolist()) if done else None,
            ]
        )
    assert results[0] == results[1]
    if not damage and not short:
        outcome, *read, starts, walked, ends = results[0]
        assert outcome == (norm_samples.OK, rows, data.size, 0) == walked
        assert read[:2] == [labels.tolist(), dense.tolist()]
        kept, found = bags_of(keys, columns), bags_of(np.array(read[2], np.int64).reshape(rows, -1), columns)
        assert found == kept
        assert ends[0] == [max(len(row[t]) for row in kept) for t in range(len(hotness))]
        for row, bags in enumerate(kept):
            for t, bag in enumerate(bags):
                for h, key in enumerate(bag):
                    at = norm_samples.key_byte(data, starts[row], num_dense, wide, columns, int(columns[t]) + h)
                    word = data[at : at + (8 if wide else 4)].view("<u8" if wide else "<u4")[0]
                    assert int(word) == key + raised[t]


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 20))
@settings(deadline=None, max_examples=60)
def test_criteo_text(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(-(2**31), 2**31, (rows, 13)).astype(np.int32)
    small = rng.random(counts.shape) < 0.5
    counts[small] = rng.choice(np.array([0, 9, 10, -1, -10, 2**31 - 1, -(2**31)], np.int32), int(small.sum()))
    keys = rng.integers(-1, 2**32, (rows, 26))
    keys[rng.random(keys.shape) < 0.3] = -1
    labels = rng.integers(0, 2, rows).astype(np.int32)
    texts = []
    for module in (criteo_tsv, criteo_tsv_numba):
        out = np.zeros(rows * 400, np.uint8)
        texts.append(bytes(out[: module.format_rows(labels, counts, keys, out)]))
    assert texts[0] == texts[1]
    assert texts[0].count(b"\n") == rows
