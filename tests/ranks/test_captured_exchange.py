"""Tables over ranks that exchange lists of fixed capacity, on the CPU: threads and MPI."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import exchange_cases as xc
import numpy as np
import pytest
import rank_threads

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.errors import ConfigError
from embedding.batch_cost import capacity_bytes
from embedding.captured_exchange import ExchangedEmbedding
from embedding.captured_placement import MostRows, owner_shares, pair_capacities
from embedding.column_groups import column_groups
from embedding.comm import SingleComm
from embedding.comm_counting import CountingComm
from embedding.frequent_rows import places_of_rows
from embedding.placement import Placement, Plan, TableSpec, node_of_ranks
from embedding.topology import share_of


@pytest.mark.parametrize("case", xc.CASES, ids=lambda case: f"{case.seed}-{case.kind}")
def test_ranks_train_as_one(case: xc.ExchangeCase) -> None:
    ranks = 2 + case.seed % 3 if case.nodes == 1 else 4
    outcomes = rank_threads.run_ranks(ranks, lambda comm: xc.train(case, comm))
    xc.check_all(case, outcomes)
    assert (outcomes[0].overflows > 0) == (case.short < 1)


@pytest.mark.parametrize(("nodes", "ranks"), [(2, 4), (2, 8), (4, 8), (3, 3)])
def test_exchange_by_nodes(nodes: int, ranks: int, seed: int) -> None:
    case = xc.ExchangeCase(seed=seed, nodes=nodes, batches=(96, 96, 13, 96))
    by_node = rank_threads.run_ranks(ranks, lambda comm: xc.train(case, comm))
    flat = rank_threads.run_ranks(ranks, lambda comm: xc.train(replace(case, nodes=1), comm))
    xc.check_all(case, by_node)
    for one, other in zip(by_node, flat, strict=True):
        np.testing.assert_array_equal(one.vectors[0], other.vectors[0])


@pytest.mark.parametrize("form", ["flat", "by node", "once", "once, by node", "touched"])
@pytest.mark.parametrize(
    ("ranks", "nodes", "precision", "kinds"),
    [(2, 1, "fp32", None), (3, 3, "fp32", None), (4, 2, "fp32", xc.CUT), (4, 2, "bf16", None), (6, 2, "fp32", xc.CUT)],
)
def test_bytes_are_those_of_the_capacities(
    ranks: int, nodes: int, precision: str, kinds: tuple[str, ...] | None, form: str, seed: int
) -> None:
    """What the formula says, what the tables say and what reached the carrier on both levels, whatever the keys are."""
    by_node, once = "by node" in form, "once" in form
    case = xc.ExchangeCase(
        seed=seed, precision=precision, nodes=nodes if by_node else 1, batches=(300, 300, 300),
        kinds=kinds or xc.ExchangeCase.kinds, dim=16, once=once, touched=form == "touched",
        rows=(900, 3, 90, 800, 9, 40),
    )  # fmt: skip
    plan, keys = xc.plan_of(case, ranks), xc.draw(case)[0][0]
    plan = replace(plan, nodes=nodes, all_to_all="hierarchical" if by_node and nodes > 1 else "flat")
    lists = xc.lists_of(case, plan)
    keys = np.stack([places_of_rows(own, lists.get(f"t{i}")) for i, own in enumerate(keys)])
    shares, node_of = owner_shares(plan, list(keys)), node_of_ranks(ranks, nodes)
    members = [[rank for rank in range(ranks) if node_of[rank] == node] for node in range(nodes)]
    expected: dict[str, Any] = {}
    for group in column_groups(plan, range(len(case.rows)), case.first):
        whole = group.parts == 1
        most = xc.most_rows(case, plan, keys, members if by_node else None) if whole else MostRows()
        touched = most.touched
        assert touched is None or touched < sum(placement.threshold for placement in plan.placements)
        rows, own = share_of(300, ranks, 0), shares[list(group.tables)]
        found = capacity_bytes(
            group.plan, pair_capacities(group.plan, rows, own, features=group.features.tolist()),
            exchange_itemsize=4 if precision == "fp32" else 2,
            distinct=most.distinct, once=most.once, touched=touched,
        )  # fmt: skip
        expected = {name: expected.get(name, 0) + values for name, values in found.items()}

    def work(comm: Any) -> tuple[list[tuple[int, int]], dict[str, int]]:
        counting = CountingComm(comm, node_of)
        trainer = xc.Trainer(case, counting, HostDevice(compiled=False))
        sent = []
        for number in range(len(case.batches)):
            buffers = trainer.upload(number)
            trainer.input_dist(number)
            trainer.set_up(number)
            counting.traffic.clear()
            trainer.step(buffers)
            sent.append((counting.traffic.bytes_inside, counting.traffic.bytes_across))
        return sent, trainer.embedding.bytes_sent(buffers)

    for rank, (sent, told) in enumerate(rank_threads.run_ranks(ranks, work)):
        assert told == {name: int(values[rank]) for name, values in expected.items() if name != "across"}
        across = int(expected["across"][rank])
        if node_of[rank] != node_of[(rank + 1) % ranks]:  # reductions count as rings
            across += told["all_reduce"]
        assert sent == [(sum(told.values()) - across, across)] * len(case.batches)


def test_nodes_of_different_sizes_are_refused() -> None:
    case = xc.ExchangeCase(seed=1, nodes=2)
    with pytest.raises(ConfigError, match="nodes of one size, not of 2, 1 ranks"):
        rank_threads.run_ranks(3, lambda comm: xc.train(case, comm))


def test_fresh_tables_and_batches(rng: np.random.Generator) -> None:
    case = xc.ExchangeCase(
        seed=int(rng.integers(2**32)),
        rows=tuple(rng.integers(1, 900, 6).tolist()),
        kinds=tuple(rng.choice(["row_wise", "table_wise", "replicated"], 6).tolist()),
        batches=tuple(rng.integers(1, 1400, 3).tolist()),
        deterministic=bool(rng.integers(2)),
        first=int(rng.integers(2)),
    )
    outcomes = rank_threads.run_ranks(int(rng.integers(1, 6)), lambda comm: xc.train(case, comm))
    xc.check_all(case, outcomes)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one_over_mpi(ranks: int, mpirun: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = mpirun(ranks, str(Path(__file__).with_name("exchange_main.py")))
    assert done.returncode == 0, done.stderr
    assert f"all exchanges hold on {ranks} ranks" in done.stdout


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(kind="column_wise", owners=(0, 0)), "in 2 parts of 2 columns, but between GPUs"),
        (Placement(kind="hybrid", threshold=2, listed=True), "its list of frequent rows must hold 2 distinct ones"),
    ],
)
def test_what_it_does_not_do_is_refused(placement: Placement, message: str) -> None:
    specs = (TableSpec(name="c7", rows=9, dim=4),)
    with pytest.raises(ConfigError, match=f"table 'c7': .*{message}"):
        ExchangedEmbedding(
            plan=Plan(specs=specs, placements=(placement,), ranks=1), comm=SingleComm(), topology=None,
            device=HostDevice(compiled=False), optimizer=OptimizerConfig(), table_dtype=np.float32, seed=1, first=0,
            deterministic=False,
        )  # fmt: skip
