"""Plans that are tried out: the fastest is kept, whatever was predicted."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from rank_threads import run_ranks

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from embedding import plan_trial
from embedding.frequency import Frequency
from embedding.jagged import Jagged
from embedding.placement import Placement, Plan, TableSpec, plan_from_values
from embedding.plan import make_plans
from embedding.plan_search import family_of
from embedding.plan_trial import Trial
from embedding.sparse_optim import KINDS
from embedding.topology import discover, share_of

SPECS = (TableSpec(name="large", rows=5000, dim=8), TableSpec(name="small", rows=9, dim=8))


def trial_of(comm: Any, nodes: int, rng: np.random.Generator, kind: str = "sgd", **more: Any) -> Trial:
    batches = []
    for rows in (64, 33):  # the second one is a short last batch
        own = share_of(rows, comm.size, comm.rank)
        keys = [(spec.rows * rng.random(own) ** 3).astype(np.int32) for spec in SPECS]
        batches.append((Jagged(np.concatenate(keys), None, None, len(SPECS), own), rows))
    return Trial(
        comm=comm, topology=discover(comm, nodes=nodes), device=HostDevice(1), first=1, batches=batches, steps=4,
        optimizer=OptimizerConfig(kind=kind), dtype=np.float32, **more,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_measures_and_keeps_the_same_plan(seed: int, kind: str) -> None:
    plans = make_plans(
        SPECS, 4, 2, batch_size=64, optimizer=OptimizerConfig(kind=kind),  # type: ignore[arg-type]
        frequencies={spec.name: Frequency.power_law(spec.rows, 1.1) for spec in SPECS},
    )  # fmt: skip
    assert 1 < len(plans) <= 4
    assert len({family_of(plan) for plan in plans}) == len(plans)
    predicted = [plan.step_seconds for plan in plans]
    assert predicted == sorted(predicted)  # type: ignore[type-var]
    found = run_ranks(4, lambda comm: trial_of(comm, 2, np.random.default_rng([seed, comm.rank]), kind).fastest(plans))
    assert all(plan == found[0] for plan in found)
    assert [trial[0] for trial in found[0].trials] == [plan.label for plan in plans]
    assert all(measured > 0 for _, _, measured in found[0].trials)
    assert plan_from_values(json.loads(json.dumps(found[0].to_values()))) == found[0]


@pytest.mark.parametrize(("times", "kept"), [((1.0, 0.5, 0.8), 1), ((1.0, 0.99, 0.98), 0), ((1.0, 0.98, 0.9), 2)])
def test_a_later_plan_has_to_be_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, times: tuple[float, ...], kept: int
) -> None:
    plans = [
        Plan(specs=SPECS, placements=(Placement(kind="table_wise", owner=owner),) * 2, ranks=3) for owner in range(3)
    ]
    measured = dict(zip(range(3), times, strict=True))
    monkeypatch.setattr(Trial, "seconds", lambda _, plan: measured[plan.placements[0].owner])

    def work(comm: Any) -> Plan:
        return trial_of(comm, 1, rng).fastest(plans)

    for plan in run_ranks(3, work):
        assert plan.placements == plans[kept].placements
        assert [seconds for _, _, seconds in plan.trials] == list(times)


def test_trials_do_not_last(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """A step that takes long is timed a few times only; one plan alone is not timed."""
    plan = Plan(specs=SPECS, placements=(Placement(kind="table_wise"),) * 2, ranks=1)
    steps: list[int] = []

    def count(_: Trial, embedding: Any, buffers: Any, keys: Any, global_rows: int, step: int) -> float:
        steps.append(step)
        return plan_trial._LONG_ENOUGH_S

    monkeypatch.setattr(Trial, "_step", count)

    def work(comm: Any) -> None:
        trial = trial_of(comm, 1, rng)
        assert trial.fastest([plan]) is plan
        assert steps == []
        assert trial.seconds(plan) == plan_trial._LONG_ENOUGH_S
        assert steps == [1, 2, 3, 4, 5]  # two to warm up, three timed

    run_ranks(1, work)
