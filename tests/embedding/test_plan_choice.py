"""The choice of placements: what is fastest, what is forced, what fits, what cannot be."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_threads import run_ranks

from dlrm.config import OptimizerConfig
from dlrm.errors import ConfigError
from embedding.exchange_cost import Shape
from embedding.frequency import Frequency
from embedding.links import DEFAULT, Link, LinkRates, WorkRates
from embedding.plan import (
    Forced,
    Placement,
    Plan,
    TableSpec,
    make_plan,
    node_of_ranks,
    owned_rows,
    plan_from_values,
)
from embedding.plan_search import spread
from embedding.plan_trial import plans_on_first_rank
from embedding.reduce_way import ReduceWay

SGD = OptimizerConfig(kind="sgd")
ROWWISE = OptimizerConfig(kind="rowwise_adagrad")
KINDS = ["replicated", "table_wise", "row_wise", "column_wise", "hybrid"]


def links_of(inside: float, across: float, latency: float = 0.0) -> LinkRates:
    near, far = Link(inside, latency), Link(across, latency)
    return LinkRates(inside=near, across=far, inside_reduce=near, across_reduce=far, work=WorkRates(1e12, 1e-12))


def criteo_like(dim: int = 32) -> tuple[list[TableSpec], dict[str, Frequency]]:
    rows = [398_844, 390, 172, 3, 71, 15, 385_329, 29_535, 10, 22, 155, 4, 256_412, 5_859]
    specs = [TableSpec(name=f"C{i}", rows=count, dim=dim) for i, count in enumerate(rows)]
    return specs, {spec.name: Frequency.power_law(spec.rows, 1.1) for spec in specs}


@given(rows=st.integers(1, 500), threshold=st.integers(0, 500), ranks=st.integers(1, 9))
def test_every_infrequent_row_has_one_owner_and_one_place(rows: int, threshold: int, ranks: int) -> None:
    threshold = min(threshold, rows)
    places = [((row - threshold) % ranks, (row - threshold) // ranks) for row in range(threshold, rows)]
    assert len(set(places)) == len(places)
    for rank in range(ranks):
        own = sorted(place for owner, place in places if owner == rank)
        assert own == list(range(owned_rows(rows, threshold, ranks, rank)))


@given(ranks=st.integers(1, 40), nodes=st.integers(1, 40))
def test_nodes_are_contiguous_and_even(ranks: int, nodes: int) -> None:
    nodes = min(nodes, ranks)
    places = node_of_ranks(ranks, nodes)
    assert places == sorted(places)
    sizes = np.bincount(places, minlength=nodes)
    assert sizes.max() - sizes.min() <= 1


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=25)
@given(
    rows=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    ranks=st.integers(1, 5),
    kinds=st.lists(st.sampled_from([None, *KINDS]), min_size=6, max_size=6),
    nodes=st.integers(1, 2),
)
def test_plans_hold_every_row_and_obey_what_is_forced(
    rows: list[int], ranks: int, kinds: list[str | None], nodes: int
) -> None:
    specs = [TableSpec(name=f"t{i}", rows=count, dim=12) for i, count in enumerate(rows)]
    forced: Any = {spec.name: kind for spec, kind in zip(specs, kinds, strict=False) if kind}
    if ranks == 5:  # 12 columns go into 4 parts
        nodes = 1
    plan = make_plan(
        specs, ranks, min(nodes, ranks), batch_size=64, optimizer=SGD, placements=forced,
        frequencies={spec.name: Frequency.power_law(spec.rows, 1.1) for spec in specs},
    )  # fmt: skip
    assert plan_from_values(json.loads(json.dumps(plan.to_values()))) == plan
    assert (plan.reduce_start_bytes > 0) == (ranks > 1)
    assert plan.memory().tolist() == [plan.rank_bytes(rank) for rank in range(ranks)]
    for spec, placement in zip(specs, plan.placements, strict=True):
        kind = forced.get(spec.name)
        if kind == "hybrid" and spec.rows == 1:
            assert placement.kind == "replicated"  # nothing lies between none and all
        elif kind:
            assert placement.kind == kind
        if placement.kind == "column_wise":
            assert len(set(placement.owners)) == len(placement.owners) == min(ranks, 4)
    assert len(plan.describe()) == len(specs)


def test_the_choice_is_never_predicted_slower_than_a_forced_plan() -> None:
    specs, frequencies = criteo_like()
    for batch in (256, 4096, 65536):
        for links in (DEFAULT, links_of(125e6, 125e6, 1e-4), links_of(450e9, 50e9, 3e-6)):
            common: dict[str, Any] = {
                "batch_size": batch, "optimizer": SGD, "frequencies": frequencies, "links": links,
            }  # fmt: skip
            auto = make_plan(specs, 4, 2, **common)
            assert auto.step_seconds is not None
            for kind in KINDS:
                for deduplicate in (False, True):
                    placements: Any = {spec.name: kind for spec in specs}
                    forced = make_plan(specs, 4, 2, placements=placements, deduplicate=deduplicate, **common)
                    assert forced.step_seconds is not None
                    assert auto.step_seconds <= forced.step_seconds * 1.001, (batch, kind, deduplicate)


def test_frequent_rows_are_replicated_where_all_reduce_is_cheap() -> None:
    specs = [TableSpec(name="t", rows=100_000, dim=32)]
    frequencies = {"t": Frequency.power_law(100_000, 1.3)}
    cheap = LinkRates(
        inside=Link(1e8, 0), across=Link(1e8, 0), inside_reduce=Link(1e11, 0), across_reduce=Link(1e11, 0)
    )
    plan = make_plan(
        specs, 4, batch_size=4096, optimizer=SGD, frequencies=frequencies, links=cheap, memory_limit_bytes=6_000_000
    )
    assert plan.placements[0].kind == "hybrid"
    assert plan.predictions[0].frequent_share > 0.5
    assert plan.describe()[0]["frequent_rows"] == plan.placements[0].threshold > 0


def test_even_look_ups_are_not_replicated() -> None:
    specs = [TableSpec(name="t", rows=1_000_000, dim=32)]
    frequencies = {"t": Frequency.power_law(1_000_000, 0.0)}
    plan = make_plan(specs, 4, batch_size=512, optimizer=SGD, frequencies=frequencies, links=links_of(1e8, 1e8))
    assert plan.placements[0].threshold == 0


def test_counts_by_row_do_as_well_as_binned_ones(rng: np.random.Generator) -> None:
    specs = [TableSpec(name="t", rows=3000, dim=8)]
    counts = np.sort(rng.geometric(0.01, 3000))[::-1]
    given_counts = make_plan(specs, 3, batch_size=99, optimizer=SGD, frequencies={"t": counts})
    binned = make_plan(specs, 3, batch_size=99, optimizer=SGD, frequencies={"t": Frequency.from_counts(counts, 3000)})
    assert given_counts == binned


def test_a_table_too_large_for_one_rank_is_cut() -> None:
    specs = [TableSpec(name="large", rows=100_000, dim=16), TableSpec(name="small", rows=100, dim=16)]
    whole = 100_000 * (16 * 4 + 4)
    plan = make_plan(specs, 4, batch_size=64, optimizer=SGD, memory_limit_bytes=whole // 3)
    assert plan.memory().max() <= whole // 3
    assert plan.placements[0].kind in ("row_wise", "hybrid", "column_wise")


@pytest.mark.parametrize("share", [1.02, 1.3, 3.0])
def test_memory_is_kept_wherever_it_can_be(share: float) -> None:
    specs, frequencies = criteo_like()
    least = sum(spec.rows for spec in specs) * (32 * 8 + 4) / 4
    plan = make_plan(
        specs, 4, batch_size=65536, optimizer=OptimizerConfig(kind="adagrad"), frequencies=frequencies,
        memory_limit_bytes=int(share * least), links=links_of(1e8, 1e8),
    )  # fmt: skip
    assert plan.memory().max() <= share * least


def test_a_limit_that_is_too_small_names_table_need_limit_and_remedy() -> None:
    """The need is that of the smallest plan, every table by rows, and no remedy that has been tried is named."""
    specs, frequencies = criteo_like()
    least, largest = (-(-rows // 4) * (32 * 4 + 4) / 2**20 for rows in (sum(s.rows for s in specs), specs[0].rows))
    with pytest.raises(ConfigError, match=r"rank 0: .* MiB of tables .* exceed 1.0 MiB; use more ranks") as caught:
        make_plan(specs, 4, batch_size=64, optimizer=SGD, frequencies=frequencies, memory_limit_bytes=2**20)
    sentence = str(caught.value)
    assert float(sentence.split()[2].replace(",", "")) == pytest.approx(least, rel=0.01)
    assert f"the largest is 'C0' with {largest:.1f} MiB" in sentence
    assert "row_wise" not in sentence


def test_a_forced_table_that_does_not_fit_is_told_of_row_wise() -> None:
    specs, _ = criteo_like()
    with pytest.raises(ConfigError, match=r"'C0'.*placement row_wise for 'C0', or raise embedding.memory_limit_mib"):
        make_plan(
            specs, 4, batch_size=64, optimizer=SGD, placements={"C0": "replicated"}, memory_limit_bytes=50 * 10**6
        )


@pytest.mark.parametrize(
    ("forced", "optimizer", "sentence"),
    [
        ({"C1": "column_wise"}, ROWWISE, "column_wise does not go with 'rowwise_adagrad'"),
        ({"C1": Forced(kind="hybrid", threshold=391)}, SGD, "threshold 391 lies outside its 390 rows"),
        ({"C1": Forced(kind="row_wise", threshold=3)}, SGD, "threshold 3 goes with hybrid"),
        ({"nowhere": "row_wise"}, SGD, "'nowhere': there is no such table"),
    ],
)
def test_forced_plans_that_cannot_be_are_refused(forced: Any, optimizer: OptimizerConfig, sentence: str) -> None:
    specs, _ = criteo_like()
    with pytest.raises(ConfigError, match=sentence):
        make_plan(specs, 4, batch_size=64, optimizer=optimizer, placements=forced)


def test_columns_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot cut dim 7 into equal parts for up to 4 ranks"):
        make_plan([TableSpec(name="t", rows=9, dim=7)], 4, batch_size=8, optimizer=SGD, placements={"t": "column_wise"})


def test_column_parts_between_gpus_are_multiples_of_four_columns() -> None:
    rules = {"batch_size": 8, "optimizer": SGD, "placements": {"t": "column_wise"}}
    for captured, parts in ((False, 8), (True, 4)):
        plan = make_plan([TableSpec(name="t", rows=9, dim=16)], 8, captured=captured, **rules)
        assert len(plan.placements[0].owners) == parts
    with pytest.raises(ConfigError, match="dim 6 into equal parts of a multiple of 4 columns for up to 8 ranks"):
        make_plan([TableSpec(name="t", rows=9, dim=6)], 8, captured=True, **rules)


def test_rowwise_adagrad_is_never_cut_by_columns_unasked() -> None:
    specs = [TableSpec(name="t", rows=50, dim=64)]
    plan = make_plan(specs, 4, batch_size=64, optimizer=ROWWISE, links=links_of(1e6, 1e6))
    assert plan.placements[0].kind != "column_wise"


@pytest.mark.parametrize(("threshold", "kind"), [(0, "row_wise"), (390, "replicated"), (17, "hybrid")])
def test_thresholds_at_the_ends_are_what_they_mean(threshold: int, kind: str) -> None:
    specs, _ = criteo_like()
    plan = make_plan(
        specs, 4, batch_size=64, optimizer=SGD, placements={"C1": Forced(kind="hybrid", threshold=threshold)}
    )
    assert plan.placements[1].kind == kind
    assert plan.placements[1].threshold == threshold


def test_one_rank_holds_everything_whole() -> None:
    specs, _ = criteo_like()
    plan = make_plan(specs, 1, batch_size=64, optimizer=SGD)
    assert {placement.kind for placement in plan.placements} == {"table_wise"}
    assert all(p.inside_bytes == p.across_bytes == 0 for p in plan.predictions)


@pytest.mark.parametrize(
    "wrong",
    [
        Placement(kind="hybrid", threshold=0),
        Placement(kind="hybrid", threshold=10),
        Placement(kind="replicated"),
        Placement(kind="row_wise", threshold=1),
        Placement(kind="table_wise", owner=2),
        Placement(kind="column_wise", owners=(0, 1, 0)),
        Placement(kind="column_wise", owners=(0, 2)),
        Placement(kind="column_wise"),
        Placement(kind="column_wise", owners=(0, 1), deduplicate=True),
        Placement(kind="diagonal"),  # type: ignore[arg-type]
    ],
)
def test_placements_that_cannot_be_are_refused(wrong: Placement) -> None:
    with pytest.raises(ConfigError, match="table 't'"):
        Plan(specs=(TableSpec(name="t", rows=10, dim=4),), placements=(wrong,), ranks=2)


def test_hierarchical_is_chosen_where_messages_between_nodes_are_dear() -> None:
    specs, frequencies = criteo_like()
    near = Link(1e10, 1e-6)
    for far, mode in ((Link(1e10, 1e-2), "hierarchical"), (Link(1e10, 1e-7), "flat")):
        links = LinkRates(inside=near, across=far, inside_reduce=near, across_reduce=far)
        plan = make_plan(
            specs, 16, 2, batch_size=4096, optimizer=SGD, frequencies=frequencies, links=links,
            placements={spec.name: "row_wise" for spec in specs},
        )  # fmt: skip
        assert plan.all_to_all == mode
    assert Shape(16, 2).messages("flat") == 2 * 8 * 8
    assert Shape(16, 2).messages("hierarchical") == 2 * 8


def test_column_parts_of_a_table_go_to_different_ranks() -> None:
    owners = spread([5.0, 5.0, 5.0, 1.0], [0.0] * 4, 3, apart=[0, 0, 0, 1])
    assert sorted(owners[:3]) == [0, 1, 2]


def test_all_ranks_get_the_first_ones_plan() -> None:
    specs, frequencies = criteo_like()

    def make() -> Plan:
        return make_plan(specs, 3, batch_size=64, optimizer=SGD, frequencies=frequencies)

    def on_rank(comm: Any) -> Plan:
        # Others have nothing to make it from.
        return plans_on_first_rank(comm, (lambda: [make()]) if comm.rank == 0 else lambda: pytest.fail("called"))[0]

    plans = run_ranks(3, on_rank)
    assert plans == [make()] * 3


def test_all_ranks_get_the_first_ones_error() -> None:
    def wrong() -> list[Plan]:
        raise ConfigError("no such plan")

    def on_rank(comm: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            plans_on_first_rank(comm, wrong)
        return str(caught.value)

    assert run_ranks(3, on_rank) == ["no such plan"] * 3


def test_a_plan_saved_before_starts_were_counted_sums_touched_rows(rng: np.random.Generator) -> None:
    """A run that goes on from such a checkpoint keeps its way; one saved now keeps its own, too."""
    rows = int(rng.integers(2, 50))
    specs = [TableSpec(name="t", rows=rows, dim=8)]
    plan = make_plan(specs, 4, batch_size=10**6, optimizer=SGD, placements={"t": "replicated"})
    values = json.loads(json.dumps(plan.to_values()))
    assert ReduceWay.of(plan_from_values(values), [0]) == ReduceWay.of(plan, [0])
    assert ReduceWay.of(plan, [0]).is_dense(rows, 10**6, 8, 4)
    for name in ("reduce_start_bytes", "batch_size"):
        del values[name]
    for prediction in values["predictions"]:
        del prediction["touched_rows"]
    assert not ReduceWay.of(plan_from_values(values), [0]).is_dense(rows, 10**6, 8, 4)
