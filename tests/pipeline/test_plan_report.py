"""What a report tells of a plan: predicted against measured, and why not another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dlrm.config import OptimizerConfig
from embedding.frequency import Frequency
from embedding.placement import Plan, TableSpec
from embedding.plan import make_plan
from pipeline.plan_report import plan_choice, why

SPECS = (TableSpec(name="large", rows=4000, dim=8), TableSpec(name="small", rows=5, dim=8))


def plan_of(**forced: Any) -> Plan:
    return make_plan(
        SPECS, 4, 2, batch_size=128, optimizer=OptimizerConfig(),
        frequencies={spec.name: Frequency.power_law(spec.rows, 1.1) for spec in SPECS}, **forced,
    )  # fmt: skip


def test_the_lane_is_predicted_and_measured(rng: np.random.Generator) -> None:
    plan = plan_of()
    names = ("input_dist", "lookup", "output_dist", "grad_dist", "sparse_update")
    stages = dict(zip(names, rng.uniform(0.1, 5, 5).tolist(), strict=True))
    facts = plan_choice(plan, {**stages, "top_forward": 100.0})
    assert facts["embedding_lane_measured_ms"] == pytest.approx(sum(stages.values()))
    assert facts["embedding_lane_predicted_ms"] == pytest.approx(1e3 * sum(dict(plan.seconds).values()))
    assert facts["plan_chosen"] == plan.label
    for name, _ in plan.alternatives:
        assert name in facts["plans_predicted"]
    assert "embedding_lane_measured_ms" not in plan_choice(plan, None)


def test_the_reason_names_the_best_plan_of_the_other_sort() -> None:
    apart = plan_of(placements={spec.name: "row_wise" for spec in SPECS}, deduplicate=True)
    timed = replace(apart, trials=((apart.label, 0.004, 0.005), ("2 hybrid; flat", 0.003, 0.007)))
    assert why(timed) == (
        "replicating no rows: measured 5 ms a step, against 7 ms of the best plan otherwise (2 hybrid; flat)"
    )
    assert "measured 7 ms" in plan_choice(timed, None)["plans_timed"]
    predicted = replace(
        apart, alternatives=(("row_wise", 0.01), ("hybrid", 0.02), ("replicated", 0.03)), step_seconds=0.01
    )
    assert why(predicted).endswith("predicted 10 ms a step, against 20 ms of the best plan otherwise (hybrid)")
    everywhere = plan_of(placements={spec.name: "replicated" for spec in SPECS})
    both = replace(everywhere, alternatives=(("row_wise", 0.01), ("replicated", 0.03)), step_seconds=0.03)
    assert why(both).startswith("replicating frequent rows: predicted 30 ms a step, against 10 ms")
    forced = replace(everywhere, alternatives=(("replicated", 0.03),))
    assert why(forced) == "replicating frequent rows: everything else is forced or does not fit the memory"


def test_one_rank_has_nothing_to_choose() -> None:
    plan = make_plan(SPECS, 1, batch_size=128, optimizer=OptimizerConfig())
    assert plan_choice(plan, {"lookup": 1.0}) == {}
