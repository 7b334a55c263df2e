"""Owners of tables, and shares of batches."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.errors import ConfigError
from embedding.plan import TableSpec, plan_table_wise
from embedding.topology import share_of, start_of

SIZES = st.lists(st.tuples(st.integers(1, 10**7), st.integers(1, 30)), min_size=1, max_size=30)


def specs_of(sizes: list[tuple[int, int]]) -> list[TableSpec]:
    return [TableSpec(name=f"t{i}", rows=rows, dim=16, hotness=hot) for i, (rows, hot) in enumerate(sizes)]


@given(rows=st.integers(0, 10**12), ranks=st.integers(1, 200))
def test_shares_cover_a_batch_once_in_order(rows: int, ranks: int) -> None:
    starts = [start_of(rows, ranks, rank) for rank in range(ranks + 1)]
    shares = [share_of(rows, ranks, rank) for rank in range(ranks)]
    assert starts[0] == 0
    assert starts[-1] == rows
    assert [end - begin for begin, end in itertools.pairwise(starts)] == shares
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@given(sizes=SIZES, ranks=st.integers(1, 8))
def test_every_table_has_one_owner_and_no_rank_is_overloaded(sizes: list[tuple[int, int]], ranks: int) -> None:
    plan = plan_table_wise(specs_of(sizes), ranks)
    assert sorted(table for rank in range(ranks) for table in plan.tables_of(rank)) == list(range(len(sizes)))
    assert plan == plan_table_wise(specs_of(sizes), ranks)
    # Graham's bound of greedy placement, for the larger of two loads: at most the sum of both means and one table.
    for load, sizes_of in (
        (plan.rank_cost, [spec.lookup_cost for spec in plan.specs]),
        (plan.rank_bytes, plan.table_bytes),
    ):
        total = sum(sizes_of)
        largest = max(
            max(s.lookup_cost / sum(x.lookup_cost for x in plan.specs), b / sum(plan.table_bytes))
            for s, b in zip(plan.specs, plan.table_bytes, strict=True)
        )
        assert max(load(rank) for rank in range(ranks)) / total <= 2 / ranks + largest + 1e-9


def test_equal_tables_go_round() -> None:
    plan = plan_table_wise(specs_of([(100, 1)] * 26), 4)
    assert sorted(len(plan.tables_of(rank)) for rank in range(4)) == [6, 6, 7, 7]


def test_hot_tables_and_large_tables_are_parted() -> None:
    plan = plan_table_wise(specs_of([(10, 30), (10, 30), (10**6, 1), (10**6, 1)]), 2)
    assert plan.owners[0] != plan.owners[1]
    assert plan.owners[2] != plan.owners[3]


def test_fewer_tables_than_ranks_leave_ranks_empty() -> None:
    plan = plan_table_wise(specs_of([(10, 1)] * 2), 5)
    assert sorted(len(plan.tables_of(rank)) for rank in range(5)) == [0, 0, 0, 1, 1]


def test_a_rank_that_cannot_hold_its_tables_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rank 0: .*'t0' .* exceed 1.0 MiB; use more ranks"):
        plan_table_wise(specs_of([(10**5, 1)]), 1, bytes_per_row=[200], memory_limit_bytes=10**6)


def test_the_description_has_a_row_for_each_table() -> None:
    rows = plan_table_wise(specs_of([(10, 1), (20, 3)]), 2, bytes_per_row=[100, 100]).describe()
    assert [row["table"] for row in rows] == ["t0", "t1"]
    assert {row["rank"] for row in rows} == {0, 1}
    assert rows[1]["lookup_share"] == 0.75
    assert rows[1]["mib"] == round(2000 / 2**20, 3)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"dim": 0}, {"hotness": 0}, {"pooling": "max"}])
def test_tables_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="table 'x'"):
        TableSpec(**{"name": "x", "rows": 1, "dim": 1, **wrong})  # type: ignore[arg-type]


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="ranks: 0"):
        plan_table_wise([], 0)
