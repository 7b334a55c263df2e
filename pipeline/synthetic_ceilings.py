"""What models of three kinds can reach on synthetic rows.

Shapes: B rows, T tables, H key columns of all tables, R rows of all tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embedding.comm import SingleComm
from pipeline.manifest import Ceilings
from pipeline.metrics import evaluate_scores

Floats = NDArray[np.float64]

BASE_RATE = 0.25
_FIT_SWEEPS = 8
_PRIOR_ROWS = 25.0  # what a table row's additive function is held to the teacher's effect with


class TeacherTables(Protocol):
    """What a ceiling needs to know about the teacher.

    Attributes:
        bias: the logit's constant.
        effects: [R] float32.
        hotness: [T] int64.
        columns: [T + 1], first key column of each table.
        table_starts: [T + 1], first row of each table in ``effects``.
    """

    bias: float
    effects: NDArray[np.float32]
    hotness: NDArray[np.int64]
    columns: NDArray[np.int64]
    table_starts: NDArray[np.int64]


class Sample:
    """Keys, labels and the teacher's parts of the first rows of a split."""

    def __init__(self, limit: int) -> None:
        """Room for ``limit`` rows."""
        self._room = limit
        self._labels: list[NDArray[np.int32]] = []
        self._keys: list[NDArray[np.int32]] = []
        self._parts: list[Floats] = []

    def add(self, words: NDArray[np.int32], parts: Floats, num_dense: int) -> None:
        """Take over Raw rows [B, V] and parts [B, 3] until there are enough."""
        take = min(self._room, words.shape[0])
        if take:
            self._labels.append(words[:take, 0].copy())
            self._keys.append(words[:take, 1 + num_dense :].copy())
            self._parts.append(parts[:take].copy())
            self._room -= take

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int32], Floats]:
        """Labels [B], keys [B, H] and parts [B, 3]."""
        return np.concatenate(self._labels), np.concatenate(self._keys), np.concatenate(self._parts)

    @property
    def empty(self) -> bool:
        """Whether there are no rows."""
        return not self._labels


def compute_ceilings(teacher: TeacherTables, fit: Sample, test: Sample, *, control: bool) -> Ceilings | None:
    """AUC on the test split of the three best models of their kind.

    ``best`` ranks by the true probability. ``dense_only``: the keys are independent of x, so that P(label | x) =
    E sigmoid(dense(x) + z) rises with dense(x), and ranking by dense(x) is the best that x allows.
    ``best_additive``: the logistic model f_0(dense(x)) + sum_t f_t[k_t] that is nearest to the true probability (the
    least expected log loss, fitted to probabilities, not labels, on training rows, see ``_fit_additive``), or the
    teacher without its interactions, whichever ranks the test split better.

    Returns:
        ``None`` where the test split is missing or has one class only.
    """
    if test.empty:
        return None
    labels, keys, parts = test.arrays()
    if labels.min() == labels.max():
        return None
    dense_only = _auc(parts[:, 2], labels)
    if control:
        return Ceilings(best=dense_only, best_additive=dense_only, dense_only=dense_only)
    additive = _auc(parts[:, 1], labels)
    if not fit.empty:
        predict = _fit_additive(teacher, *fit.arrays()[1:])
        additive = max(additive, _auc(predict(keys, parts), labels))
    return Ceilings(best=_auc(parts[:, 0], labels), best_additive=additive, dense_only=dense_only)


def _fit_additive(
    teacher: TeacherTables, keys: NDArray[np.int32], parts: Floats
) -> Callable[[NDArray[np.int32], Floats], Floats]:
    """Fit f_0(dense(x)) + sum_t f_t[k_t] to the true probabilities by block-wise Newton steps.

    f_0 is a step function over 64 quantiles added to dense(x), f_t starts at the teacher's effects and is held to
    them by a prior worth a few rows, so that rare keys are not fitted to the interactions of the few rows that
    they happen to meet. One sweep takes each block's Newton step in turn (diagonal within a block).

    Args:
        teacher: its tables and effects.
        keys: [B, H].
        parts: [B, 3], the teacher's logit, additive and dense part.

    Returns:
        The fitted logit as a function of keys and parts.
    """
    target = sigmoid(parts[:, 0])
    edges = np.quantile(parts[:, 2], np.linspace(0, 1, 65)[1:-1])
    functions = [np.zeros(edges.size + 1)]
    functions += [
        teacher.effects[start:stop] / np.sqrt(hotness)
        for start, stop, hotness in zip(
            teacher.table_starts[:-1], teacher.table_starts[1:], teacher.hotness, strict=True
        )
    ]
    functions = [function.astype(np.float64) for function in functions]

    def blocks(some_keys: NDArray[np.int32], some_parts: Floats) -> list[NDArray[np.int64]]:
        bins = np.searchsorted(edges, some_parts[:, 2])[:, None]
        tables = zip(teacher.columns[:-1], teacher.columns[1:], strict=True)
        return [bins, *(some_keys[:, start:stop].astype(np.int64) for start, stop in tables)]

    def predict(some_keys: NDArray[np.int32], some_parts: Floats) -> Floats:
        total = teacher.bias + some_parts[:, 2]
        for function, block in zip(functions, blocks(some_keys, some_parts), strict=True):
            total = total + function[block].sum(axis=1)
        return total

    logit = predict(keys, parts)
    anchors = [function.copy() for function in functions]
    prior = _PRIOR_ROWS * BASE_RATE * (1 - BASE_RATE)
    own = blocks(keys, parts)
    for _ in range(_FIT_SWEEPS):
        for function, anchor, block in zip(functions, anchors, own, strict=True):
            probability = sigmoid(logit)
            width = block.shape[1]
            flat = block.reshape(-1)
            residual = np.bincount(flat, np.repeat(target - probability, width), function.size)
            # Bags of several keys move together: their curvature counts once for each of them.
            curvature = np.bincount(flat, np.repeat(probability * (1 - probability) * width, width), function.size)
            step = (residual - prior * (function - anchor)) / (curvature + prior)
            function += step
            logit += step[block].sum(axis=1)
    return predict


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    result: Floats = 1.0 / (1.0 + np.exp(-np.clip(logits, -60.0, 60.0)))
    return result


def _auc(scores: Floats, labels: NDArray[np.int32]) -> float:
    metrics, _ = evaluate_scores(scores, labels, SingleComm())
    assert metrics.auc is not None  # both classes are there, as compute_ceilings saw
    return metrics.auc
