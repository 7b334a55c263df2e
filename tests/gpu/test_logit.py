"""The layer with one output against its reference, in and out of wider arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlrm import logit_cuda
from dlrm.device import HostDevice
from dlrm.gemm import num_chunks
from dlrm.logit import logit_backward, logit_forward

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "uint16": 2.0**-7}
"""uint16: the bits of bfloat16."""
REFERENCE = HostDevice(compiled=False)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as ``dtype``, bfloat16 rounded to nearest even."""
    if dtype != "uint16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(np.isnan(values), 0x7FFF, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(array: np.ndarray) -> np.ndarray:
    """The values in float64."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("rows", "inputs", "extra"), [(0, 16, 0), (1, 8, 8), (333, 256, 0), (130, 41, 3), (70, 2104, 8)]
)
@pytest.mark.parametrize("relu", [False, True])
def test_logit_layer(
    machine: Any, rows: int, inputs: int, extra: int, relu: bool, dtype: str, rng: np.random.Generator
) -> None:
    x = encode(np.maximum(rng.standard_normal((rows, inputs + extra)), 0), dtype)
    weight, bias = encode(rng.standard_normal((1, inputs)), dtype), encode(rng.standard_normal(1), dtype)
    grad = encode(rng.standard_normal(rows), dtype)
    exact = [decode(array) for array in (x[:, :inputs], weight, bias, grad)]
    out, grad_weight, grad_bias, grad_x = (np.full(shape, np.nan) for shape in (rows, (1, inputs), 1, (rows, inputs)))
    logit_forward(*exact[:3], out, REFERENCE)
    logit_backward(exact[3], *exact[:2], grad_weight, grad_bias, grad_x, None, REFERENCE, relu=relu)

    wide, g, w, b = (machine.array(array) for array in (x, grad, weight, bias))
    found = machine.array(np.full(rows, np.nan, np.float32))
    logit_cuda.logit_forward(wide[:, :inputs], w, b, found)
    size = np.abs(exact[0]) @ np.abs(exact[1][0]) + 1
    assert (np.abs(machine.host(found) - out) <= inputs * EPS["float32"] * size).all()

    poison = encode(np.full((rows, inputs + extra), np.nan), dtype)
    found_x, found_weight = machine.array(poison), machine.array(np.full((1, inputs), np.nan, np.float32))
    found_bias = machine.array(np.full(1, np.nan, np.float32))
    partials = machine.array(np.full(max(1, num_chunks(rows)) * (inputs + 1), np.nan, np.float32))
    logit_cuda.logit_backward(g, wide[:, :inputs], w, found_weight, found_bias, found_x[:, :inputs], partials, relu)
    values = decode(machine.host(found_x))
    np.testing.assert_array_equal(values[:, inputs:], decode(poison)[:, inputs:])
    # Half precision rounds what is below its smallest normal number absolutely.
    np.testing.assert_allclose(values[:, :inputs], grad_x, rtol=EPS[dtype], atol=2.0**-25)
    limit = (rows + 1) * EPS["float32"] * (np.abs(exact[3]) @ np.abs(exact[0]) + 1)
    assert (np.abs(machine.host(found_weight)[0] - grad_weight[0]) <= limit).all()
    assert abs(machine.host(found_bias)[0] - grad_bias[0]) <= (rows + 1) * EPS["float32"] * (np.abs(exact[3]).sum() + 1)


@pytest.mark.parametrize("dtype", EPS)
def test_a_number_that_is_none_is_not_lost_in_the_relu(machine: Any, dtype: str, rng: np.random.Generator) -> None:
    x = np.maximum(rng.standard_normal((9, 16)), 0.5)
    x[4, 3] = np.nan
    grad, weight = encode(np.ones(9), dtype), encode(np.ones((1, 16)), dtype)
    arrays = [machine.array(array) for array in (grad, encode(x, dtype), weight)]
    results = [machine.array(np.zeros(shape, np.float32)) for shape in ((1, 16), 1)]
    grad_x, partials = machine.array(encode(np.zeros((9, 16)), dtype)), machine.array(np.zeros(17, np.float32))
    logit_cuda.logit_backward(*arrays, *results, grad_x, partials, True)
    np.testing.assert_array_equal(decode(machine.host(grad_x)), 1)
    np.testing.assert_array_equal(np.isnan(machine.host(results[0])[0]), np.arange(16) == 3)
