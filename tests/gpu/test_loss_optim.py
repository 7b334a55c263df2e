"""Loss, dense optimisers and loss scaling of captured steps against their references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlrm import loss_cuda, optim, optim_cuda
from dlrm.config import OptimizerConfig
from dlrm.loss import loss_and_gradient
from dlrm.scalars import (
    GOOD_STEPS,
    LOSS_SCALE,
    NOT_FINITE,
    OVERFLOW,
    SIZE,
    SKIPPED_STEPS,
    UNSCALE,
    write_guard,
    write_scalars,
)

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as ``dtype``; bfloat16, which NumPy lacks, as its bits in uint16, rounded to nearest even."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(values.shape)
    return np.where(np.isnan(values), 0x7FFF, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(array: np.ndarray) -> np.ndarray:
    """The values in float64."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def blocks(scale: float = 1024.0, valid_rows: int = 0, **values: Any) -> tuple[np.ndarray, np.ndarray]:
    given = {"lr": 0.1, "global_rows": 1000, "step": 3, "seed": 7} | values
    scalars = write_scalars(np.empty(SIZE, np.float32), valid_rows=valid_rows, **given)
    return scalars, write_guard(np.empty(SIZE, np.float32), scale)


@pytest.mark.parametrize(("num_rows", "valid"), [(1, 1), (7, 0), (255, 200), (2000, 1999)])
@pytest.mark.parametrize(
    ("dtype", "label_dtype"), [("float32", "float32"), ("float16", "uint8"), ("bfloat16", "float16")]
)
def test_loss_and_gradient(
    machine: Any, num_rows: int, valid: int, dtype: str, label_dtype: str, rng: np.random.Generator
) -> None:
    logits = (rng.standard_normal(num_rows) * rng.choice([0.1, 3, 60], num_rows)).astype(np.float32)
    logits[valid:] = np.nan  # whatever lies behind the valid rows stays out of the sum
    labels = rng.integers(0, 2, num_rows).astype(label_dtype)
    scalars, guard = blocks(valid_rows=valid)
    expected, loss = np.full(num_rows, np.nan), np.full(1, np.nan)
    loss_and_gradient(logits, labels, expected, loss, scalars, guard, np.empty(0))

    found = machine.array(encode(np.full(num_rows, np.nan), dtype))
    total, partials = machine.array([np.nan]), machine.array(np.full(loss_cuda.partials_of(num_rows), np.nan))
    arguments = [machine.array(x) for x in (logits, labels)]
    loss_cuda.loss_and_gradient(*arguments, found, total, machine.array(scalars), machine.array(guard), partials)
    np.testing.assert_allclose(machine.host(total), loss, rtol=1e-13)
    # Half precision rounds what is below its smallest normal number absolutely.
    np.testing.assert_allclose(decode(machine.host(found)), expected, rtol=EPS[dtype], atol=2.0**-25)


def test_a_logit_that_is_no_number_shows_in_the_loss(machine: Any, rng: np.random.Generator) -> None:
    logits = rng.standard_normal(300).astype(np.float32)
    logits[int(rng.integers(300))] = np.nan
    scalars, guard = blocks(valid_rows=300)
    grad_out, total = machine.array(np.zeros(300, np.float32)), machine.array([0.0])
    loss_cuda.loss_and_gradient(
        machine.array(logits), machine.array(np.zeros(300, np.float32)), grad_out, total, machine.array(scalars),
        machine.array(guard), machine.array(np.zeros(loss_cuda.partials_of(300))),
    )  # fmt: skip
    assert np.isnan(machine.host(total)).all()
    np.testing.assert_array_equal(np.isnan(machine.host(grad_out)), np.isnan(logits))


CONFIGS = {
    "sgd": OptimizerConfig(kind="sgd"),
    "momentum": OptimizerConfig(kind="momentum", momentum=0.8),
    "adagrad": OptimizerConfig(kind="adagrad", eps=1e-4, initial_accumulator=0.1),
    "adam": OptimizerConfig(kind="adam", eps=1e-4),
    "ftrl": OptimizerConfig(kind="ftrl", ftrl_beta=0.5, l1=0.01, l2=0.02, initial_accumulator=0.1),
}


class Reference:
    """Parameters, state and the host's optimiser over them, in float64."""

    def __init__(self, kind: str, parameters: np.ndarray) -> None:
        from dlrm.device import HostDevice

        self.parameters = parameters.astype(np.float64)
        device = HostDevice(1, compiled=False)
        self.optimizer = optim.DenseOptimizer(CONFIGS[kind], len(parameters), np.float64, device)


