"""Compiled kernels give the same bits on one thread as on all: chunks are fixed, and added in order."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.gemm import num_chunks, relu_backward
from dlrm.interaction import interaction_backward, interaction_forward, interaction_width
from dlrm.loss import bce_with_logits
from dlrm.optim import DenseOptimizer
from dlrm.philox import normal_rows

DEVICE = HostDevice()


def masked_sum(rng):
    grad, activation = rng.normal(size=(2, 1000, 70)).astype(np.float32)
    grad_bias = np.empty(70, np.float32)
    relu_backward(grad, activation, grad_bias, np.empty(num_chunks(1000) * 70, np.float32), DEVICE)
    return grad, grad_bias


def loss(rng):
    grad = np.empty(9000, np.float32)
    value = bce_with_logits(rng.normal(size=9000).astype(np.float32), rng.integers(0, 2, 9000), 9000, grad, DEVICE)
    return grad, np.float64(value)


def interaction(rng):
    vectors = rng.normal(size=(200, 9, 24)).astype(np.float32)
    grad_out = rng.normal(size=(200, interaction_width(9, 24, 1))).astype(np.float32)
    out = interaction_forward(vectors, np.empty_like(grad_out), first=1, device=DEVICE)
    return out, interaction_backward(vectors, grad_out, np.empty_like(vectors), first=1, device=DEVICE)


def adam(rng):
    weights = rng.normal(size=50_001).astype(np.float32)
    optimizer = DenseOptimizer(OptimizerConfig(kind="adam"), weights.size, np.float32, DEVICE)
    optimizer.step(weights, rng.normal(size=weights.size).astype(np.float32), 0.1, 1)
    return weights, optimizer.state["m"], optimizer.state["v"]


def initial_values(rng):
    return (normal_rows(int(rng.integers(2**63)), "top.0.weight", 300, 77, np.float64),)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.parametrize("operation", [masked_sum, loss, interaction, adam, initial_values])
def test_one_thread_equals_all(operation, seed):
    before = numba.get_num_threads()
    results = []
    try:
        for threads in (1, numba.config.NUMBA_NUM_THREADS):
            numba.set_num_threads(threads)
            results.append(operation(np.random.default_rng(seed)))
    finally:
        numba.set_num_threads(before)
    for one, every in zip(*results, strict=True):
        np.testing.assert_array_equal(one, every)
