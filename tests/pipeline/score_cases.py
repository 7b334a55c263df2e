"""Scores and groups for the tests of metrics, by name; loaded with ``runpy`` from other test folders."""

from __future__ import annotations

from typing import Any

import numpy as np

KINDS = ("distinct", "tied", "one score", "zeros of both signs", "extreme", "positives", "negatives")


def scored_rows(kind: str, size: int, rng: np.random.Generator, dtype: Any = np.float32) -> tuple[Any, Any]:
    """Scores [size] and their labels [size] float32."""
    scores = rng.normal(-2, 1.5, size)
    if kind == "tied":
        scores = np.round(scores, 1)
    elif kind == "one score":
        scores[:] = rng.normal()
    elif kind == "zeros of both signs":
        scores = rng.choice([-0.0, 0.0, 1e-45, -1e-45, 0.25], size)
    elif kind == "extreme":
        scores *= 10.0 ** rng.integers(-40, 38, size)
    labels = rng.random(size) < 1 / (1 + np.exp(-np.clip(scores, -2, 2)))
    if kind in ("positives", "negatives"):
        labels[:] = kind == "positives"
    return scores.astype(dtype), labels.astype(np.float32)


def grouped(scores: Any, labels: Any, count_type: Any = np.int32) -> tuple[Any, Any, Any]:
    """Scores, rows below and positives below of the groups, by NumPy's own functions."""
    found, places, rows = np.unique(scores, return_inverse=True, return_counts=True)
    positives = np.bincount(places, labels, len(found))
    below = [np.concatenate(([0], np.cumsum(counts))).astype(count_type) for counts in (rows, positives)]
    return found, below[0], below[1]