FORMS = (("float32", None), ("float32", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16"))
"""Types of the gradient and of the weights that the products read."""


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("count", [1, 3, 4, 1027, 5000])
def test_dense_optimizers(machine: Any, kind: str, count: int, rng: np.random.Generator) -> None:
    own = list(CONFIGS).index(kind) % len(FORMS)
    for dtype, copy in FORMS[own : own + 1] if machine.emulated else FORMS:
        check_optimizer(machine, kind, count, dtype, copy, rng)


def check_optimizer(
    machine: Any, kind: str, count: int, dtype: str, copy: str | None, rng: np.random.Generator
) -> None:
    parameters = rng.standard_normal(count).astype(np.float32)
    reference = Reference(kind, parameters)
    found = machine.array(parameters)
    state = [machine.array(array.astype(np.float32)) for array in reference.optimizer.state.values()]
    weights = None if copy is None else machine.array(encode(np.full(count, np.nan), copy))
    for step in range(1, 4):
        gradients = encode(rng.standard_normal(count) * 1024, dtype)
        gradients[0] = 0
        reference.optimizer.step(reference.parameters, decode(gradients) / 1024, 0.1 * step, step)
        scalars, guard = blocks(lr=0.1 * step, step=step, dense=optim.constants(CONFIGS[kind], step))
        getattr(optim_cuda, kind)(
            found, machine.array(gradients), *state, weights, machine.array(scalars), machine.array(guard)
        )
    after = machine.host(found)
    # FTRL's threshold and its division by the rate magnify the rounding of what they take.
    tolerance = 2e-4 if kind == "ftrl" else 1e-5
    np.testing.assert_allclose(after, reference.parameters, rtol=tolerance, atol=tolerance)
    for array, expected in zip(state, reference.optimizer.state.values(), strict=True):
        np.testing.assert_allclose(machine.host(array), expected, rtol=tolerance, atol=tolerance)
    if copy is not None:
        np.testing.assert_array_equal(decode(machine.host(weights)), decode(encode(after, copy)))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("flag", [NOT_FINITE, OVERFLOW])
def test_a_blocked_step_writes_nothing(machine: Any, kind: str, flag: int, rng: np.random.Generator) -> None:
    arrays = [rng.standard_normal(100).astype(np.float32) for _ in range(2 + len(optim.STATE_NAMES[kind]))]
    given = [machine.array(array) for array in arrays]
    weights = machine.array(np.full(100, np.nan, np.float16))
    scalars, guard = blocks(dense=optim.constants(CONFIGS[kind], 1))
    guard.view(np.int32)[flag] = 1
    getattr(optim_cuda, kind)(*given, weights, machine.array(scalars), machine.array(guard))
    for array, kept in zip(given, arrays, strict=True):
        np.testing.assert_array_equal(machine.host(array), kept)
    assert np.isnan(machine.host(weights)).all()


def test_ftrl_at_rate_zero_changes_nothing(machine: Any, rng: np.random.Generator) -> None:
    arrays = [rng.random(50).astype(np.float32) for _ in range(4)]
    given = [machine.array(array) for array in arrays]
    scalars, guard = blocks(lr=0.0, dense=optim.constants(CONFIGS["ftrl"], 1))
    optim_cuda.ftrl(*given, None, machine.array(scalars), machine.array(guard))
    for array, kept in zip(given, arrays, strict=True):
        np.testing.assert_array_equal(machine.host(array), kept)


@pytest.mark.parametrize("count", [1, 4, 6, 4099])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_not_finite_are_noticed(
    machine: Any, count: int, dtype: str, bad: float, rng: np.random.Generator
) -> None:
    values = rng.standard_normal(count) * 60000 / 6
    for place in (None, 0, count - 1, int(rng.integers(count))):
        gradients = values.copy()
        if place is not None:
            gradients[place] = bad
        _, guard = blocks()
        on_machine = machine.array(guard)
        optim_cuda.check_finite(machine.array(encode(gradients, dtype)), on_machine)
        optim.check_finite(gradients, guard)
        assert guard.view(np.int32)[NOT_FINITE] == (place is not None)
        np.testing.assert_array_equal(machine.host(on_machine), guard)
        optim_cuda.check_finite(machine.array(encode(values, dtype)), on_machine)
        np.testing.assert_array_equal(machine.host(on_machine), guard)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_loss_scale_follows_the_steps(machine: Any, dynamic: bool, rng: np.random.Generator) -> None:
    _, guard = blocks(2.0**22)
    on_machine = machine.array(guard)
    seen = set()
    for _ in range(60):
        optim.begin_step(guard)
        optim_cuda.begin_step(on_machine)
        np.testing.assert_array_equal(machine.host(on_machine), guard)
        draw = rng.random()
        guard.view(np.int32)[NOT_FINITE] = draw < 0.1
        guard.view(np.int32)[OVERFLOW] = draw > 0.95
        on_machine.view(np.int32)[:] = machine.array(guard.view(np.int32))
        optim.end_step(guard, 3, dynamic)
        optim_cuda.end_step(on_machine, 3, dynamic)
        np.testing.assert_array_equal(machine.host(on_machine).view(np.int32), guard.view(np.int32))
        seen.add(float(guard[LOSS_SCALE]))
    assert guard[LOSS_SCALE] * guard[UNSCALE] == 1
    assert (len(seen) > 1) is dynamic
    assert guard.view(np.int32)[GOOD_STEPS] <= 60
    assert guard.view(np.int32)[SKIPPED_STEPS] < 60
