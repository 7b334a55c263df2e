"""Launches of the CUDA kernels that sum over groups of equal scores; references in ``score_sums.py``.

Scores are float32, counts int32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import load

SOURCE = Path(__file__).with_name("score_sums.cu")
THREADS = 256
WAVES = 8
"""Blocks that a multiprocessor gets: each goes through many groups."""


def _launch(name: str, num_groups: int, *arguments: Any) -> None:
    kernel = load(SOURCE, name)
    kernel(min(-(-num_groups // THREADS), WAVES * kernel.multiprocessors), THREADS, *arguments)


def add_rank_statistic(rows_below: Any, positives_below: Any, doubled: Any) -> None:
    """See ``score_sums.add_rank_statistic``."""
    size = len(rows_below) - 1
    _launch("add_rank_statistic", size, rows_below, positives_below, np.int64(size), doubled)


def find_class_ends(rows_below: Any, positives_below: Any, found: Any) -> None:
    """See ``score_sums.find_class_ends``."""
    load(SOURCE, "find_class_ends")(1, 32, rows_below, positives_below, np.int64(len(rows_below) - 1), found)


def add_losses(scores: Any, rows_below: Any, positives_below: Any, shrink: float, sums: Any) -> None:
    """See ``score_sums.add_losses``."""
    size = len(scores)
    _launch("add_losses", size, scores, rows_below, positives_below, np.float64(shrink), np.int64(size), sums)


def add_bins(scores: Any, rows_below: Any, positives_below: Any, rows_before: int, num_rows: int, bins: Any) -> None:
    """See ``score_sums.add_bins``."""
    size = len(scores)
    shape = (np.int64(rows_before), np.int64(num_rows), np.int32(len(bins)), np.int64(size))
    _launch("add_bins", size, scores, rows_below, positives_below, *shape, bins)


def add_histogram(scores: Any, rows_below: Any, positives_below: Any, low: float, high: float, bins: Any) -> None:
    """See ``score_sums.add_histogram``."""
    size = len(scores)
    shape = (np.float64(low), np.float64(high), np.int32(bins.shape[1]), np.int64(size))
    _launch("add_histogram", size, scores, rows_below, positives_below, *shape, bins)


def add_precision(
    rows_below: Any, positives_below: Any, positives_above: int, negatives_above: int, limbs: Any
) -> None:
    """See ``score_sums.add_precision``."""
    size = len(rows_below) - 1
    above = (np.int64(positives_above), np.int64(negatives_above))
    _launch("add_precision", size, rows_below, positives_below, *above, np.int64(size), limbs)


def pick_points(
    rows_below: Any,
    positives_below: Any,
    positives_above: int,
    negatives_above: int,
    num_positives: int,
    num_negatives: int,
    positive_steps: int,
    negative_steps: int,
    points: Any,
    count: Any,
) -> None:
    """See ``score_sums.pick_points``."""
    size = len(rows_below) - 1
    numbers = (positives_above, negatives_above, num_positives, num_negatives, positive_steps, negative_steps, size)
    shape = (np.int64(number) for number in numbers)
    _launch("pick_points", size, rows_below, positives_below, *shape, points, count)
