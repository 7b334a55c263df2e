"""Binary cross-entropy on logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss

from dlrm.device import HostDevice
from dlrm.loss import bce_with_logits

DEVICES = {"compiled": HostDevice(), "reference": HostDevice(compiled=False)}


@pytest.fixture(params=DEVICES)
def device(request):
    return DEVICES[request.param]


@pytest.mark.parametrize("label_dtype", [np.int32, np.float32])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-6)])
@pytest.mark.parametrize("rows", [1, 511, 512, 1300])
def test_loss_and_gradient_of_the_definition(device, dtype, rtol, label_dtype, rows, rng):
    logits = rng.normal(scale=4, size=rows).astype(dtype)
    labels = rng.integers(0, 2, rows).astype(label_dtype)
    grad = np.empty(rows, dtype)
    loss = bce_with_logits(logits, labels, 3 * rows, grad, device)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = log_loss(labels, np.stack([1 - probability, probability], 1), labels=[0, 1], normalize=False)
    assert loss == pytest.approx(expected / (3 * rows), rel=1e-10)
    np.testing.assert_allclose(grad, (probability - labels) / (3 * rows), rtol=10 * rtol, atol=rtol / rows)


def test_gradient_is_the_losses_slope(device, rng):
    logits, labels = rng.normal(size=40), rng.integers(0, 2, 40)
    grad, unused = np.empty(40), np.empty(40)
    bce_with_logits(logits, labels, 57, grad, device)
    for b in range(40):
        slope = 0.0
        for sign in (1, -1):
            moved = logits.copy()
            moved[b] += sign * 1e-5
            slope += sign * bce_with_logits(moved, labels, 57, unused, device) / 2e-5
        assert slope == pytest.approx(grad[b], abs=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_neither_overflow_nor_vanish(device, dtype):
    logits = np.array([1000, -1000, 1000, -1000, 0], dtype)
    labels = np.array([0, 1, 1, 0, 1])
    grad = np.empty(5, dtype)
    loss = bce_with_logits(logits, labels, 1, grad, device)
    assert loss == pytest.approx(2000 + math.log(2), rel=1e-12)
    assert grad.tolist() == [1, -1, 0, 0, -0.5]


def test_no_rows_add_no_loss(device):
    empty = np.empty(0, np.float32)
    assert bce_with_logits(empty, empty, 9, empty, device) == 0.0


def test_nan_logit_gives_nan_loss_and_gradient(device):
    grad = np.zeros(3)
    loss = bce_with_logits(np.array([0.5, np.nan, 1.0]), np.array([0, 0, 1]), 3, grad, device)
    assert math.isnan(loss)
    assert np.isnan(grad).tolist() == [False, True, False]


def test_repeated_calls_are_bit_equal(rng):
    logits = rng.normal(size=20_000).astype(np.float32)
    labels = rng.integers(0, 2, 20_000)
    grads = np.empty((2, 20_000), np.float32)
    losses = {bce_with_logits(logits, labels, 20_000, grad, HostDevice()) for grad in np.repeat(grads, 5, 0)}
    assert len(losses) == 1
