"""Random initial values on the GPU equal the CPU's bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlrm import philox_cuda
from dlrm.device import HostDevice
from dlrm.philox import normal_rows, tensor_id, uniform_rows

DTYPES = ["float32", "float16"]
PLAIN = HostDevice(1, compiled=False)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 16), (301, 13), (40, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_rows_equal_the_cpus(
    machine: Any, rows: int, columns: int, dtype: str, rng: np.random.Generator
) -> None:
    seed, scale = int(rng.integers(2**63)) * 2 + 1, float(rng.uniform(1e-4, 1))
    for first_column in (0, int(rng.integers(1, 9))):
        start, step = int(rng.integers(2**33)), int(rng.integers(1, 5))
        place = {"start": start, "step": step, "first_column": first_column}
        expected = uniform_rows(seed, "table.c", rows, columns, dtype, **place, scale=scale, device=PLAIN)
        found = machine.array(np.full((rows, columns + 3), np.nan, dtype))
        numbers = (np.uint64(seed), np.uint64(tensor_id("table.c")), np.uint64(start), np.uint64(step))
        philox_cuda.uniform_rows(*numbers, first_column, scale, found[:, :columns])
        np.testing.assert_array_equal(machine.host(found)[:, :columns], expected)
        assert np.isnan(machine.host(found)[:, columns:]).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (50, 33), (500, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_rows_equal_the_cpus(
    machine: Any, rows: int, columns: int, dtype: str, rng: np.random.Generator
) -> None:
    seed, scale, start = int(rng.integers(2**63)), float(rng.uniform(1e-3, 1)), int(rng.integers(2**33))
    expected = normal_rows(seed, "top.0.weight", rows, columns, dtype, start=start, scale=scale, device=PLAIN)
    found = machine.array(np.full((rows, columns), np.nan, dtype))
    philox_cuda.normal_rows(np.uint64(seed), np.uint64(tensor_id("top.0.weight")), np.uint64(start), scale, found)
    np.testing.assert_array_equal(machine.host(found), expected)


def test_bfloat16_values_are_rounded_once(machine: Any, rng: np.random.Generator) -> None:
    seed = int(rng.integers(2**63))
    exact = uniform_rows(seed, "t", 400, 64, np.float64)
    found = machine.array(np.zeros((400, 64), np.uint16))
    philox_cuda.uniform_rows(np.uint64(seed), np.uint64(tensor_id("t")), np.uint64(0), np.uint64(1), 0, 1.0, found)
    values = (machine.host(found).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    spacing = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    assert (np.abs(values - exact) <= spacing / 2).all()
