"""Timing of one repetition: standard library only, shared by every peer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any


def repeat(
    step: Callable[[int], object],
    *,
    warmup_s: float,
    measure_s: float,
    on_start: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Run ``step(number)`` for a warm-up, then for the time measured.

    Args:
        step: one training step (or one set of products); gets 0, 1, 2, ...
        warmup_s: seconds before the measurement, and at least three steps.
        measure_s: seconds of the measurement, and at least three steps.
        on_start: called between the two.

    Returns:
        ``steps``, ``seconds`` of all measured steps together, and ``best_step_s``.
    """
    number = 0
    start = time.perf_counter()
    while number < 3 or time.perf_counter() - start < warmup_s:
        step(number)
        number += 1
    if on_start is not None:
        on_start()
    steps, best = 0, float("inf")
    start = last = time.perf_counter()
    while steps < 3 or last - start < measure_s:
        step(number)
        number += 1
        steps += 1
        now = time.perf_counter()
        best = min(best, now - last)
        last = now
    return {"steps": steps, "seconds": last - start, "best_step_s": best}


def report(**values: Any) -> None:
    """Hand the result to ``cpu_train.py``: the last line of standard output."""
    print(json.dumps(values), flush=True)
