"""Placements of every kind on several ranks: the same training as one rank's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hybrid_cases as hc
import numpy as np
import pytest
import rank_threads
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.errors import CommError, ConfigError, DataError
from dlrm.philox import uniform_rows
from embedding.comm import SingleComm
from embedding.hybrid import HybridEmbedding
from embedding.jagged import Jagged
from embedding.placement import Placement, Plan, TableSpec
from embedding.reduce_way import ring_bytes
from embedding.sparse_optim import KINDS
from embedding.topology import share_of

PLANS = {
    "table_wise": (("table_wise",), 0.0),
    "row_wise": (("row_wise",), 0.0),
    "column_wise": (("column_wise",), 0.0),
    "replicated": (("replicated",), 0.0),
    "hybrid, few": (("hybrid",), 0.05),
    "hybrid, many": (("hybrid",), 0.7),
    "listed": (("listed",), 0.3),
    "distinct table_wise": (("distinct_table_wise",), 0.0),
    "mixed": (("hybrid", "column_wise", "listed", "replicated", "table_wise", "row_wise", "distinct_table_wise"), 0.3),
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("hotness", [1, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_trains_as_one_rank_does(plan: str, hotness: int, ranks: int, seed: int) -> None:
    kinds, share = PLANS[plan]
    for number, kind in enumerate(KINDS):
        if kind == "rowwise_adagrad" and plan == "column_wise":
            continue
        case = hc.HybridCase(
            seed=seed + number,
            rows=(50, 3, 200, 20, 9, 31),
            batches=(13, 13, 6, 21),
            dim=6,
            hotness=hotness,
            weighted=number % 3 == 0,
            kind=kind,
            kinds=kinds,
            share=share,
            deduplicate=number % 4 != 0,
            poolings=("sum", "mean", "concat"),
        )
        hc.check(case, rank_threads.run_ranks(ranks, lambda comm, case=case: hc.train(case, comm)), hc.run_alone(case))


ANY_CASE = st.builds(
    hc.HybridCase,
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple),
    batches=st.lists(st.integers(1, 14), min_size=1, max_size=3).map(tuple),
    dim=st.integers(1, 5),
    hotness=st.integers(1, 4),
    weighted=st.booleans(),
    kind=st.sampled_from(KINDS),
    key_dtype=st.sampled_from(["int32", "int64"]),
    first=st.integers(0, 1),
    compiled=st.just(False),  # the kernels are held against these references in test_slot_kernels.py
    kinds=st.lists(st.sampled_from([kind for kinds, _ in PLANS.values() for kind in kinds]), min_size=1).map(tuple),
    share=st.floats(0, 1),
    deduplicate=st.booleans(),
    same_key=st.booleans(),
    distinct_keys=st.booleans(),
    start_bytes=st.sampled_from([0.0, 100.0, 1e9]),
    poolings=st.lists(st.sampled_from(["sum", "mean", "concat"]), min_size=1, max_size=3).map(tuple),
)


# A failure is not shrunk: ranks of a node that wait for one that failed hold each example up.
@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(ranks=st.integers(1, 5), nodes=st.integers(1, 3), case=ANY_CASE)
def test_any_plan_for_any_batch_on_any_number_of_ranks(ranks: int, nodes: int, case: hc.HybridCase) -> None:
    if case.kind == "rowwise_adagrad" and "column_wise" in case.kinds:
        case = replace(case, kind="adagrad")
    spread = replace(case, nodes=min(nodes, ranks))
    hc.check(case, rank_threads.run_ranks(ranks, lambda comm: hc.train(spread, comm)), hc.run_alone(case))


MIXED = hc.HybridCase(
    seed=0, rows=(50, 3, 300, 40, 9, 31), batches=(24, 24, 7, 24, 24, 24), hotness=3, kinds=PLANS["mixed"][0], dim=6
)


def same_bits(first: hc.Outcome, second: hc.Outcome) -> bool:
    pairs = [*zip(first.vectors, second.vectors, strict=True)]
    for mine, other in zip(first.shards, second.shards, strict=True):
        assert mine[:4] == other[:4]
        pairs += [(mine[4][name], other[4][name]) for name in mine[4]]
    return all(np.array_equal(mine, other) for mine, other in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_equal_bit_for_bit_and_replicas_stay_so(kind: str, seed: int) -> None:
    kinds = tuple(name for name in MIXED.kinds if kind != "rowwise_adagrad" or name != "column_wise")
    case = replace(MIXED, seed=seed, kind=kind, kinds=kinds, dtype="float32", batches=(24,) * 40)
    runs = [rank_threads.run_ranks(3, lambda comm: hc.train(case, comm)) for _ in range(2)]
    assert all(same_bits(first, second) for first, second in zip(*runs, strict=True))
    hc.whole_tables(case, runs[0])  # replicas


def test_vectors_of_one_key_a_bag_are_one_rank_s_bit_for_bit(seed: int) -> None:
    """In the first step, as updates differ by summation order; also of bags, whose keys are added in their order."""
    for hotness in (1, 4):
        case = replace(MIXED, seed=seed, hotness=hotness, dtype="float32", batches=(40,))
        outcomes = rank_threads.run_ranks(4, lambda comm, case=case: hc.train(case, comm))
        np.testing.assert_array_equal(np.concatenate([o.vectors[0] for o in outcomes]), hc.run_alone(case).vectors[0])


def test_de_duplication_changes_summation_order_and_bytes_only(seed: int) -> None:
    case = replace(MIXED, seed=seed, kinds=("hybrid", "row_wise"), kind="adam")
    runs = [
        rank_threads.run_ranks(3, lambda comm, on=on: hc.train(replace(case, deduplicate=on), comm))
        for on in (True, False)
    ]
    for outcomes in runs:
        hc.check(case, outcomes, hc.run_alone(case))
    for name in ("input_dist", "output_dist", "grad_dist"):
        bytes_sent = [sum(outcome.sent[0][name] for outcome in outcomes) for outcomes in runs]
        assert 0 < bytes_sent[0] < bytes_sent[1], name
    reduced = [[outcome.sent[0]["all_reduce"] for outcome in outcomes] for outcomes in runs]
    assert reduced[0] == reduced[1]


def test_two_nodes_give_what_one_gives(seed: int) -> None:
    case = replace(MIXED, seed=seed, kind="sgd", batches=(24,))
    flat, staged = (
        rank_threads.run_ranks(4, lambda comm, nodes=nodes: hc.train(replace(case, nodes=nodes), comm))
        for nodes in (1, 2)
    )
    for mine, other in zip(flat, staged, strict=True):
        np.testing.assert_array_equal(mine.vectors[0], other.vectors[0])
    hc.check(case, staged, hc.run_alone(case))


@pytest.mark.parametrize(("precision", "relative"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
@pytest.mark.parametrize("kind", ["row_wise", "hybrid", "table_wise", "column_wise"])
def test_16_bit_exchange_errs_within_its_bounds(kind: str, precision: str, relative: float, seed: int) -> None:
    """SGD, one key a bag, rate 0.1: a vector is rounded once, a row's gradient once per rank that looked it up."""
    case = replace(
        MIXED, seed=seed, kinds=(kind,), kind="sgd", hotness=1, dtype="float32", batches=(30,), precision=precision,
        poolings=("sum", "concat", "mean"),
    )  # fmt: skip
    ranks = 3
    outcomes = rank_threads.run_ranks(ranks, lambda comm: hc.train(case, comm))
    alone = hc.run_alone(replace(case, precision="fp32"))
    tiny = 2.0**-25 if precision == "fp16" else 0.0
    expected = alone.vectors[0]
    error = np.abs(np.concatenate([o.vectors[0] for o in outcomes]) - expected)
    assert (error <= relative * np.abs(expected) + tiny).all()
    assert error.max() > 0
    # All gradients of one table bound what their sums' rounding may add up to, rank by rank.
    rng = np.random.default_rng(seed)
    hc.draw(case, rng, 30)
    gradient = rng.standard_normal((30, 1 + len(case.rows), case.dim)) / 30
    tables, exact = hc.whole_tables(case, outcomes), hc.whole_tables(case, [alone])
    for name, array in tables.items():
        allowed = 0.1 * np.abs(gradient[:, 1 + int(name[1])]).sum(axis=0) * (relative + 2.0**-20) + 2.0**-24
        assert (np.abs(array - exact[name]) <= allowed + 2.0**-22 * np.abs(exact[name])).all(), name


