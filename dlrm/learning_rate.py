"""The learning rate of a step: linear warm-up, plateau, polynomial decay."""

from __future__ import annotations

import math

from dlrm.config import LearningRateConfig


def learning_rate(config: LearningRateConfig, base: float, step: int) -> float:
    """The learning rate of one step.

    ``base * step / warmup`` up to the end of the warm-up, ``base`` up to ``decay_start``, then
    ``max(end_lr, base * ((decay_start + decay_steps - step) / decay_steps) ** power)``, then ``end_lr``.

    Args:
        config: lengths of the phases, in steps.
        base: the optimiser's learning rate.
        step: step of the run, from 1.

    Source: HugeCTR's learning-rate scheduler, which MLPerf's DLRM reference shares.
    """
    if step <= config.warmup_steps:
        return base * step / config.warmup_steps
    if not config.decay_start or step <= config.decay_start:
        return base
    left = config.decay_start + config.decay_steps - step
    if left < 0:
        return config.end_lr
    return max(config.end_lr, base * math.pow(left / config.decay_steps, config.decay_power))
