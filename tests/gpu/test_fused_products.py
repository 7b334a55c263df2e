"""Products with a ReLU in their epilogue against float64, on a GPU that has them: fresh inputs, poisoned outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlrm import fused_products

EPS = {"float16": 2.0**-10, "uint16": 2.0**-7}
"""uint16: the bits of bfloat16."""
SHAPES = [  # rows, depth, columns
    (1, 8, 8),
    (127, 16, 128),
    (129, 64, 256),
    (333, 136, 392),
    (1000, 480, 1024),
    (4097, 256, 512),
    (6912, 1024, 1024),
    (777, 128, 2048),
]


@pytest.fixture
def products(machine: Any) -> Any:
    if machine.emulated:
        pytest.skip("the tensor cores' instructions do not run emulated")
    from dlrm import fused_products_cuda

    if not fused_products_cuda.available():
        pytest.skip("Hopper alone has the instructions")
    return fused_products_cuda


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as ``dtype``, bfloat16 cut off."""
    if dtype != "uint16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16).reshape(values.shape)


def decode(array: np.ndarray) -> np.ndarray:
    """The values in float32, which holds them exactly."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, wide: int = 0) -> np.ndarray:
    """Random numbers; of a matrix the first columns, with ``wide`` NaNs behind every row."""
    full = np.full((*shape[:-1], shape[-1] + wide), np.nan, np.float32)
    full[..., : shape[-1]] = rng.standard_normal(shape, np.float32)
    return encode(full, dtype)


def bytes_of_bits(columns: int) -> int:
    return -(-columns // 128) * 16


def near(found: np.ndarray, expected: np.ndarray, depth: int, dtype: str) -> None:
    """Rounded once, from float32 sums of ``depth`` products of about 1."""
    error = np.abs(found - expected)
    limit = EPS[dtype] * np.abs(expected) + 1e-6 * depth + 1e-6
    assert (error <= limit).all(), f"{(~(error <= limit)).sum()} of {error.size} numbers, by up to {error.max()}"


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
@pytest.mark.parametrize("summed", [False, True])
def test_data_product(
    products: Any, machine: Any, rows: int, depth: int, columns: int, summed: bool, dtype: str, rng: np.random.Generator
) -> None:
    grad, weight = normal(rng, (rows, depth), dtype, wide=8), normal(rng, (depth, columns), dtype)
    bits = rng.integers(0, 256, (rows, bytes_of_bits(columns)), np.uint8)
    expected, sums = np.empty((rows, columns), np.float32), np.empty(columns)
    fused_products.data_product(decode(grad), decode(weight), bits, expected, sums)
    arrays = [machine.array(array) for array in (grad, weight, bits)]
    assert products.supports(arrays[0], arrays[1], arrays[0], columns)
    out = machine.array(encode(np.full((rows, columns), np.nan), dtype))
    totals = machine.array(np.full(columns, np.nan, np.float32)) if summed else None
    first = None
    for _ in range(3):  # what counts the blocks is left as it was found
        products.data_product(*arrays, out, totals)
        near(decode(machine.host(out)), expected, depth, dtype)
        if summed:
            found = machine.host(totals)
            assert first is None or (first == found).all()  # a fixed order
            first = found
            size = np.abs(expected).astype(np.float64).sum(0)
            assert (np.abs(found - sums) <= 1e-5 * (size + depth)).all()
            totals.fill(np.nan)
        out.fill(0x7FC0 if dtype == "uint16" else np.nan)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_relu_product(
    products: Any, machine: Any, rows: int, depth: int, columns: int, masked: bool, dtype: str, rng: np.random.Generator
) -> None:
    x, weight, bias = (
        normal(rng, shape, dtype, wide)
        for shape, wide in (((rows, depth), 8), ((columns, depth), 0), ((columns,), 0))
    )  # fmt: skip
    sums = decode(x)[:, :depth] @ decode(weight).T + decode(bias)
    expected = np.empty((rows, columns), np.float32)
    fused_products.relu_product(decode(x), decode(weight), decode(bias), expected, None)
    out = machine.array(encode(np.full((rows, columns + 24), 7.0), dtype))
    bits = machine.array(np.full((rows, bytes_of_bits(columns)), 0xAA, np.uint8)) if masked else None
    products.relu_product(*(machine.array(array) for array in (x, weight, bias)), out, bits)
    found = decode(machine.host(out))
    near(found[:, :columns], expected, depth, dtype)
    assert (found[:, columns:] == 7).all()  # beyond the layer's columns nothing is written
    if bits is not None:
        on = np.unpackbits(machine.host(bits), axis=1, bitorder="little").astype(np.bool_)
        sure = np.abs(sums) > 1e-6 * depth + 1e-6
        assert (on[:, :columns] == (sums > 0))[sure].all()
        assert (on[:, :columns] == (found[:, :columns] > 0)).all()
        assert not on[:, columns:].any()


def test_not_a_number_goes_through(products: Any, machine: Any, rng: np.random.Generator) -> None:
    x, weight, bias = (normal(rng, shape, "float16") for shape in ((200, 64), (256, 64), (256,)))
    x[70, 3] = np.nan
    out, bits = machine.array(np.zeros((200, 256), np.float16)), machine.array(np.zeros((200, 32), np.uint8))
    arrays = [machine.array(array) for array in (x, weight, bias)]
    products.relu_product(*arrays, out, bits)
    found = machine.host(out)
    assert np.isnan(found[70]).all()
    assert not np.isnan(np.delete(found, 70, axis=0)).any()
    assert (machine.host(bits)[70] == 255).all()
    below = machine.array(np.full((200, 64), 7, np.float16))
    on = np.zeros((200, 16), np.uint8)
    on[:, 0] = 1
    products.data_product(out, arrays[1], machine.array(on), below, None)
    found = machine.host(below)
    assert np.isnan(found[70, 0])
    assert (found[:, 1:] == 0).all()  # also where the product is a NaN


def test_in_a_graph(products: Any, machine: Any, rng: np.random.Generator) -> None:
    import cupy

    rows, depth, columns = 2000, 256, 512
    grad, weight = normal(rng, (rows, depth), "float16"), normal(rng, (depth, columns), "float16")
    bits = rng.integers(0, 256, (rows, columns // 8), np.uint8)
    expected, sums = np.empty((rows, columns), np.float32), np.empty(columns)
    arrays = [machine.array(array) for array in (grad, weight, bits)]
    out, totals = machine.array(np.zeros((rows, columns), np.float16)), machine.array(np.zeros(columns, np.float32))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        products.data_product(*arrays, out, totals)
        stream.begin_capture()
        for _ in range(2):
            products.data_product(*arrays, out, totals)
        graph = stream.end_capture()
        for _ in range(3):
            grad = normal(rng, (rows, depth), "float16")
            arrays[0].set(grad, stream=stream)
            out.fill(np.nan)
            totals.fill(np.nan)
            graph.launch(stream)
            stream.synchronize()
            fused_products.data_product(decode(grad), decode(weight), bits, expected, sums)
            near(decode(machine.host(out)), expected, depth, "float16")
            size = np.abs(expected).astype(np.float64).sum(0)
            assert (np.abs(machine.host(totals) - sums) <= 1e-5 * (size + depth)).all()
