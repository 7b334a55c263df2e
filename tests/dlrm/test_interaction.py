"""Dot interaction against its definition, and its gradient against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.device import HostDevice
from dlrm.interaction import interaction_backward, interaction_forward, interaction_width

DEVICES = {"compiled": HostDevice(), "reference": HostDevice(compiled=False)}


@pytest.fixture(params=DEVICES)
def device(request):
    return DEVICES[request.param]


def forward(vectors, first, device):
    out = np.full((len(vectors), interaction_width(*vectors.shape[1:], first)), np.nan, vectors.dtype)
    return interaction_forward(vectors, out, first=first, device=device)


def test_order_of_the_pairs(device):
    """Vectors of one number each: the dots are products, in the order (1,0), (2,0), (2,1), (3,0), ..."""
    vectors = np.array([[[2.0], [3.0], [5.0], [7.0]]])
    assert forward(vectors, 1, device).tolist() == [[2, 6, 10, 15, 14, 21, 35]]
    assert forward(vectors, 0, device).tolist() == [[6, 10, 15, 14, 21, 35]]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 35),
    num_vectors=st.integers(1, 30),
    dim=st.integers(1, 70),
    first=st.integers(0, 1),
    dtype=st.sampled_from([np.float64, np.float32]),
    seed=st.integers(0, 2**32 - 1),
)
def test_compiled_equals_reference(rows, num_vectors, dim, first, dtype, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, num_vectors, dim)).astype(dtype)
    grad_out = rng.normal(size=(rows, interaction_width(num_vectors, dim, first))).astype(dtype)
    outs, grads = [], []
    for device in DEVICES.values():
        outs.append(forward(vectors, first, device))
        grads.append(np.full_like(vectors, np.nan))
        interaction_backward(vectors, grad_out, grads[-1], first=first, device=device)
    # Sums of up to 70 products of normal numbers, in another order.
    bound = 400 * np.finfo(dtype).eps
    np.testing.assert_allclose(*outs, rtol=0, atol=bound)
    np.testing.assert_allclose(*grads, rtol=0, atol=bound)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("num_vectors", "dim"), [(2, 3), (5, 8), (6, 1), (27, 16)])
def test_gradient_is_the_slope(device, num_vectors, dim, first, rng):
    vectors = rng.normal(size=(2, num_vectors, dim))
    grad_out = rng.normal(size=(2, interaction_width(num_vectors, dim, first)))
    grad = np.full_like(vectors, np.nan)
    interaction_backward(vectors, grad_out, grad, first=first, device=device)
    direction = rng.normal(size=vectors.shape)
    # Quadratic in the vectors, so that a central difference has no truncation error.
    rise = forward(vectors + direction, first, device) - forward(vectors - direction, first, device)
    assert (grad * direction).sum() == pytest.approx((grad_out * rise).sum() / 2, rel=1e-9, abs=1e-9)


def test_nan_stays_in_its_row_and_is_not_lost(device):
    vectors = np.ones((3, 4, 5))
    vectors[1, 2, 3] = np.nan
    out = forward(vectors, 0, device)
    assert np.isnan(out).any(1).tolist() == [False, True, False]
    assert np.isnan(out[1]).tolist() == [False, True, True, False, False, True]


def test_repeated_calls_are_bit_equal(rng):
    vectors = rng.normal(size=(150, 27, 32)).astype(np.float32)
    first = forward(vectors, 1, HostDevice())
    for _ in range(3):
        np.testing.assert_array_equal(forward(vectors, 1, HostDevice()), first)
    # A row's result does not depend on its place in the batch either.
    np.testing.assert_array_equal(forward(vectors[71:90], 1, HostDevice()), first[71:90])
