"""Philox4x32-10: published vectors, compiled equals reference, independence of how rows are cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.device import HostDevice
from dlrm.philox import normal_rows, philox4x32, tensor_id, uniform_rows

REFERENCE = HostDevice(compiled=False)


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_block_function_gives_the_known_answers_of_random123(counter, seed, words):
    assert tuple(int(word) for word in philox4x32(tuple(np.uint64(c) for c in counter), seed)) == words


def test_words_become_values_as_documented():
    """Row 2^32 + 5, column block 2 of a tensor, written out by hand."""
    seed = 0x0123456789ABCDEF
    row = 2**32 + 5
    counter = tuple(np.uint64(word) for word in (2, 5, 1, tensor_id("table.C1")))
    u = [float(word) for word in philox4x32(counter, seed)]
    uniform = uniform_rows(seed, "table.C1", 1, 12, np.float64, start=row)[0, 8:]
    normal = normal_rows(seed, "table.C1", 1, 12, np.float64, start=row)[0, 8:]
    assert uniform.tolist() == [(x + 0.5) / 2**31 - 1 for x in u]
    radius = [np.sqrt(-2 * np.log((x + 0.5) / 2**32)) for x in (u[0], u[2])]
    angle = [2 * np.pi * (x + 0.5) / 2**32 for x in (u[1], u[3])]
    expected = [f(a) * r for r, a in zip(radius, angle, strict=True) for f in (np.cos, np.sin)]
    np.testing.assert_allclose(normal, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [uniform_rows, normal_rows])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (1, 1), (700, 19), (3, 4), (65, 16), (5, 130)])
def test_compiled_equals_reference_bit_for_bit(make, dtype, rows, columns, rng):
    seed = int(rng.integers(2**63)) * 2 + 1
    start = int(rng.choice([0, 2**32 - 300, 2**40]))
    compiled = make(seed, "top.0.weight", rows, columns, dtype, start=start, scale=0.3)
    reference = make(seed, "top.0.weight", rows, columns, dtype, start=start, scale=0.3, device=REFERENCE)
    assert compiled.dtype == reference.dtype == dtype
    assert compiled.shape == (rows, columns)
    np.testing.assert_array_equal(compiled, reference)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 21),
    cut=st.integers(0, 60),
    start=st.integers(0, 2**34),
    data=st.data(),
)
def test_pieces_equal_the_whole(rows, columns, cut, start, data):
    make = data.draw(st.sampled_from([uniform_rows, normal_rows]))
    device = data.draw(st.sampled_from([None, REFERENCE]))
    cut = min(cut, rows)
    whole = make(11, "table.x", rows, columns, np.float32, start=start, device=device)
    parts = np.empty_like(whole)
    make(11, "table.x", cut, columns, np.float32, start=start, out=parts[:cut], device=device)
    make(11, "table.x", rows - cut, columns, np.float32, start=start + cut, out=parts[cut:], device=device)
    np.testing.assert_array_equal(parts, whole)
    narrow = make(11, "table.x", rows, max(1, columns // 2), np.float32, start=start, device=device)
    np.testing.assert_array_equal(narrow, whole[:, : narrow.shape[1]])


def test_distributions_and_separation_of_tensors(rng):
    seed = int(rng.integers(2**63))
    size = 400_000
    uniform = uniform_rows(seed, "table.a", size // 16, 16, np.float64).ravel()
    normal = normal_rows(seed, "table.a", size // 16, 16, np.float64).ravel()
    # Six standard errors each: a false alarm in 5e8 runs.
    assert abs(uniform.mean()) < 6 * np.sqrt(1 / 3 / size)
    assert abs((uniform**2).mean() - 1 / 3) < 6 * np.sqrt(4 / 45 / size)
    assert abs(normal.mean()) < 6 / np.sqrt(size)
    assert abs((normal**2).mean() - 1) < 6 * np.sqrt(2 / size)
    assert abs((normal**4).mean() - 3) < 6 * np.sqrt(96 / size)
    assert uniform.min() > -1
    assert uniform.max() < 1
    for other_seed, name in ((seed, "table.b"), (seed ^ 1, "table.a"), (seed ^ (1 << 40), "table.a")):
        other = uniform_rows(other_seed, name, size // 16, 16, np.float64).ravel()
        assert abs(np.corrcoef(uniform, other)[0, 1]) < 6 / np.sqrt(size)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 20), step=st.integers(1, 9), start=st.integers(0, 2**34), first=st.integers(0, 19),
    columns=st.integers(1, 20), device=st.sampled_from([None, REFERENCE]),
)  # fmt: skip
def test_strided_rows_and_columns_equal_those_of_the_whole(rows, step, start, first, columns, device):
    whole = uniform_rows(5, "table.x", rows * step, first + columns + 3, np.float64, start=start)
    part = uniform_rows(
        5, "table.x", rows, columns, np.float64, start=start, step=step, first_column=first, device=device
    )
    np.testing.assert_array_equal(part, whole[::step, first : first + columns])
