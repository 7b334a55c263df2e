"""Sparse optimisers: the compiled form and the reference against one row at a time in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from embedding.sparse_optim import KINDS, UpdateScratch, bytes_per_row, state_specs, update_rows

DEVICES = {"compiled": HostDevice(2), "reference": HostDevice(1, compiled=False)}
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
NO_OFFSETS, NO_WEIGHTS = np.empty(0, np.int64), np.empty(0, np.float32)


class Problem:
    """Tables, a few steps of keys and gradients."""

    def __init__(
        self, rng: np.random.Generator, kind: str, dtype: str, *, hotness: int = 3, weighted: bool = True
    ) -> None:
        self.rows, self.num_rows, self.dim = np.array([12, 2, 300]), 31, int(rng.integers(1, 20))
        self.row_start = np.cumsum(self.rows) - self.rows
        self.mean, self.place = np.array([True, False, False]), np.array([2, 1, 3])
        self.optimizer = OptimizerConfig(
            kind=kind,  # type: ignore[arg-type]
            momentum=0.8,
            eps=1e-4,
            ftrl_beta=0.5,
            l1=0.01,
            l2=0.02,
            initial_accumulator=0.1,
        )
        total = int(self.rows.sum())
        self.weight = rng.standard_normal((total, self.dim)).astype(dtype)
        self.state = {
            item.name: np.full((total, 1 if item.per_row else self.dim), item.start, dtype)
            for item in state_specs(self.optimizer)
        }
        self.steps = [self._draw(rng, dtype, hotness, weighted) for _ in range(4)]

    def _draw(self, rng: np.random.Generator, dtype: str, hotness: int, weighted: bool) -> dict[str, Any]:
        bags = len(self.rows) * self.num_rows
        lengths = np.ones(bags, np.int64) if hotness == 1 else rng.integers(0, hotness + 1, bags)
        keys = rng.integers(0, self.rows[np.repeat(np.arange(bags) // self.num_rows, lengths)])
        return {
            "keys": keys.astype(np.int32),
            "offsets": NO_OFFSETS if hotness == 1 else np.concatenate([[0], np.cumsum(lengths)]),
            "key_weights": rng.uniform(-1, 2, len(keys)).astype(np.float32) if weighted else NO_WEIGHTS,
            "gradients": rng.standard_normal((self.num_rows, 4, self.dim)).astype(dtype),
        }

    def run(self, device: HostDevice) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        weight, state = self.weight.copy(), {name: array.copy() for name, array in self.state.items()}
        scratch = UpdateScratch.create(len(weight))
        for step, drawn in enumerate(self.steps, 1):
            update_rows(
                self.optimizer, weight, state, self.row_start, drawn["keys"], drawn["offsets"], drawn["key_weights"],
                self.mean, self.place, self.num_rows, drawn["gradients"],
                lr=0.1 * step, step=step, scratch=scratch, device=device,
            )  # fmt: skip
            assert (scratch.head == -1).all()
        return weight, state

    def gradient(self, drawn: dict[str, Any]) -> dict[int, np.ndarray]:
        """Sum over all occurrences, by row."""
        offsets = drawn["offsets"] if len(drawn["offsets"]) else np.arange(len(drawn["keys"]) + 1)
        result: dict[int, np.ndarray] = {}
        for table in range(len(self.rows)):
            for b in range(self.num_rows):
                begin, end = offsets[table * self.num_rows + b], offsets[table * self.num_rows + b + 1]
                for k in range(begin, end):
                    factor = float(drawn["key_weights"][k]) if len(drawn["key_weights"]) else 1.0
                    if self.mean[table]:
                        factor /= end - begin
                    row = int(self.row_start[table] + drawn["keys"][k])
                    part = factor * drawn["gradients"][b, self.place[table]].astype(np.float64)
                    result[row] = result.get(row, 0.0) + part
        return result

    def expected(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        weight = self.weight.astype(np.float64)
        state = {name: array.astype(np.float64) for name, array in self.state.items()}
        for step, drawn in enumerate(self.steps, 1):
            for row, g in self.gradient(drawn).items():
                step_row(self.optimizer, weight, state, row, g, 0.1 * step, step)
        return weight, state


def step_row(
    o: OptimizerConfig, w: np.ndarray, s: dict[str, np.ndarray], row: int, g: np.ndarray, lr: float, t: int
) -> None:
    """docs/design.md, line by line."""
    if o.kind == "sgd":
        w[row] -= lr * g
    elif o.kind == "momentum":
        s["velocity"][row] = o.momentum * s["velocity"][row] + g
        w[row] -= lr * s["velocity"][row]
    elif o.kind in ("adagrad", "rowwise_adagrad"):
        s["accumulator"][row] += g**2 if o.kind == "adagrad" else np.mean(g**2)
        w[row] -= lr * g / (np.sqrt(s["accumulator"][row]) + o.eps)
    elif o.kind == "adam":
        s["m"][row] = o.beta1 * s["m"][row] + (1 - o.beta1) * g
        s["v"][row] = o.beta2 * s["v"][row] + (1 - o.beta2) * g**2
        m, v = s["m"][row] / (1 - o.beta1**t), s["v"][row] / (1 - o.beta2**t)
        w[row] -= lr * m / (np.sqrt(v) + o.eps)
    else:
        for d in range(len(g)):
            n = s["n"][row, d] + g[d] ** 2
            sigma = (math.sqrt(n) - math.sqrt(s["n"][row, d])) / lr
            z = s["z"][row, d] = s["z"][row, d] + g[d] - sigma * w[row, d]
            s["n"][row, d] = n
            sign = math.copysign(1, z)
            w[row, d] = 0 if abs(z) <= o.l1 else -(z - sign * o.l1) / ((o.ftrl_beta + math.sqrt(n)) / lr + 2 * o.l2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_updates_follow_the_formulas(kind: str, form: str, dtype: str, rng: np.random.Generator) -> None:
    for hotness, weighted in ((3, True), (1, False)):
        problem = Problem(rng, kind, dtype, hotness=hotness, weighted=weighted)
        weight, state = problem.run(DEVICES[form])
        expected_weight, expected_state = problem.expected()
        assert weight.dtype == dtype
        # Sums of some fifty gradients cancel; FTRL's division by lr and its threshold pass that on.
        tolerance = TOLERANCE[dtype] * (20 if kind in ("ftrl", "adam") else 5)
        np.testing.assert_allclose(weight, expected_weight, rtol=tolerance, atol=tolerance)
        for name, array in state.items():
            np.testing.assert_allclose(array, expected_state[name], rtol=tolerance, atol=tolerance * 10, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", DEVICES)
def test_rows_that_no_bag_names_keep_their_bits(kind: str, form: str, rng: np.random.Generator) -> None:
    problem = Problem(rng, kind, "float32")
    weight, state = problem.run(DEVICES[form])
    touched = {row for drawn in problem.steps for row in problem.gradient(drawn)}
    untouched = sorted(set(range(len(weight))) - touched)
    assert untouched
    np.testing.assert_array_equal(weight[untouched], problem.weight[untouched])
    for name, array in state.items():
        np.testing.assert_array_equal(array[untouched], problem.state[name][untouched])
    changed = (weight != problem.weight).any(axis=1)
    assert changed[sorted(touched)].mean() > 0.9


@pytest.mark.parametrize("kind", ["sgd", "adagrad"])
def test_any_number_of_threads_gives_the_same_bits(kind: str, rng: np.random.Generator) -> None:
    problem = Problem(rng, kind, "float32", hotness=5)
    first_weight, first_state = problem.run(HostDevice(1))
    for threads in (2, 3, 8, 50):
        weight, state = problem.run(HostDevice(threads))
        np.testing.assert_array_equal(weight, first_weight)
        for name, array in state.items():
            np.testing.assert_array_equal(array, first_state[name])


def test_an_adagrad_row_without_gradient_stays_finite() -> None:
    optimizer = OptimizerConfig(kind="adagrad")
    for device in DEVICES.values():
        weight, state = np.ones((4, 3), np.float32), {"accumulator": np.zeros((4, 3), np.float32)}
        update_rows(
            optimizer, weight, state, np.array([0]), np.array([2], np.int32), NO_OFFSETS, NO_WEIGHTS,
            np.array([False]), np.array([0]), 1, np.zeros((1, 1, 3), np.float32),
            lr=0.1, step=1, scratch=UpdateScratch.create(4), device=device,
        )  # fmt: skip
        np.testing.assert_array_equal(weight, np.ones((4, 3)))


def test_ftrl_at_the_end_of_a_decay_to_zero_changes_nothing() -> None:
    optimizer = OptimizerConfig(kind="ftrl")
    for device in DEVICES.values():
        weight, state = np.ones((4, 3)), {"n": np.full((4, 3), 0.1), "z": np.zeros((4, 3))}
        update_rows(
            optimizer, weight, state, np.array([0]), np.array([2], np.int32), NO_OFFSETS, NO_WEIGHTS,
            np.array([False]), np.array([0]), 1, np.ones((1, 1, 3)),
            lr=0.0, step=9, scratch=UpdateScratch.create(4), device=device,
        )  # fmt: skip
        np.testing.assert_array_equal(weight, np.ones((4, 3)))
        np.testing.assert_array_equal(state["z"], np.zeros((4, 3)))


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [("sgd", 8), ("momentum", 16), ("adagrad", 16), ("rowwise_adagrad", 9), ("adam", 24), ("ftrl", 24)],
)
def test_memory_of_a_row_counts_weights_state_and_scratch(kind: str, numbers: int) -> None:
    assert bytes_per_row(OptimizerConfig(kind=kind), 8, 4) == 4 * numbers + 4  # type: ignore[arg-type]
