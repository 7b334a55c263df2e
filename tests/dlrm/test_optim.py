"""Dense optimisers against the formulas of docs/design.md, one float at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.errors import ConfigError
from dlrm.optim import STATE_NAMES, DenseOptimizer

DEVICES = {"compiled": HostDevice(), "reference": HostDevice(compiled=False)}
CONFIGS = {
    "sgd": OptimizerConfig(kind="sgd"),
    "momentum": OptimizerConfig(kind="momentum", momentum=0.8),
    "adagrad": OptimizerConfig(kind="adagrad", eps=1e-3),
    "adagrad from 0.2": OptimizerConfig(kind="adagrad", initial_accumulator=0.2),
    "adam": OptimizerConfig(kind="adam", beta1=0.85, beta2=0.99, eps=1e-4),
    "ftrl": OptimizerConfig(kind="ftrl"),
    "ftrl regularised": OptimizerConfig(kind="ftrl", ftrl_beta=0.7, l1=0.9, l2=0.3, initial_accumulator=0.5),
}


def by_hand(config, weight, gradients, rates):
    """One weight's course, in Python floats, and the state at its end."""
    w, state = weight, {}
    velocity = m = v = z = 0.0
    a = n = config.accumulator_start
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        match config.kind:
            case "sgd":
                w = w - lr * g
            case "momentum":
                velocity = config.momentum * velocity + g
                w = w - lr * velocity
                state = {"velocity": velocity}
            case "adagrad":
                a = a + g**2
                w = w - lr * g / (math.sqrt(a) + config.eps)
                state = {"accumulator": a}
            case "adam":
                m = config.beta1 * m + (1 - config.beta1) * g
                v = config.beta2 * v + (1 - config.beta2) * g**2
                m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
                w = w - lr * m_hat / (math.sqrt(v_hat) + config.eps)
                state = {"m": m, "v": v}
            case "ftrl":
                s = (math.sqrt(n + g**2) - math.sqrt(n)) / lr
                z, n = z + g - s * w, n + g**2
                sign = math.copysign(1, z)
                w = (
                    0.0
                    if abs(z) <= config.l1
                    else -(z - sign * config.l1) / ((config.ftrl_beta + math.sqrt(n)) / lr + 2 * config.l2)
                )
                state = {"n": n, "z": z}
    return w, state


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_twenty_steps_equal_the_formulas(config, device, rng):
    size, steps = 301, 20  # wide enough that some of l1's weights always end at zero, and some do not
    start = rng.normal(size=size)
    gradients = rng.normal(size=(steps, size))
    rates = rng.uniform(0.05, 0.2, steps)
    weights = start.copy()
    optimizer = DenseOptimizer(config, size, np.float64, device)
    for t in range(steps):
        optimizer.step(weights, gradients[t], rates[t], t + 1)
    assert tuple(optimizer.state) == STATE_NAMES[config.kind]
    for i in range(size):
        expected, state = by_hand(config, start[i], gradients[:, i], rates)
        assert weights[i] == pytest.approx(expected, rel=1e-11, abs=1e-12)
        for name, value in state.items():
            assert optimizer.state[name][i] == pytest.approx(value, rel=1e-11, abs=1e-12)
    if config.l1:
        assert 0 < np.count_nonzero(weights == 0) < size


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_compiled_equals_reference(config, dtype, rng):
    size = 10_007
    start = rng.normal(size=size).astype(dtype)
    gradients = rng.normal(size=(3, size)).astype(dtype)
    gradients[:, ::7] = 0
    results = []
    for device in DEVICES.values():
        weights = start.copy()
        optimizer = DenseOptimizer(config, size, dtype, device)
        for t in range(3):
            optimizer.step(weights, gradients[t], 0.1, t + 1)
        assert weights.dtype == dtype
        results.append([weights, *optimizer.state.values()])
    for compiled, reference in zip(*results, strict=True):
        # Not bit-equal: FTRL's reference multiplies by a sign where the kernel subtracts.
        np.testing.assert_allclose(compiled, reference, rtol=32 * np.finfo(dtype).eps, atol=32 * np.finfo(dtype).eps)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("kind", STATE_NAMES)
def test_nan_gradient_reaches_the_weight(kind, device):
    weights = np.ones(3)
    DenseOptimizer(OptimizerConfig(kind=kind), 3, np.float64, device).step(
        weights, np.array([0.5, np.nan, 0.5]), 0.1, 1
    )
    assert np.isnan(weights).tolist() == [False, True, False]


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("kind", STATE_NAMES)
def test_rate_zero_moves_no_weight(kind, device, rng):
    start = rng.normal(size=9)
    weights = start.copy()
    DenseOptimizer(OptimizerConfig(kind=kind), 9, np.float64, device).step(weights, rng.normal(size=9), 0.0, 1)
    np.testing.assert_array_equal(weights, start)


def test_kind_for_tables_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.kind: 'rowwise_adagrad' is for embedding tables"):
        DenseOptimizer(OptimizerConfig(kind="rowwise_adagrad"), 3, np.float32, HostDevice())
