"""Lists of frequent rows: who is on them, the places of keys, and rows that go to their replicas and back."""

from __future__ import annotations

import numpy as np
import pytest
import rank_threads
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.device import HostDevice
from dlrm.errors import ConfigError
from embedding.buffers import BatchBuffers
from embedding.frequent_rows import FrequentRows, Homes, check_lists, most_frequent
from embedding.jagged import Jagged
from embedding.placement import Placement, TableSpec

DEVICES = HostDevice(2), HostDevice(compiled=False)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rows=st.integers(1, 40))
def test_the_most_frequent_rows_are_found(data: st.DataObject, rows: int) -> None:
    counts = data.draw(st.lists(st.integers(0, 5), max_size=rows))
    number = data.draw(st.integers(1, rows))
    whole = [*counts, *[0] * (rows - len(counts))]
    expected = sorted(sorted(range(rows), key=lambda row: (-whole[row], row))[:number])
    found = most_frequent(np.array(counts, np.int32), rows, number)
    assert found.tolist() == expected
    assert found.dtype == np.int64


@settings(max_examples=80, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), bags=st.integers(0, 9), one_hot=st.booleans())
def test_every_key_has_its_place(data: st.DataObject, seed: int, bags: int, one_hot: bool) -> None:
    rng = np.random.default_rng(seed)
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    specs = [TableSpec(name=f"t{i}", rows=rows, dim=1) for i, rows in enumerate(sizes)]
    lists = [
        np.sort(rng.permutation(rows)[: data.draw(st.integers(1, rows))]) if data.draw(st.booleans()) else None
        for rows in sizes
    ]
    lengths = np.ones(len(sizes) * bags, np.int64) if one_hot else rng.integers(0, 4, len(sizes) * bags)
    table = np.repeat(np.repeat(np.arange(len(sizes)), bags), lengths)
    keys = (rng.random(len(table)) * np.array(sizes)[table]).astype(np.int32)
    offsets = None if one_hot else np.concatenate([[0], np.cumsum(lengths)])
    expected = []
    for t, key in zip(table.tolist(), keys.tolist(), strict=True):
        rows = lists[t]
        if rows is None:
            expected.append(key)
        else:
            expected.append(rows.tolist().index(key) if key in rows else key + len(rows))
    for device in DEVICES:
        buffers = BatchBuffers(bags, np.empty(0), None)
        placed = FrequentRows.create(specs, lists).place(
            Jagged(keys, offsets, None, len(sizes), bags), buffers, device=device
        )
        assert placed.keys.tolist() == expected
        assert placed.keys.dtype == np.int32
        assert placed.offsets is offsets


@pytest.mark.parametrize("device", DEVICES)
def test_places_beyond_32_bits_are_64_bits_wide(device: HostDevice) -> None:
    rows = 2**31
    spec = TableSpec(name="t", rows=rows, dim=1)
    frequent = FrequentRows.create([spec], [np.array([5, rows - 2])])
    keys = np.array([0, 5, rows - 2, rows - 1], np.int32 if rows < 2**31 else np.int64)
    placed = frequent.place(Jagged(keys, None, None, 1, 4), BatchBuffers(4, np.empty(0), None), device=device)
    assert placed.keys.dtype == np.int64
    assert placed.keys.tolist() == [2, 0, 1, rows + 1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_reach_their_replicas_bit_for_bit_and_come_home(ranks: int, rng: np.random.Generator) -> None:
    lists = [np.sort(rng.permutation(40)[:7]), None, np.sort(rng.permutation(9)[:9])]
    frequent_start = np.array([3, 10, 10])
    whole = [rng.standard_normal((40, 4)).astype(np.float32), rng.standard_normal((9, 4)).astype(np.float32)]
    for table in whole:  # what adding floats up would lose
        table[0, :2] = -0.0, np.nan
        table[-1, 0] = 1e-45

    def work(comm: rank_threads.ThreadComm) -> None:
        own = [table[comm.rank :: comm.size] for table in whole]
        base = np.array([0, 99, len(own[0])])
        homes = Homes.create(lists, frequent_start, base, comm.size, comm.rank)
        stored = np.concatenate(own)
        replicas = np.full((19, 4), 7, np.float32)
        homes.spread([replicas], [stored], comm)
        expected = np.concatenate([np.full((3, 4), 7, np.float32), whole[0][lists[0]], whole[1][lists[2]]])
        np.testing.assert_array_equal(replicas.view(np.int32), expected.view(np.int32))
        replicas *= 2
        homes.settle([replicas, None], [stored, None])
        for begin, table, rows in ((0, whole[0], lists[0]), (len(own[0]), whole[1], lists[2])):
            mine = np.arange(comm.rank, len(table), comm.size)
            assert rows is not None
            doubled = np.where(np.isin(mine, rows)[:, None], table[mine] * 2, table[mine])
            np.testing.assert_array_equal(stored[begin : begin + len(mine)], doubled)

    rank_threads.run_ranks(ranks, work)


@pytest.mark.parametrize("rows", [None, [1, 2], [1, 1, 2], [3, 2, 1], [-1, 2, 3], [2, 3, 9]])
def test_a_list_that_does_not_fit_is_refused(rows: list[int] | None) -> None:
    spec = TableSpec(name="colour", rows=9, dim=1)
    lists = {} if rows is None else {"colour": np.array(rows)}
    with pytest.raises(ConfigError, match="table 'colour': its list of frequent rows must hold 3 distinct ones of 9"):
        check_lists([spec], [Placement(kind="hybrid", threshold=3, listed=True)], lists)
    with pytest.raises(ConfigError, match="row_wise: lists frequent rows"):
        Placement(kind="row_wise", listed=True)
