"""How far a run has come, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dlrm.config import RunConfig
from pipeline.row_order import steps_per_epoch

Reason = Literal["finished", "target", "early_stop", "stopped"]
HIGHER_IS_BETTER = frozenset({"auc", "accuracy"})
"""Of the metrics that a rule may look at; the others are better the lower they are."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
        directory: the run's folder.
        step: steps made in all.
        reason: why it ended.
        checkpoint: the weights that were evaluated last, or the state that a stop left.
        report: the evaluation report on rank 0; empty elsewhere and after a stop.
    """

    directory: Path
    step: int
    reason: Reason
    checkpoint: Path
    report: dict[str, Any]


@dataclass(slots=True)
class Course:
    """What a checkpoint keeps of the run beside the weights."""

    step: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    timed_samples: int = 0
    samples: int = 0
    best: float | None = None
    best_step: int = 0
    evaluated_step: int = 0
    evaluations_since_best: int = 0
    ended: Reason | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    stages: dict[str, list[float]] = field(default_factory=dict)


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether a value of a metric is better than another one."""
    return value > best if metric in HIGHER_IS_BETTER else value < best


def planned_steps(config: RunConfig, rows: int) -> int:
    """Steps of a run, from its beginning, over a split of so many rows."""
    train, data = config.train, config.data
    limits = []
    if train.epochs is not None:
        limits.append(train.epochs * steps_per_epoch(rows, data.batch_size, data.drop_last))
    if train.max_steps is not None:
        limits.append(train.max_steps)
    return min(limits)


def planned_samples(config: RunConfig, rows: int, steps: int) -> int:
    """Rows that so many steps train on."""
    data = config.data
    per_epoch = steps_per_epoch(rows, data.batch_size, data.drop_last)
    epochs, rest = divmod(steps, max(per_epoch, 1))
    return epochs * min(rows, per_epoch * data.batch_size) + rest * data.batch_size
