"""What a report tells of the choice of a plan: what was predicted, what was measured, and why not another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedding.placement import Plan
from pipeline.stages import S
from pipeline.trace import EMBEDDING_LANE

_REPLICATING = ("hybrid", "replicated")


def plan_summary(plan: Plan) -> dict[str, Any]:
    """What a progress record tells of the plan that a run follows, as JSON values."""
    return {
        "label": plan.label,
        "nodes": plan.nodes,
        "all_to_all": plan.all_to_all,
        "predicted_ms": None if plan.step_seconds is None else 1e3 * plan.step_seconds,
        "parts_ms": {name: 1e3 * seconds for name, seconds in plan.seconds},
    }


def plan_choice(plan: Plan, stages_ms: Mapping[str, float] | None) -> dict[str, Any]:
    """Facts for the report of a run; nothing for one rank, which exchanges nothing.

    Args:
        plan: of the run.
        stages_ms: mean milliseconds a step by stage on rank 0; ``None``: nothing was trained.
    """
    if plan.ranks == 1:
        return {}
    facts: dict[str, Any] = {"plan_chosen": plan.label}
    if plan.step_seconds is not None:
        facts["embedding_lane_predicted_ms"] = 1e3 * plan.step_seconds
    if stages_ms:
        lane = [stage for stage in S if stage in EMBEDDING_LANE]
        facts["embedding_lane_measured_ms"] = sum(stages_ms.get(str(stage), 0.0) for stage in lane)
    if plan.alternatives or plan.trials:
        facts["plan_reason"] = why(plan)
    if plan.trials:
        facts["plans_timed"] = "; ".join(
            f"{label}: predicted {_ms(expected)}, measured {_ms(measured)}" for label, expected, measured in plan.trials
        )
    if plan.alternatives:
        facts["plans_predicted"] = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in plan.alternatives)
    return facts


def why(plan: Plan) -> str:
    """One sentence: why this plan, and what became of the best one of the other sort (with or without replicas)."""
    alternatives = {name: seconds for name, seconds in plan.alternatives if name != "any"}  # either sort
    if plan.trials:
        times = {label: measured for label, _, measured in plan.trials}
        manner, own = "measured", times[plan.label]
    else:
        times = alternatives
        manner, own = "predicted", plan.step_seconds or 0.0
    replicates = any(placement.threshold for placement in plan.placements)
    others = {name: seconds for name, seconds in times.items() if _replicates(name) != replicates}
    chosen = "replicating frequent rows" if replicates else "replicating no rows"
    if not others:  # timed plans are all of this sort: the model alone spoke against the other one
        others = {name: seconds for name, seconds in alternatives.items() if _replicates(name) != replicates}
        manner, own = "predicted", plan.step_seconds or 0.0
    if not others:
        return f"{chosen}: everything else is forced or does not fit the memory"
    best = min(others, key=others.__getitem__)
    return f"{chosen}: {manner} {_ms(own)} a step, against {_ms(others[best])} of the best plan otherwise ({best})"


def _replicates(name: str) -> bool:
    """Whether a plan of this name or label replicates rows."""
    return any(kind in name for kind in (*_REPLICATING, "any rows"))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
