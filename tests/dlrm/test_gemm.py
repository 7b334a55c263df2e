"""Fully connected layers: fused passes against plain NumPy, inside wider arrays too."""

from __future__ import annotations

import numpy as np
import pytest

from dlrm import gemm, logit
from dlrm.device import HostDevice

DEVICES = {"compiled": HostDevice(), "reference": HostDevice(compiled=False)}
# 300 x 120 elements run on all threads, the others on one; 64 rows are one chunk exactly.
SHAPES = [(0, 4, 3), (1, 1, 1), (64, 13, 8), (65, 5, 33), (300, 7, 120)]


@pytest.fixture(params=DEVICES)
def device(request):
    return DEVICES[request.param]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-4)])
@pytest.mark.parametrize("extra", [0, 9])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_layer_forward_and_backward(device, rows, inputs, outputs, extra, dtype, tolerance, rng):
    x, weight = rng.normal(size=(rows, inputs)).astype(dtype), rng.normal(size=(outputs, inputs)).astype(dtype)
    bias = rng.normal(size=outputs).astype(dtype)
    wide = rng.normal(size=(rows, outputs + extra)).astype(dtype)
    beyond = wide[:, outputs:].copy()
    gemm.linear_relu_forward(x, weight, bias, wide, None, device)
    before = x @ weight.T + bias
    np.testing.assert_allclose(wide[:, :outputs], np.maximum(before, 0), rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(wide[:, outputs:], beyond)

    grad = rng.normal(size=wide.shape).astype(dtype)
    expected = grad[:, :outputs] * (wide[:, :outputs] > 0)
    beyond = grad[:, outputs:].copy()
    grad_bias, grad_weight, grad_x = np.full_like(bias, np.nan), np.full_like(weight, np.nan), np.full_like(x, np.nan)
    partials = np.full(gemm.num_chunks(rows) * outputs, np.nan, dtype)
    gemm.relu_backward(grad, wide, grad_bias, partials, device)
    np.testing.assert_array_equal(grad[:, :outputs], expected)
    np.testing.assert_array_equal(grad[:, outputs:], beyond)
    np.testing.assert_allclose(grad_bias, expected.sum(0), rtol=tolerance, atol=tolerance)
    gemm.linear_weight_backward(grad, x, grad_weight, grad_bias, device)
    gemm.linear_input_backward(grad, weight, grad_x, device)
    np.testing.assert_allclose(grad_weight, expected.T @ x, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(grad_x, expected @ weight, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-4)])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_data_backward_goes_through_the_relu_below(device, rows, inputs, outputs, dtype, tolerance, rng):
    grad, weight = rng.normal(size=(rows, outputs)).astype(dtype), rng.normal(size=(outputs, inputs)).astype(dtype)
    below = np.maximum(rng.normal(size=(rows, inputs)), 0).astype(dtype)
    grad_below, grad_bias = np.full_like(below, np.nan), np.full_like(weight[0], np.nan)
    partials = np.full(gemm.num_chunks(rows) * inputs, np.nan, dtype)
    gemm.linear_data_backward(grad, weight, below, None, grad_below, grad_bias, partials, device)
    expected = (grad @ weight) * (below > 0)
    np.testing.assert_allclose(grad_below, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(grad_bias, expected.sum(0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [0, 1, 130, 2500])
def test_logit_layer(device, rows, rng):
    x, weight, bias, grad = (
        rng.normal(size=(rows, 17)),
        rng.normal(size=(1, 17)),
        rng.normal(size=1),
        rng.normal(size=rows),
    )
    out, grad_x, grad_weight, grad_bias = (
        np.full(rows, np.nan),
        np.full_like(x, np.nan),
        np.full_like(weight, np.nan),
        np.full(1, np.nan),
    )
    logit.logit_forward(x, weight, bias, out, device)
    np.testing.assert_allclose(out, x @ weight[0] + bias[0], rtol=1e-12, atol=1e-12)
    logit.logit_backward(grad, x, weight, grad_weight, grad_bias, grad_x, None, device)
    np.testing.assert_allclose(grad_weight[0], x.T @ grad, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(grad_bias, [grad.sum()], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(grad_x, np.outer(grad, weight[0]), rtol=1e-12, atol=1e-12)


def test_relu_passes_nan_on(device):
    wide = np.array([[1.0, np.nan, -1.0]])
    operation = device.kernel("dlrm.gemm", "bias_relu") or gemm.bias_relu
    operation(wide, np.zeros(3))
    np.testing.assert_array_equal(wide, [[1, np.nan, 0]])


def test_products_are_handed_to_blas_without_copies(rng, monkeypatch):
    """Every operand of every product has one unit stride, in which case NumPy calls BLAS on it as it is."""
    seen = []
    real = np.matmul

    def spy(a, b, out):
        seen.extend((a, b, out))
        return real(a, b, out=out)

    class Spied:
        matmul = staticmethod(spy)

    device = HostDevice()
    monkeypatch.setattr(device, "xp", Spied, raising=False)
    vectors = device.empty((70, 5 * 8), np.float32)
    grad = rng.normal(size=vectors.shape).astype(np.float32)
    x, weight = device.zeros((70, 6), np.float32), device.zeros((8, 6), np.float32)
    gemm.linear_relu_forward(x, weight, device.zeros(8, np.float32), vectors, None, device)
    gemm.linear_weight_backward(grad, x, np.empty_like(weight), np.empty_like(weight[:, 0]), device)
    gemm.linear_input_backward(grad, weight, np.empty_like(x), device)
    assert len(seen) == 9
    for array in seen:
        assert min(array.strides) == array.itemsize
        assert max(array.strides) % array.itemsize == 0
        assert array.ctypes.data % array.itemsize == 0
