"""Clearing and summing gradients at a ReLU against the reference, in wider arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlrm import relu_cuda
from dlrm.relu import relu_and_sum

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "uint16": 2.0**-7}
"""uint16: the bits of bfloat16."""
SHAPES = [(0, 16, 0), (1, 8, 8), (333, 256, 0), (130, 41, 3), (70, 2104, 8), (40, 128, 3328)]


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as ``dtype``, bfloat16 cut off."""
    if dtype != "uint16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16).reshape(values.shape)


def decode(array: np.ndarray) -> np.ndarray:
    """The values in float64."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("rows", "columns", "extra"), SHAPES)
@pytest.mark.parametrize("mask", ["none", "output", "bits"])
def test_relu_and_sum(
    machine: Any, rows: int, columns: int, extra: int, mask: str, dtype: str, rng: np.random.Generator
) -> None:
    grad = encode(rng.standard_normal((rows, columns + extra)), dtype)
    output = encode(np.maximum(rng.standard_normal((rows, columns)), 0), dtype)
    if rows:
        output[0, 0] = encode(np.full(1, np.nan), dtype)[0]  # lets its gradient through
    on = np.pad(~(decode(output) <= 0), ((0, 0), (0, -columns % 128)))
    bits = np.packbits(on, axis=1, bitorder="little")
    expected, sums = decode(grad), np.full(columns, np.nan)
    relu_and_sum(expected, None, bits if mask == "bits" else None, sums, None, columns)
    if mask == "output":
        expected, sums = decode(grad), np.full(columns, np.nan)
        relu_and_sum(expected, decode(output), None, sums, None, columns)
    size = np.abs(expected[:, :columns]).sum(0)

    masks = (machine.array(output) if mask == "output" else None, machine.array(bits) if mask == "bits" else None)
    partials = machine.array(np.full(relu_cuda.blocks_of(rows, 1 << 20) * columns, np.nan, np.float32))
    for wanted in (True, False):
        found, total = machine.array(grad), machine.array(np.full(columns, np.nan, np.float32))
        relu_cuda.relu_and_sum(found, *masks, total if wanted else None, partials if wanted else None, columns)
        np.testing.assert_array_equal(decode(machine.host(found)), expected)
        if wanted:
            assert (np.abs(machine.host(total) - sums) <= (rows + 2) * EPS["float32"] * (size + 1e-6)).all()
        else:
            assert np.isnan(machine.host(total)).all()
