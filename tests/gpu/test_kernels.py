"""Every CUDA kernel against its formula in float64: fresh inputs, poisoned outputs, odd shapes, numbers that are none.

bfloat16 has no NumPy type; its bits travel as uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlrm.scalars import NOT_FINITE, OVERFLOW, SIZE, write_guard, write_scalars

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
NO_OFFSETS, NO_WEIGHTS = np.empty(0, np.int64), np.empty(0, np.float32)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as an array of ``dtype``; bfloat16 rounded to nearest even."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded.reshape(values.shape)).astype(np.uint16)


def decode(array: Any) -> np.ndarray:
    """An array of the host or the GPU as float64."""
    host = np.asarray(array.get() if hasattr(array, "get") else array)
    if host.dtype == np.uint16:
        host = (host.astype(np.uint32) << 16).view(np.float32)
    return host.astype(np.float64)


def poisoned(machine: Any, shape: tuple[int, ...], dtype: str) -> Any:
    return machine.array(encode(np.full(shape, np.nan), dtype))


def assert_close(found: Any, expected: np.ndarray, eps: float, size: np.ndarray | float) -> None:
    """|found - expected| <= eps * size where expected is finite; elsewhere the same inf or NaN."""
    values = decode(found)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(values[~finite], expected[~finite])
    limit = np.broadcast_to(eps * np.asarray(size), expected.shape)[finite]
    error = np.abs(values[finite] - expected[finite])
    assert not np.isnan(error).any()
    assert (error <= limit).all(), f"worst {(error / limit).max():.3g} times the limit"


class Tables:
    """Tables of 1 to a few thousand rows, in one array, and keys that favour low rows."""

    def __init__(self, rng: np.random.Generator, dim: int, num_rows: int, dtype: str, key_dtype: str) -> None:
        self.rows = np.array([1, 3, 40, 2000, 77])
        self.row_start = np.cumsum(self.rows) - self.rows
        self.place = np.array([5, 1, 2, 4, 3])
        self.num_rows, self.dim = num_rows, dim
        self.weight = encode(rng.standard_normal((self.rows.sum(), dim)), dtype)
        self.keys = self.draw(rng, np.repeat(self.rows, num_rows)).astype(key_dtype)

    @staticmethod
    def draw(rng: np.random.Generator, limits: np.ndarray) -> np.ndarray:
        return (limits * rng.random(len(limits)) ** 4).astype(np.int64)

    def absolute(self) -> np.ndarray:
        return self.row_start[:, None] + self.keys.reshape(len(self.rows), self.num_rows)


SHAPES = [(8, 1), (16, 1000), (64, 7), (128, 1000), (128, 33), (256, 100), (48, 129)]


@pytest.mark.parametrize(("dim", "num_rows"), SHAPES)
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("out_dtype", EPS)
@pytest.mark.parametrize("key_dtype", ["int32", "int64"])
def test_rows_are_copied(
    machine: Any, dim: int, num_rows: int, dtype: str, out_dtype: str, key_dtype: str, rng: np.random.Generator
) -> None:
    from embedding.lookup_cuda import gather_pool

    t = Tables(rng, dim, num_rows, dtype, key_dtype)
    spoilt = int(t.absolute()[3, 0])
    t.weight[spoilt, 1] = encode(np.array(np.inf), dtype)
    t.weight[spoilt, 2] = encode(np.array(np.nan), dtype)
    out = poisoned(machine, (num_rows + 1, 6, dim), out_dtype)
    arguments = [machine.array(x) for x in (t.weight, t.row_start, t.keys, NO_OFFSETS, NO_WEIGHTS, np.zeros(5, bool))]
    gather_pool(*arguments, machine.array(t.place), num_rows, out)
    expected = np.full(out.shape, np.nan)
    expected[:num_rows, t.place] = decode(t.weight)[t.absolute()].transpose(1, 0, 2)
    np.testing.assert_array_equal(decode(out), decode(encode(expected, out_dtype)))


@pytest.mark.parametrize(("dim", "num_rows"), SHAPES)
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_are_pooled(
    machine: Any, dim: int, num_rows: int, dtype: str, weighted: bool, rng: np.random.Generator
) -> None:
    from embedding.lookup_cuda import gather_pool

    t = Tables(rng, dim, num_rows, dtype, "int32")
    lengths = rng.integers(0, np.repeat([2, 101, 4, 1, 30], num_rows) + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    keys = t.draw(rng, np.repeat(np.repeat(t.rows, num_rows), lengths)).astype(rng.choice(["int32", "int64"]))
    factors = rng.uniform(-2, 2, len(keys)).astype(np.float32) if weighted else NO_WEIGHTS
    mean = rng.random(5) < 0.5
    out = poisoned(machine, (num_rows, 6, dim), "float32")
    arguments = [machine.array(x) for x in (t.weight, t.row_start, keys, offsets, factors, mean, t.place)]
    gather_pool(*arguments, num_rows, out)

    bag = np.repeat(np.arange(5 * num_rows), lengths)
    rows = decode(t.weight)[t.row_start[bag // num_rows] + keys] * (factors[:, None] if weighted else 1.0)
    pooled, sizes = np.zeros((5 * num_rows, dim)), np.zeros((5 * num_rows, dim))
    np.add.at(pooled, bag, rows)
    np.add.at(sizes, bag, np.abs(rows))
    divisor = np.where(np.repeat(mean, num_rows), np.maximum(1, lengths), 1)[:, None]
    expected, size = np.full(out.shape, np.nan), np.ones(out.shape)
    expected[:, t.place] = (pooled / divisor).reshape(5, num_rows, dim).transpose(1, 0, 2)
    size[:, t.place] = (sizes / divisor).reshape(5, num_rows, dim).transpose(1, 0, 2)
    assert_close(out, expected, 130 * EPS["float32"], size + 1e-30)


def blocks(machine: Any, **values: Any) -> tuple[Any, Any]:
    scalars = write_scalars(np.empty(SIZE, np.float32), global_rows=100, valid_rows=100, step=3, seed=7, **values)
    return machine.array(scalars), machine.array(write_guard(np.empty(SIZE, np.float32), 1024.0))


@pytest.mark.parametrize(("dim", "num_rows"), [*SHAPES, (128, 20_000)])
@pytest.mark.parametrize("dtype", EPS)
def test_sgd_subtracts_every_gradient_once(
    machine: Any, dim: int, num_rows: int, dtype: str, rng: np.random.Generator
) -> None:
    from embedding.sparse_optim_cuda import sgd_one_hot

    t = Tables(rng, dim, num_rows, "float32", "int32")
    gradients = encode(100 * rng.standard_normal((num_rows, 6, dim)), dtype)
    scalars, guard = blocks(machine, lr=0.0, sparse=[0.5])
    weight = machine.array(t.weight)
    arguments = [machine.array(x) for x in (t.row_start, t.keys, t.place)]
    for flag in (NOT_FINITE, OVERFLOW):
        stop = guard.copy()
        stop.view(np.int32)[flag] = 1
        sgd_one_hot(weight, *arguments, num_rows, machine.array(gradients), scalars, stop)
        np.testing.assert_array_equal(machine.host(weight), t.weight)
    sgd_one_hot(weight, *arguments, num_rows, machine.array(gradients), scalars, guard)

    steps = 0.5 / 1024 * decode(gradients)[:, t.place].transpose(1, 0, 2)
    expected, size = t.weight.astype(np.float64), np.abs(t.weight.astype(np.float64))
    np.subtract.at(expected, t.absolute(), steps)
    np.add.at(size, t.absolute(), np.abs(steps))
    counts = np.bincount(t.absolute().ravel(), minlength=len(expected))
    assert_close(weight, expected, EPS["float32"], size * (counts[:, None] + 2))
    np.testing.assert_array_equal(machine.host(weight)[counts == 0], t.weight[counts == 0])


INTERACTIONS = [(27, 128, 1), (27, 128, 0), (9, 64, 1), (2, 8, 1), (40, 16, 0), (64, 32, 1), (17, 256, 1), (3, 24, 0)]


def dots(vectors: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """The interaction in float64, and the same of absolute values."""
    lower = np.tril_indices(vectors.shape[1], -1)
    results = []
    for v in (vectors, np.abs(vectors)):
        products = np.matmul(v, v.transpose(0, 2, 1))[:, lower[0], lower[1]]
        results.append(np.concatenate([v[:, 0], products], axis=1) if first else products)
    return results[0], results[1]


@pytest.mark.parametrize("num_rows", [1, 7, 1000])
@pytest.mark.parametrize(("num_vectors", "dim", "first"), INTERACTIONS)
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("padded", [False, True])
def test_interaction(
    machine: Any,
    num_rows: int,
    num_vectors: int,
    dim: int,
    first: int,
    dtype: str,
    padded: bool,
    rng: np.random.Generator,
) -> None:
    from dlrm.interaction_cuda import interaction_backward, interaction_backward_relu, interaction_forward

    vectors = encode(rng.standard_normal((num_rows, num_vectors, dim)) * (rng.random((num_rows, 1, dim)) < 0.9), dtype)
    exact = decode(vectors)
    expected, size = dots(exact, first)
    width = expected.shape[1]
    out = poisoned(machine, (num_rows, -(-width // 8) * 8 if padded else width), dtype)
    interaction_forward(machine.array(vectors), out[:, :width], first)
    assert_close(out[:, :width], expected, EPS[dtype] + dim * EPS["float32"], size + 1e-3)
    if padded and dtype != "float32":
        assert not decode(out[:, width:]).any()

    grads = encode(rng.standard_normal(out.shape), dtype)
    pairs, lower = np.zeros((num_rows, num_vectors, num_vectors)), np.tril_indices(num_vectors, -1)
    pairs[:, lower[0], lower[1]] = decode(grads)[:, first * dim : width]
    pairs += pairs.transpose(0, 2, 1)
    expected, size = np.matmul(pairs, exact), np.matmul(np.abs(pairs), np.abs(exact))
    if first:
        expected[:, 0] += decode(grads)[:, :dim]
        size[:, 0] += np.abs(decode(grads)[:, :dim])
    found = poisoned(machine, vectors.shape, dtype)
    interaction_backward(machine.array(vectors), machine.array(grads)[:, :width], found, first)
    assert_close(found, expected, EPS[dtype] + num_vectors * EPS["float32"], size + 1e-3)
    if first:
        expected[:, 0][exact[:, 0] <= 0] = 0
    found = poisoned(machine, vectors.shape, dtype)
    interaction_backward_relu(machine.array(vectors), machine.array(grads)[:, :width], found, first)
    assert_close(found, expected, EPS[dtype] + num_vectors * EPS["float32"], size + 1e-3)


@pytest.mark.parametrize("dtype", EPS)
def test_a_number_that_is_none_reaches_its_pairs_and_no_others(
    machine: Any, dtype: str, rng: np.random.Generator
) -> None:
    from dlrm.interaction_cuda import interaction_forward

    vectors = rng.standard_normal((50, 27, 128))
    vectors[20, 4, 9] = np.nan
    out = poisoned(machine, (50, 480), dtype)
    interaction_forward(machine.array(encode(vectors, dtype)), out[:, :479], 1)
    lower = np.tril_indices(27, -1)
    hit = np.zeros((50, 479), bool)
    hit[20, 128:] = (lower[0] == 4) | (lower[1] == 4)
    np.testing.assert_array_equal(np.isnan(decode(out[:, :479])), hit)


@pytest.mark.parametrize(("num_rows", "dim"), [(1, 8), (7, 128), (3000, 40), (300, 128)])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("first", [0, 1])
def test_interaction_of_rows_here_and_from_elsewhere_equals_that_of_all_side_by_side(
    machine: Any, num_rows: int, dim: int, dtype: str, out_dtype: str, first: int, rng: np.random.Generator
) -> None:
    """A third of the rows has come, a third is here and its gradients are sent, a third stays."""
    from dlrm.interaction_cuda import (
        interaction_backward_relu,
        interaction_forward,
        listed_interaction,
        listed_interaction_backward,
    )

    weight = encode(rng.standard_normal((90, dim)), dtype)
    kind = rng.integers(0, 3, (5, num_rows))
    num_come, num_own = int((kind == 0).sum()), int((kind == 1).sum())
    come = encode(rng.standard_normal((num_come, dim)), out_dtype)
    slots, sources = np.full(kind.shape, -1), rng.integers(0, 90, kind.shape)
    slots[kind == 0] = rng.permutation(num_come)
    slots[kind == 1] = num_come + rng.permutation(num_own)
    sources[kind == 0] = ~slots[kind == 0]
    vectors = encode(rng.standard_normal((num_rows, first + 5, dim)), out_dtype)
    for table in range(5):
        here = sources[table] >= 0
        vectors[here, first + table] = encode(decode(weight)[sources[table][here]], out_dtype)
        vectors[~here, first + table] = come[~sources[table][~here]]
    bottom, all_rows = machine.array(vectors[:, 0].copy()), machine.array(vectors)
    lists = [machine.array(x.reshape(-1).astype(np.int32)) for x in (sources, slots)]
    rows, sent = machine.array(weight), machine.array(come)
    width = first * dim + (first + 5) * (first + 4) // 2
    apart, fused = (poisoned(machine, (num_rows, -(-width // 8) * 8), out_dtype) for _ in range(2))
    interaction_forward(all_rows, apart[:, :width], first)
    listed_interaction(bottom, rows, sent, lists[0], num_rows, fused[:, :width], first)
    np.testing.assert_array_equal(decode(fused), decode(apart))

    grads = machine.array(encode(rng.standard_normal(apart.shape), out_dtype))[:, :width]
    apart, fused, direct = (poisoned(machine, vectors.shape, out_dtype) for _ in range(3))
    own = poisoned(machine, (num_own, dim), out_dtype)
    interaction_backward_relu(all_rows, grads, apart, first)
    rest = (rows, sent, lists[0], num_rows, grads)
    listed_interaction_backward(bottom, *rest, fused, None, own, first)
    np.testing.assert_array_equal(decode(fused), decode(apart))
    np.testing.assert_array_equal(decode(sent), decode(come))
    before = decode(direct)
    listed_interaction_backward(bottom, *rest, direct, lists[1], own, first)
    expected, found = decode(apart), decode(direct)
    if first:
        np.testing.assert_array_equal(found[:, 0], expected[:, 0])
    everything = np.concatenate([decode(sent), decode(own)])
    for table in range(5):
        stays = slots[table] < 0
        np.testing.assert_array_equal(found[stays, first + table], expected[stays, first + table])
        np.testing.assert_array_equal(found[~stays, first + table], before[~stays, first + table])
        np.testing.assert_array_equal(everything[slots[table][~stays]], expected[~stays, first + table])


@pytest.mark.parametrize("num_rows", [1, 7, 3000])
@pytest.mark.parametrize("dim", [8, 64, 128, 256])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("first", [0, 1])
def test_look_up_and_interaction_in_one_equal_both(
    machine: Any, num_rows: int, dim: int, dtype: str, out_dtype: str, first: int, rng: np.random.Generator
) -> None:
    from dlrm.interaction_cuda import (
        gather_interaction,
        gather_interaction_backward,
        interaction_backward_relu,
        interaction_forward,
    )
    from embedding.lookup_cuda import gather_pool

    t = Tables(rng, dim, num_rows, dtype, "int32")
    vectors = poisoned(machine, (num_rows, first + 5, dim), out_dtype)
    bottom = machine.array(encode(rng.standard_normal((num_rows, dim)), out_dtype))
    if first:
        vectors[:, 0] = bottom
    weight, row_start, keys = machine.array(t.weight), machine.array(t.row_start), machine.array(t.keys)
    nothing = [machine.array(x) for x in (NO_OFFSETS, NO_WEIGHTS, np.zeros(5, bool), np.arange(first, first + 5))]
    gather_pool(weight, row_start, keys, *nothing, num_rows, vectors)
    width = first * dim + (first + 5) * (first + 4) // 2
    apart, fused = (poisoned(machine, (num_rows, -(-width // 8) * 8), out_dtype) for _ in range(2))
    interaction_forward(vectors, apart[:, :width], first)
    tables = (bottom, weight, row_start, keys, num_rows)
    gather_interaction(*tables, fused[:, :width], first)
    np.testing.assert_array_equal(decode(fused), decode(apart))

    grads = machine.array(encode(rng.standard_normal(apart.shape), out_dtype))[:, :width]
    apart, fused = (poisoned(machine, vectors.shape, out_dtype) for _ in range(2))
    interaction_backward_relu(vectors, grads, apart, first)
    gather_interaction_backward(*tables, grads, fused, first)
    np.testing.assert_array_equal(decode(fused), decode(apart))
