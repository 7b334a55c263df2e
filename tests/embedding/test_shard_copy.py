"""Changed rows reach every place of another plan, and nothing else changes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.device import HostDevice
from embedding import shard_copy
from embedding.shard_copy import Held, ShardCopy
from embedding.table import Shard

SPEC = importlib.util.spec_from_file_location(
    "thread_ranks", Path(__file__).parents[1] / "pipeline" / "thread_ranks.py"
)
thread_ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(thread_ranks)

DIM = 12


def places(rng, rows, ranks):
    """A table's parts by rank: replicated below a threshold and dealt out above, whole, or by columns."""
    kind = rng.integers(3)
    if kind == 0:
        cut = int(rng.integers(rows + 1))
        return [
            [(range(cut), range(DIM), True), (range(cut + rank, rows, ranks), range(DIM), False)]
            for rank in range(ranks)
        ]
    if kind == 1:
        owner = int(rng.integers(ranks))
        return [[(range(rows), range(DIM), False)] * (rank == owner) for rank in range(ranks)]
    ends = [0, *sorted(rng.choice(np.arange(1, DIM), ranks - 1, replace=False).tolist()), DIM]
    return [[(range(rows), range(ends[rank], ends[rank + 1]), False)] for rank in range(ranks)]


def shards(whole, changed, parts):
    """One rank's, filled from the whole tables."""
    return [
        Shard(
            name, rows, columns, whole[name][rows.start : rows.stop : rows.step, columns.start : columns.stop].copy(),
            replicated=replicated,
            touched=None if changed is None else changed[name][rows.start : rows.stop : rows.step].copy(),
        )
        for name, rows, columns, replicated in parts
    ]  # fmt: skip


@pytest.mark.parametrize(("givers", "takers"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_changed_rows_arrive(rng, monkeypatch, givers, takers, dtype):
    monkeypatch.setattr(shard_copy, "_PIECE_ROWS", 7)  # many pieces, and some givers end before others
    sizes = {f"t{i}": int(rng.integers(1, 60)) for i in range(5)}
    old = {name: rng.normal(size=(rows, DIM)).astype(dtype) for name, rows in sizes.items()}
    changed = {name: rng.random(rows) < rng.random() for name, rows in sizes.items()}
    new = {name: np.where(changed[name][:, None], rng.normal(size=old[name].shape), old[name]).astype(dtype)
           for name in sizes}  # fmt: skip
    held = {
        group: {name: places(rng, rows, ranks) for name, rows in sizes.items()}
        for group, ranks in (("give", givers), ("take", takers))
    }

    def work(comm):
        giving = comm.rank < givers
        group, rank = ("give", comm.rank) if giving else ("take", comm.rank - givers)
        parts = [(name, *part) for name in sizes for part in held[group][name][rank]]
        own = shards(new if giving else old, changed if giving else None, parts)
        copy = ShardCopy(comm, givers, own, HostDevice(1))
        if giving:
            copy.give(own)
        else:
            copy.take(own)
        return own

    for result in thread_ranks.run_ranks(givers + takers, work):
        assert not isinstance(result, Exception), result
        for shard in result:
            rows, columns = shard.rows, shard.columns
            expected = new[shard.table][rows.start : rows.stop : rows.step, columns.start : columns.stop]
            np.testing.assert_array_equal(shard.weight, expected)


def test_rows_that_did_not_change_do_not_travel(rng):
    rows = 5000
    weight = rng.normal(size=(rows, DIM))
    touched = np.zeros(rows, np.bool_)
    touched[rng.choice(rows, 10, replace=False)] = True

    def work(comm):
        own = [Shard("t", range(rows), range(DIM), weight.copy(), touched=touched)]
        copy = ShardCopy(comm, 1, own, HostDevice(1))
        return copy.take(own) if comm.rank else copy.give(own)

    sent, _ = thread_ranks.run_ranks(2, work)
    assert 10 * DIM * 8 < sent < 20 * DIM * 8


@given(st.integers(0, 50), st.integers(0, 60), st.integers(1, 7), st.lists(st.integers(0, 120), max_size=30))
def test_places_are_those_of_the_range(start, length, step, rows):
    held = Held("t", range(start, start + length, step), range(4), False)
    here, found = held.places_of(np.array(rows, np.int64))
    assert here.tolist() == [row in held.rows for row in rows]
    assert found.tolist() == [held.rows.index(row) for row in rows if row in held.rows]
