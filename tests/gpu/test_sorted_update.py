"""The row sort and the update by sorted rows against their references in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.scalars import NOT_FINITE, OVERFLOW, SIZE, write_guard, write_scalars
from embedding import row_sort_cuda, sorted_update_cuda
from embedding.row_sort import COUNT, RowSort, digits_of, sort_rows
from embedding.sorted_update import update_sorted
from embedding.sparse_optim import KINDS, constants, mark_touched, state_specs, widened
from embedding.sparse_optim import sgd_bags as host_sgd_bags
from embedding.sparse_optim_cuda import sgd_bags, sgd_one_hot

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
NO_OFFSETS, NO_WEIGHTS = np.empty(0, np.int64), np.empty(0, np.float32)
HOST = HostDevice(1, compiled=False)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as ``dtype``; bfloat16 as its bits in uint16, rounded to nearest even."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(values.shape)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def sort_on(machine: Any, sort: RowSort) -> RowSort:
    """The same room, on the machine, poisoned."""
    moved = {}
    for name in ("rows", "named"):
        moved[name] = tuple(machine.array(np.full_like(array, 0xFFFFFFFF)) for array in getattr(sort, name))
    for name in ("bags", "info", "counts", "totals", "open_runs"):
        moved[name] = machine.array(np.full_like(getattr(sort, name), 0xFFFFFFFF))
    partials = machine.array(np.full_like(sort.partials, np.nan))
    return RowSort(**moved, order=sort.order, partials=partials)


class Batch:
    """Tables in one array, bags of keys that favour low rows, gradients."""

    def __init__(
        self, rng: np.random.Generator, rows: list[int], num_rows: int, *, bags: str, key_dtype: str = "int32"
    ) -> None:
        self.rows = np.array(rows)
        self.num_rows, tables = num_rows, len(rows)
        self.row_start = np.cumsum(self.rows) - self.rows
        self.place = rng.permutation(tables + 1)[:tables].astype(np.int64)
        self.mean = rng.random(tables) < 0.5
        lengths = np.ones(tables * num_rows, np.int64)
        if bags != "one":
            lengths = rng.integers(0, np.repeat(rng.choice([1, 3, 9], tables), num_rows) + 1)
        self.offsets = NO_OFFSETS if bags == "one" else np.concatenate([[0], np.cumsum(lengths)])
        limits = np.repeat(np.repeat(self.rows, num_rows), lengths)
        self.keys = (limits * rng.random(len(limits)) ** 4).astype(key_dtype)
        self.key_weights = rng.uniform(-1, 2, len(limits)).astype(np.float32) if bags == "weighted" else NO_WEIGHTS
        if bags != "one":  # a captured step's array has room for more keys than a batch has
            self.keys = np.concatenate([self.keys, np.full(70, 10**6, key_dtype)])

    def sort(self, dim: int) -> RowSort:
        return RowSort.create(HOST, len(self.keys), int(self.rows.sum()), dim, weighted=len(self.key_weights) > 0)

    def named(self) -> tuple[np.ndarray, ...]:
        return self.row_start, self.keys, self.offsets, self.key_weights


def sorted_on(machine: Any, batch: Batch, dim: int) -> tuple[RowSort, list[Any]]:
    room = sort_on(machine, batch.sort(dim))
    named = [machine.array(array) for array in batch.named()]
    row_sort_cuda.sort_rows(*named, batch.num_rows, int(batch.rows.sum()), room)
    return room, named


@pytest.mark.parametrize("bags", ["one", "bags", "weighted"])
@pytest.mark.parametrize(
    ("rows", "num_rows"),
    [([1], 1), ([3, 1, 700], 1500), ([2**31, 5, 2**30], 40), ([40, 2, 130_000, 1], 2100), ([300] * 26, 33)],
)
def test_rows_are_sorted(machine: Any, bags: str, rows: list[int], num_rows: int, rng: np.random.Generator) -> None:
    batch = Batch(rng, rows, num_rows, bags=bags, key_dtype=str(rng.choice(["int32", "int64"])))
    room, _ = sorted_on(machine, batch, 4)
    expected = batch.sort(4)
    sort_rows(*batch.named(), num_rows, int(batch.rows.sum()), expected)
    count = int(expected.info[COUNT])
    assert machine.host(room.info)[COUNT] == count
    for name in ("rows", "named"):
        found = machine.host(getattr(room, name)[room.order])[:count]
        np.testing.assert_array_equal(found, getattr(expected, name)[expected.order][:count], err_msg=name)
    if bags == "weighted":
        np.testing.assert_array_equal(machine.host(room.bags)[:count], expected.bags[:count])


def test_counts_of_many_tiles_add_up(machine: Any, rng: np.random.Generator) -> None:
    """More tiles than a block adds up at a time, without the millions of keys that fill them."""
    tiles, bits = int(rng.integers(2049, 2500)), 2
    counts = rng.integers(0, 4096, (1 << bits, tiles)).astype(np.uint32)
    found, totals = machine.array(counts), machine.array(np.zeros(1 << bits, np.uint32))
    defines = (("KEY", "int"), ("BAGS", 0), ("WEIGHTED", 0), ("BITS", bits))
    kernel = row_sort_cuda.load(row_sort_cuda.SOURCE, "add_counts", defines)
    kernel(1 << bits, row_sort_cuda.THREADS, found, np.uint32(tiles), totals)
    np.testing.assert_array_equal(machine.host(found), np.cumsum(counts, 1) - counts)
    np.testing.assert_array_equal(machine.host(totals), counts.sum(1))


@pytest.mark.parametrize("bags", ["one", "bags"])
def test_touched_rows_are_marked(machine: Any, bags: str, rng: np.random.Generator) -> None:
    batch = Batch(rng, [3, 1, 700, 40], 150, bags=bags)
    expected = rng.random(744) < 0.1
    touched = machine.array(expected)
    mark_touched(batch.keys, batch.offsets, batch.row_start, 150, expected)
    named = [machine.array(array) for array in (batch.keys, batch.offsets, batch.row_start)]
    row_sort_cuda.mark_touched(*named, 150, touched)
    np.testing.assert_array_equal(machine.host(touched), expected)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 512, 513, 2**18, 2**18 + 1, 24_100_000, 187_767_399, 2**32])
def test_digits_reach_every_row(num_rows: int) -> None:
    digits, bits = digits_of(num_rows)
    assert (1 << digits * bits) >= num_rows
    assert bits <= 9
    assert digits * bits <= 32
    assert digits == 1 or 1 << (digits - 1) * 9 < num_rows


def config(kind: str) -> OptimizerConfig:
    return OptimizerConfig(
        kind=kind,  # type: ignore[arg-type]
        momentum=0.8,
        eps=1e-3,
        ftrl_beta=0.5,
        l1=0.01,
        l2=0.02,
        initial_accumulator=0.1,
    )


class Update:
    """One update of a batch: on the machine, and the reference's in float64."""

    def __init__(self, rng: np.random.Generator, batch: Batch, kind: str, dim: int, dtype: str, grad: str) -> None:
        self.batch, self.kind, self.dim = batch, kind, dim
        total = int(batch.rows.sum())
        self.weight = encode(rng.standard_normal((total, dim)), dtype)
        self.state = [
            rng.uniform(0.1, 1, (total, 1 if item.per_row else dim)).astype(np.float32)
            for item in state_specs(config(kind))
        ]
        self.gradients = encode(rng.standard_normal((batch.num_rows, len(batch.rows) + 1, dim)) * 64, grad)
        starts = rng.integers(0, 10**6, len(batch.rows))
        columns = np.zeros_like(starts) + 4 * int(rng.integers(3))
        tensors = rng.integers(0, 2**32, len(starts))
        self.origins = np.stack([tensors, starts, starts % 3 + 1, columns, batch.row_start], axis=1)
        self.scalars = write_scalars(
            np.empty(SIZE, np.float32), lr=0.0, global_rows=1, valid_rows=1, step=int(rng.integers(1, 2**31)),
            seed=int(rng.integers(2**63)), sparse=constants(config(kind), 0.05, 7).tolist(),
        )  # fmt: skip
        self.guard = write_guard(np.empty(SIZE, np.float32), 64.0)

    def run(self, machine: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        batch = self.batch
        room, named = sorted_on(machine, batch, self.dim)
        weight, state = machine.array(self.weight), [machine.array(array) for array in self.state]
        rest = [machine.array(x) for x in (batch.mean, batch.place, self.gradients, self.origins)]
        blocks = [machine.array(x) for x in (self.scalars, self.guard)]
        sorted_update_cuda.update_sorted(
            self.kind, weight, state, *named, rest[0], rest[1], batch.num_rows, rest[2], rest[3], *blocks, room
        )
        return machine.host(weight), [machine.host(array) for array in state]

    def reference(self, dtype: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        """``dtype`` of weights and state; ``None``: their own."""
        batch = self.batch
        weight = self.weight.copy() if dtype is None else widened(self.weight).astype(dtype)
        state = [array.astype(dtype or np.float32) for array in self.state]
        update_sorted(
            self.kind, weight, state, *batch.named(), batch.mean, batch.place, batch.num_rows, self.gradients,
            self.origins, self.scalars, self.guard, batch.sort(self.dim),
        )  # fmt: skip
        return weight, state

    def touched(self) -> np.ndarray:
        batch, sort = self.batch, self.batch.sort(self.dim)
        sort_rows(*batch.named(), batch.num_rows, int(batch.rows.sum()), sort)
        rows = np.zeros(len(self.weight), bool)
        rows[sort.rows[sort.order][: int(sort.info[COUNT])]] = True
        return rows


# Few lanes a row, one group of lanes a warp, several vectors a lane, and no power of two.
DIMS = [4, 16, 128, 48]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bags", ["one", "bags", "weighted"])
def test_rows_are_updated_once(machine: Any, kind: str, bags: str, rng: np.random.Generator) -> None:
    drawn = (int(rng.choice(DIMS)), str(rng.choice(list(EPS))))
    for dim, grad in [drawn] if machine.emulated else [drawn, *((128, grad) for grad in EPS)]:
        # Long runs in two tables, and rows that nobody names.
        rows = [30, 1, 3, 500, 77] if dim < 100 or not machine.emulated else [3, 40]
        batch = Batch(rng, rows, 260, bags=bags)
        check(machine, Update(rng, batch, kind, dim, "float32", grad))


def check(machine: Any, update: Update) -> None:
    weight, state = update.run(machine)
    expected_weight, expected_state = update.reference(np.float64)
    touched = update.touched()
    np.testing.assert_array_equal(weight[~touched], update.weight[~touched])
    # A sum of n terms in float32 is off by some sqrt(n) roundings of its largest partial sum; FTRL magnifies it.
    tolerance = 1e-3 if update.kind == "ftrl" else 1e-4
    np.testing.assert_allclose(weight, expected_weight, rtol=tolerance, atol=tolerance)
    for array, expected, start in zip(state, expected_state, update.state, strict=True):
        np.testing.assert_array_equal(array[~touched], start[~touched])
        np.testing.assert_allclose(array, expected, rtol=tolerance, atol=tolerance * (1 + np.abs(expected).max()))


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad"])
def test_runs_over_many_chunks(machine: Any, kind: str, rng: np.random.Generator) -> None:
    """Rows of 2,000 to 9,000 occurrences: whole stretches of chunks, and runs that end where a chunk does."""
    dim = 4 if machine.emulated else 128
    batch = Batch(rng, [5, 1, 200, 1], 5000, bags="one")
    batch.keys[:] = batch.keys // 3 * (batch.keys < 4)
    batch.keys[:64] = 4
    update = Update(rng, batch, kind, dim, "float32", "float32")
    check(machine, update)


@pytest.mark.parametrize("kind", ["sgd", "momentum"])
def test_the_same_bits_every_time(machine: Any, kind: str, rng: np.random.Generator) -> None:
    update = Update(rng, Batch(rng, [2, 600], 400, bags="bags"), kind, 16, "float32", "float16")
    weight, state = update.run(machine)
    for _ in range(2 if machine.emulated else 20):
        again, again_state = update.run(machine)
        np.testing.assert_array_equal(again, weight)
        for array, expected in zip(again_state, state, strict=True):
            np.testing.assert_array_equal(array, expected)


def test_sgd_without_wide_additions(machine: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """The branch of GPUs before sm_90, which `CROSSLANE_FORCE_ARCH=80` takes for a whole run on a GPU."""
    if machine.emulated:
        monkeypatch.setenv("CROSSLANE_FORCE_ARCH", "80")
    check(machine, Update(rng, Batch(rng, [30, 1, 300], 260, bags="bags"), "sgd", 16, "float32", "float16"))


@pytest.mark.parametrize("bags", ["one", "bags", "weighted"])
def test_atomic_additions_come_to_the_same(machine: Any, bags: str, rng: np.random.Generator) -> None:
    for dim in [int(rng.choice([4, 16, 48]))] if machine.emulated else DIMS:
        batch = Batch(rng, [30, 1, 3, 500, 77], 260, bags=bags)
        update = Update(rng, batch, "sgd", dim, "float32", str(rng.choice(["float32", "float16"])))
        weight, stopped = machine.array(update.weight), update.guard.copy()
        stopped.view(np.int32)[int(rng.choice([NOT_FINITE, OVERFLOW]))] = 1
        row_start, keys, offsets, key_weights = (machine.array(array) for array in batch.named())
        place, gradients, scalars = (machine.array(x) for x in (batch.place, update.gradients, update.scalars))
        for guard in (stopped, update.guard):
            rest = (place, batch.num_rows, gradients, scalars, machine.array(guard))
            if bags == "one":
                sgd_one_hot(weight, row_start, keys, *rest)
            else:
                sgd_bags(weight, row_start, keys, offsets, key_weights, machine.array(batch.mean), *rest)
            if guard is stopped:
                np.testing.assert_array_equal(machine.host(weight), update.weight)
        expected, _ = update.reference(np.float64)
        np.testing.assert_allclose(machine.host(weight), expected, rtol=1e-4, atol=1e-4)
        touched = update.touched()
        np.testing.assert_array_equal(machine.host(weight)[~touched], update.weight[~touched])
        if bags != "one" and update.gradients.dtype == np.float32:
            plain = update.weight.astype(np.float64)
            numbers = (update.gradients, update.scalars, update.guard)
            host_sgd_bags(plain, *batch.named(), batch.mean, batch.place, batch.num_rows, *numbers)
            np.testing.assert_allclose(plain, expected, rtol=1e-12)


@pytest.mark.parametrize("flag", [NOT_FINITE, OVERFLOW])
def test_a_blocked_update_writes_nothing(machine: Any, flag: int, rng: np.random.Generator) -> None:
    update = Update(rng, Batch(rng, [2, 60], 100, bags="one"), "adam", 16, "float32", "float32")
    update.guard.view(np.int32)[flag] = 1
    weight, state = update.run(machine)
    np.testing.assert_array_equal(weight, update.weight)
    for array, start in zip(state, update.state, strict=True):
        np.testing.assert_array_equal(array, start)


def test_ftrl_at_rate_zero_changes_nothing(machine: Any, rng: np.random.Generator) -> None:
    update = Update(rng, Batch(rng, [2, 60], 100, bags="one"), "ftrl", 16, "float32", "float32")
    update.scalars[8] = 0
    weight, _ = update.run(machine)
    np.testing.assert_array_equal(weight, update.weight)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tables_of_16_bits_round_to_a_neighbour(machine: Any, kind: str, dtype: str, rng: np.random.Generator) -> None:
    dim = 16 if machine.emulated else 128
    update = Update(rng, Batch(rng, [1, 3, 300], 200, bags="bags"), kind, dim, dtype, "float16")
    weight, _ = update.run(machine)
    exact, _ = update.reference(np.float64)
    touched, values = update.touched(), widened(weight).astype(np.float64)
    np.testing.assert_array_equal(weight[~touched], update.weight[~touched])
    # One spacing of the format, and what float32 has lost before.
    limit = np.maximum(np.abs(exact) * EPS[dtype], 2.0**-24) * 1.01 + 1e-5
    assert (np.abs(values - exact) <= limit)[touched].all()
    same, _ = update.reference(None)
    # The same random numbers: the reference differs only where its float32 sums end on the other side of a draw.
    assert (weight == same)[touched].mean() > 0.9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_steps_are_not_lost(machine: Any, dtype: str, rng: np.random.Generator) -> None:
    """Steps of a quarter of the format's spacing move the mean as in float32: 100,000 of them on a GPU."""
    rows, dim, steps = (32, 16, 300) if machine.emulated else (64, 128, 10**5)
    update = Update(rng, Batch(rng, [rows], rows, bags="one"), "sgd", dim, dtype, "float32")
    batch = update.batch
    batch.keys[:] = np.arange(rows)
    update.weight[...] = encode(np.ones(1), dtype)
    step = EPS[dtype] / 4
    update.gradients[...] = -step / 0.05 * 64  # against the rate and the loss scale
    room, named = sorted_on(machine, batch, dim)
    weight, scalars, guard = (machine.array(x) for x in (update.weight, update.scalars, update.guard))
    rest = [machine.array(x) for x in (batch.mean, batch.place, update.gradients, update.origins)]
    number = scalars.view(np.int32)[4:5]  # of the step
    for _ in range(steps):
        number += 1
        # No row is in two chunks: the order can be used again.
        sorted_update_cuda.update_sorted(
            "sgd", weight, [], *named, rest[0], rest[1], rows, rest[2], rest[3], scalars, guard, room
        )
    moved = widened(machine.host(weight)).astype(np.float64) - 1
    # Every step ends a spacing too high or too low, and on average where it should: a walk. A spacing is at most EPS
    # times the largest value; the mean of N walks has this deviation at most, and 7 of it never happen.
    spacing = EPS[dtype] * (1 + steps * step + np.abs(moved).max())
    deviation = np.sqrt(steps * step * spacing / moved.size)
    assert abs(moved.mean() - steps * step) < 7 * deviation + 1e-4 * steps * step
    # Which would say nothing if the walks were as wide as the way.
    assert 7 * deviation < 0.3 * steps * step
    assert moved.std() > 0


def test_rounding_a_number_has_the_number_as_its_mean(rng: np.random.Generator) -> None:
    from embedding.sorted_update import round_stochastically

    draws = 10**5
    for exponent in (-30, -24, -20, -15, -14, -3, 0, 10):
        value = np.float32(rng.uniform(1, 2) * 2.0**exponent * rng.choice([-1, 1]))
        random = rng.integers(0, 2**32, draws, dtype=np.uint32)
        for dtype, bits, smallest in ((np.float16, 10, 2.0**-24), (np.uint16, 7, 0.0)):
            rounded = widened(round_stochastically(np.full(draws, value), random, np.dtype(dtype))).astype(np.float64)
            spacing = max(2.0 ** (exponent - bits), smallest)
            assert len(np.unique(rounded)) <= 2
            assert (np.abs(rounded - value) <= spacing).all()
            assert abs(rounded.mean() - value) <= 7 * spacing * 0.5 / np.sqrt(draws)


def test_what_is_no_number_stays_none() -> None:
    from embedding.sorted_update import round_stochastically

    values = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0, -0.0], np.float32)
    random = np.full(7, 0xFFFFFFFF, np.uint32)
    half = round_stochastically(values, random, np.dtype(np.float16))
    np.testing.assert_array_equal(half, np.array([np.nan, np.inf, -np.inf, np.inf, -np.inf, 0, 0], np.float16))
    wide = widened(round_stochastically(values, random, np.dtype(np.uint16)))
    np.testing.assert_array_equal(wide[[0, 1, 2, 5, 6]], values[[0, 1, 2, 5, 6]])
