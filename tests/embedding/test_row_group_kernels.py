"""Slots: compiled equals reference, every key finds its row, and a fresh look at what is asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.device import HostDevice
from embedding.placement import Placement, TableSpec
from embedding.row_group import row_layout, rows_of
from embedding.slots import ELSEWHERE, HERE, SPREAD, mark_slots, pool_slots, route_keys, slots_of_tables, sum_slots

COMPILED, REFERENCE = HostDevice(2), HostDevice(compiled=False)


@st.composite
def batches(draw: st.DrawFn) -> dict:
    tables = draw(st.integers(1, 4))
    rows = draw(st.lists(st.integers(1, 30), min_size=tables, max_size=tables))
    ranks = draw(st.integers(1, 5))
    specs = [TableSpec(name=f"t{i}", rows=count, dim=3) for i, count in enumerate(rows)]
    placements = []
    for count in rows:
        distinct = draw(st.booleans())
        if draw(st.booleans()):
            placements.append(Placement(kind="table_wise", owner=draw(st.integers(0, ranks - 1)), deduplicate=distinct))
        else:
            kind = "hybrid"  # the layout takes any threshold, 0 and all rows included
            placements.append(Placement(kind=kind, threshold=draw(st.integers(0, count)), deduplicate=distinct))
    bags = draw(st.integers(0, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = np.ones(tables * bags, int) if draw(st.booleans()) else rng.integers(0, 4, tables * bags)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    of_table = np.repeat(np.repeat(np.arange(tables), bags), lengths)
    keys = rng.integers(0, np.array(rows)[of_table]) if len(of_table) else np.empty(0)
    one_hot = bool((lengths == 1).all()) and draw(st.booleans())
    return {
        "specs": specs, "placements": placements, "ranks": ranks, "bags": bags, "rng": rng, "of_table": of_table,
        "offsets": np.empty(0, np.int64) if one_hot else offsets, "all_offsets": offsets,
        "keys": keys.astype(draw(st.sampled_from(["int32", "int64"]))),
    }  # fmt: skip


def routed(batch: dict, device: HostDevice) -> tuple:
    layout = row_layout(batch["specs"], batch["placements"], batch["ranks"])
    keys = batch["keys"]
    slots, ids = np.full(len(keys), -9, np.int32), np.full(len(keys), -9, np.int32)
    scratch = np.empty(len(keys), np.int32)
    counts = route_keys(keys, batch["offsets"], batch["bags"], layout, slots, ids, scratch, device=device)
    return layout, slots, ids[: counts.sum()], counts


@settings(max_examples=150, deadline=None)
@given(batch=batches())
def test_every_key_finds_its_row(batch: dict) -> None:
    layout, slots, ids, counts = routed(batch, REFERENCE)
    compiled = routed(batch, COMPILED)
    for mine, other in zip((slots, ids, counts), compiled[1:], strict=True):
        np.testing.assert_array_equal(mine, other)
    # What each owner holds, row by row, from the ranges that initialise and save it.
    held = [
        [
            (table, row)
            for table, (spec, placement) in enumerate(zip(batch["specs"], batch["placements"], strict=True))
            for row in rows_of(spec, placement, batch["ranks"], rank)
        ]
        for rank in range(batch["ranks"])
    ]
    owners = np.repeat(np.arange(batch["ranks"]), counts)
    received = [held[owner][number] for owner, number in zip(owners, ids, strict=True)]
    frequent = [(t, row) for t in range(len(batch["specs"])) for row in range(batch["placements"][t].threshold)]
    assert len(frequent) == layout.frequent
    slab = [*frequent, *received]
    assert [slab[slot] for slot in slots] == list(zip(batch["of_table"], batch["keys"], strict=True))
    for table, placement in enumerate(batch["placements"]):
        asked = [row for t, row in received if t == table]
        wanted = batch["keys"][(batch["of_table"] == table) & (batch["keys"] >= placement.threshold)].tolist()
        assert sorted(asked) == sorted(set(wanted) if placement.deduplicate else wanted)
        if placement.deduplicate and layout.owner[table] != SPREAD:
            assert asked == list(dict.fromkeys(wanted)), "order of first occurrence"


@settings(max_examples=60, deadline=None)
@given(batch=batches(), weighted=st.booleans(), mean=st.booleans())
def test_pooling_and_its_gradient_equal_a_plain_loop(batch: dict, weighted: bool, mean: bool) -> None:
    layout, slots, ids, _ = routed(batch, REFERENCE)
    rng, bags, tables = batch["rng"], batch["bags"], len(batch["specs"])
    frequent, received = rng.standard_normal((layout.frequent, 3)), rng.standard_normal((len(ids), 3))
    weights = rng.uniform(-1, 1, len(slots)).astype(np.float32) if weighted else np.empty(0, np.float32)
    means, place = np.full(tables, mean), np.arange(tables)[::-1] + 1
    gradients = rng.standard_normal((bags, tables + 1, 3))
    compact = rng.permutation(layout.frequent).astype(np.int32) if layout.frequent else np.empty(0, np.int32)
    slab = np.concatenate([frequent, received])
    pooled, sums = np.full((bags, tables + 1, 3), 7.0), np.zeros_like(slab)
    for table in range(tables):
        for b in range(bags):
            begin, end = batch["all_offsets"][table * bags + b : table * bags + b + 2]
            factors = (weights[begin:end] if weighted else np.ones(end - begin)) / (max(1, end - begin) if mean else 1)
            pooled[b, place[table]] = (slab[slots[begin:end]] * factors[:, None]).sum(axis=0)
            for slot, factor in zip(slots[begin:end], factors, strict=True):
                sums[slot] += factor * gradients[b, place[table]]
    for device in (REFERENCE, COMPILED):
        out = np.full_like(pooled, 7.0)
        common = (slots, batch["offsets"], weights, means, place, bags)
        pool_slots(frequent, received, *common, out, device=device)
        np.testing.assert_allclose(out, pooled, rtol=1e-12, atol=1e-12)
        for places in (compact, compact[:0]):
            frequent_sum, received_sum = np.full_like(frequent, 5), np.full_like(received, 5)
            sum_slots(gradients, *common, places, layout.frequent, frequent_sum, received_sum, device=device)
            expected = np.empty_like(frequent)
            expected[places if len(places) else slice(None)] = sums[: layout.frequent]
            np.testing.assert_allclose(frequent_sum, expected, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(received_sum, sums[layout.frequent :], rtol=1e-12, atol=1e-12)
        # Table by table, first what needs no exchange: not a bit changes, and rows that are not here are not read.
        apart, apart_frequent, apart_received = (
            np.full_like(pooled, 7.0),
            np.zeros_like(frequent),
            np.zeros_like(received),
        )
        for side in (HERE, ELSEWHERE):
            arrived = np.full_like(received, np.nan) if side == HERE else received
            for t in range(tables):
                own = slots_of_tables(range(t, t + 1), bags, slots, batch["offsets"], weights)
                one = (*own, means[t : t + 1], place[t : t + 1], bags)
                pool_slots(frequent, arrived, *one, apart, device=device, side=side)
                sum_slots(
                    gradients, *one, compact[:0], layout.frequent, apart_frequent, apart_received, device=device,
                    side=side, fresh=False,
                )  # fmt: skip
        np.testing.assert_array_equal(apart, out)
        np.testing.assert_array_equal(apart_frequent, frequent_sum)
        np.testing.assert_array_equal(apart_received, received_sum)
        marks = np.zeros(layout.frequent, np.uint8)
        mark_slots(slots, layout.frequent, marks, device=device)
        assert set(np.flatnonzero(marks)) == {slot for slot in slots.tolist() if slot < layout.frequent}


@pytest.mark.parametrize("stride", [1, 2**20, 2**31 + 7])
def test_distinct_rows_are_found_however_they_lie(stride: int, rng: np.random.Generator) -> None:
    """Rows at regular distances, as an unlucky hash would not spread, and beyond 32 bits."""
    spec = TableSpec(name="t", rows=2**44, dim=1)
    placement = Placement(kind="row_wise", deduplicate=True)
    base = np.zeros((3, 1), np.int64)
    layout = row_layout([TableSpec(name="t", rows=8, dim=1)], [placement], 3)
    assert layout.base.shape == base.shape
    rows = rng.integers(0, 3000, 8000) * stride
    assert rows.max() < spec.rows
    slots, ids = np.empty(8000, np.int32), np.empty(8000, np.int64)
    counts = route_keys(
        rows, np.empty(0, np.int64), 8000, layout, slots, ids, np.empty(8000, np.int32), device=COMPILED
    )
    assert counts.sum() == len(np.unique(rows))
    owner = np.repeat(np.arange(3), counts)
    np.testing.assert_array_equal((ids[: counts.sum()] * 3 + owner)[slots], rows)


def test_sums_do_not_depend_on_threads(rng: np.random.Generator) -> None:
    slots = rng.integers(0, 60, 4000).astype(np.int32)
    slots[2000:] += 60
    gradients = rng.standard_normal((2000, 2, 5)).astype(np.float32)
    results = []
    for threads in (1, 2):
        near, far = np.empty((100, 5), np.float32), np.empty((20, 5), np.float32)
        sum_slots(
            gradients, slots, np.empty(0, np.int64), np.empty(0, np.float32), np.zeros(2, bool), np.arange(2), 2000,
            np.empty(0, np.int32), 100, near, far, device=HostDevice(threads),
        )  # fmt: skip
        results.append(np.concatenate([near, far]))
    assert np.array_equal(*results)
    assert np.abs(results[0]).min() > 0