@pytest.mark.parametrize(("ranks", "nodes"), [(3, 1), (4, 2)])
@pytest.mark.parametrize("kind", ["adagrad", "adam"])
def test_all_replicated_rows_or_the_touched_ones_are_summed_alike(kind: str, ranks: int, nodes: int, seed: int) -> None:
    """What starting an all-reduce takes decides, batch by batch: the short one, with fewer rows, goes the other way."""
    case = replace(MIXED, seed=seed, kinds=("hybrid", "row_wise"), kind=kind, nodes=nodes)
    rows = 15 + 90 + 2  # replicated ones of tables of 50, 300 and 9 rows
    ways = [
        rank_threads.run_ranks(ranks, lambda comm, start=start: hc.train(replace(case, start_bytes=start), comm))
        for start in (0.0, 8.0 * rows, 1e9)
    ]
    alone = hc.run_alone(case)
    for outcomes in ways:
        hc.check(case, outcomes, alone)
    touched, mixed, dense = ([outcomes[0].sent[step]["all_reduce"] for step in range(6)] for outcomes in ways)
    assert mixed == [*dense[:2], touched[2], *dense[3:]]
    # A gradient of 6 numbers and a count a row; in two levels padded to a multiple of the ranks of a node, 2.
    assert set(dense) == {ring_bytes((rows * 7 + nodes - 1) // nodes * nodes * 8, ranks)}
    assert not set(touched) & set(dense)


def test_bytes_are_those_of_the_rows_that_travel(seed: int) -> None:
    """Two ranks, one table, row r on rank r % 2: counted by hand from the keys."""
    case = hc.HybridCase(seed=seed, rows=(40,), batches=(20,), dim=4, kinds=("row_wise",), dtype="float32")
    keys = hc.draw(case, np.random.default_rng(seed), 20).keys
    outcomes = rank_threads.run_ranks(2, lambda comm: hc.train(case, comm))
    own = [set(keys[:10].tolist()), set(keys[10:].tolist())]
    for rank, outcome in enumerate(outcomes):
        other = 1 - rank
        asks = sum(key % 2 == other for key in own[rank])
        gives = sum(key % 2 == rank for key in own[other])
        expected = {"input_dist": 24 + 4 * asks, "output_dist": 16 * gives, "grad_dist": 16 * asks, "all_reduce": 0}
        assert outcome.sent[0] == expected
    halves = rank_threads.run_ranks(2, lambda comm: hc.train(replace(case, precision="fp16"), comm))
    assert [o.sent[0]["output_dist"] * 2 for o in halves] == [o.sent[0]["output_dist"] for o in outcomes]


def test_column_parts_are_refused_where_the_optimiser_needs_whole_rows() -> None:
    spec = TableSpec(name="colour", rows=9, dim=4)
    plan = Plan(specs=(spec,), placements=(Placement(kind="column_wise", owners=(0, 0)),), ranks=1)
    with pytest.raises(ConfigError, match="table 'colour': column_wise does not go with rowwise_adagrad"):
        HybridEmbedding(
            specs=(spec,), plan=plan, comm=SingleComm(), device=HostDevice(1), seed=1, first=0,
            optimizer=OptimizerConfig(kind="rowwise_adagrad"), dtype=np.float32,
        )  # fmt: skip


def on_ranks(ranks: int, work: Callable[[Any, HybridEmbedding], None], case: hc.HybridCase = MIXED) -> None:
    rank_threads.run_ranks(ranks, lambda comm: work(comm, hc.build(case, comm)))


def test_a_key_outside_its_table_ends_the_batch() -> None:
    def work(comm: Any, embedding: HybridEmbedding) -> None:
        buffers = embedding.buffers(1, np.zeros((1, 7, 6)))
        keys = np.array([0, 3, 0, 0, 0, 0], np.int32)
        embedding.input_dist(Jagged(keys, None, None, 6, 1), buffers, comm.size)

    with pytest.raises(DataError, match=r"table 't1': key 3 lies outside its 3 rows"):
        on_ranks(2, work)


def test_ranks_that_disagree_about_a_batch_find_out() -> None:
    def work(comm: Any, embedding: HybridEmbedding) -> None:
        total = 4 if comm.rank == 0 else 5
        rows = share_of(total, 2, comm.rank)
        buffers = embedding.buffers(5, np.zeros((5, 7, 6)))
        embedding.input_dist(Jagged(np.zeros(6 * rows, np.int32), None, None, 6, rows), buffers, total)

    with pytest.raises(CommError, match="rows of this batch"):
        on_ranks(2, work)


def test_stages_out_of_order_and_wrong_arrays_are_refused() -> None:
    embedding = hc.build(MIXED, SingleComm())
    with pytest.raises(ConfigError, match="vectors: "):
        embedding.buffers(3, np.zeros((3, 6, 6)))
    buffers = embedding.buffers(3, np.zeros((3, 7, 6)))
    for stage in (embedding.lookup, embedding.output_dist):
        with pytest.raises(ConfigError, match="input_dist has not been called"):
            stage(buffers)
    with pytest.raises(ConfigError, match="grad_vectors: None"):
        embedding.grad_dist(buffers)


def test_looking_up_only_reduces_nothing() -> None:
    def work(comm: Any, embedding: HybridEmbedding) -> None:
        vectors = np.zeros((1, 7, 6))
        buffers = embedding.buffers(1, vectors)
        embedding.input_dist(Jagged(np.zeros(6, np.int32), None, None, 6, 1), buffers, comm.size)
        embedding.lookup(buffers)
        embedding.output_dist(buffers)
        firsts = {s.table: s.weight[0] for s in embedding.shards() if s.rows.start == 0 and s.columns.start == 0}
        assert {"t0", "t3"} <= firsts.keys()
        for table, row in firsts.items():
            np.testing.assert_array_equal(vectors[0, 1 + int(table[1])][: len(row)], row)
        assert embedding.bytes_sent(buffers)["all_reduce"] == 0

    on_ranks(3, work)


@settings(max_examples=30, deadline=None)
@given(ranks=st.integers(1, 5), case=ANY_CASE)
def test_every_row_starts_from_its_name_wherever_it_lies(ranks: int, case: hc.HybridCase) -> None:
    if case.kind == "rowwise_adagrad":
        case = replace(case, kind="sgd")

    def shards(comm: Any) -> hc.Outcome:
        embedding = hc.build(case, comm)
        embedding.settle()  # a replica that started from anything but its home would show
        held = embedding.shards()
        return hc.Outcome([], [(s.table, s.rows, s.columns, s.replicated, {"weight": s.weight}) for s in held], [])

    tables = hc.whole_tables(case, rank_threads.run_ranks(ranks, shards))
    for i, rows in enumerate(case.rows):
        expected = uniform_rows(case.seed, f"table.t{i}", rows, case.dim, np.float64, scale=1 / math.sqrt(rows))
        np.testing.assert_array_equal(tables[f"t{i}.weight"], expected)
