"""Elementary functions of the generator against NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pipeline.elementary_numba import exp2, log2, sin_cos


@njit(error_model="numpy")
def apply_log2(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = log2(x[i])


@njit(error_model="numpy")
def apply_exp2(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = exp2(x[i])


@njit(error_model="numpy")
def apply_sin_cos(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i, 0], out[i, 1] = sin_cos(x[i])


def test_log2_and_exp2_of_any_magnitude(rng: np.random.Generator) -> None:
    x = np.concatenate([2.0 ** rng.uniform(-900, 900, 5000), 1 + rng.normal(0, 1e-9, 5000), [1.0, 2.0**0.5, 0.5**0.5]])
    out = np.empty(x.size)
    apply_log2(x, out)
    np.testing.assert_allclose(out, np.log2(x), rtol=1e-15, atol=0)
    y = np.concatenate([rng.uniform(-900, 900, 5000), rng.normal(0, 1e-9, 5000), [0.0, 0.5, -0.5, 31.0]])
    out = np.empty(y.size)
    apply_exp2(y, out)
    np.testing.assert_allclose(out, np.exp2(y), rtol=1e-15, atol=0)


def test_sin_cos_all_around(rng: np.random.Generator) -> None:
    turns = np.concatenate([rng.uniform(0, 1, 10_000), np.arange(64) / 64, [1 - 2.0**-53, 2.0**-53]])
    out = np.empty((turns.size, 2))
    apply_sin_cos(turns, out)
    # NumPy rounds 2 pi turns before it begins: up to half a unit of the angle.
    np.testing.assert_allclose(out[:, 0], np.sin(2 * np.pi * turns), rtol=0, atol=1e-15)
    np.testing.assert_allclose(out[:, 1], np.cos(2 * np.pi * turns), rtol=0, atol=1e-15)
