"""The kernels of tables over several GPUs against their references, and whole steps of ranks that use them."""

from __future__ import annotations

import importlib
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.errors import DeviceError
from dlrm.scalars import NOT_FINITE, OVERFLOW, SIZE, write_guard, write_scalars
from embedding import (
    frequent_rows_cuda,
    pair_lists_cuda,
    row_moves_cuda,
    runs_cuda,
    sorted_update_cuda,
    sparse_optim_cuda,
    touched_rows_cuda,
)
from embedding.frequent_rows import FrequentRows, place_features, places_of_rows
from embedding.pair_lists import PairLayout, PairLists, count_pairs, list_pairs
from embedding.placement import TableSpec
from embedding.row_moves import move_rows
from embedding.row_sort import RowSort, sort_rows
from embedding.runs import Runs, UnitUpdate, number_runs, sum_runs
from embedding.sorted_update import update_summed
from embedding.sparse_optim import KINDS, constants, sgd_one_hot, state_specs
from embedding.topology import share_of
from embedding.touched_rows import TouchedRows, list_touched

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ranks"))

HOST = HostDevice(1, compiled=False)


def on_machine(machine: Any, value: Any, **poison: Any) -> Any:
    """A dataclass with its arrays on the machine; those of ``poison`` hold that number."""
    moved = {}
    for field in fields(value):
        array = getattr(value, field.name)
        if isinstance(array, np.ndarray):
            moved[field.name] = machine.array(
                np.full_like(array, poison[field.name]) if field.name in poison else array
            )
    return replace(value, **moved)


def some_layout(rng: np.random.Generator, ranks: int, sizes: list[int], pads: bool) -> PairLayout:
    tables = len(sizes)
    owner = np.where(rng.random(tables) < 0.4, rng.integers(0, ranks, tables), -1)
    threshold = np.where(owner >= 0, 0, (np.array(sizes) * rng.choice([0, 0.1, 1], tables)).astype(np.int64))
    start = np.cumsum(threshold) - threshold
    own_start = threshold.sum() + np.cumsum(sizes)
    frequent, rank = int(threshold.sum()), int(rng.integers(ranks))
    order = [*rng.permutation([other for other in range(ranks) if other != rank]).tolist(), rank]
    return PairLayout(
        threshold=threshold.astype(np.int64), owner=owner.astype(np.int32), frequent_start=start, own_start=own_start,
        keys_of=rng.integers(0, tables, tables).astype(np.int32),
        place=rng.permutation(tables + 1)[:tables].astype(np.int64), num_places=tables + 1, ranks=ranks, rank=rank,
        own_pad=int(own_start[-1] + sizes[-1]) if pads else -1,
        frequent_pad=(frequent - start if pads else np.full(tables, -1)).astype(np.int32), frequent=frequent,
        order=tuple(order), chunk_of=np.argsort(order).astype(np.int32), relay_row_start=np.cumsum(sizes) - sizes,
        relay_pad=sum(sizes), total_rows=int(own_start[-1] + sizes[-1]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "global_rows", "room"),
    [(1, 40, 1.0), (2, 1300, 1.0), (3, 1601, 0.8), (8, 4200, 1.0), (5, 3, 1.0), (40, 700, 1.0)],
)  # fmt: skip
@pytest.mark.parametrize("listed", [False, True])
def test_lists(machine: Any, ranks: int, global_rows: int, room: float, listed: bool, rng: np.random.Generator) -> None:
    sizes = [1, 900, 40, 30_000]
    layout = some_layout(rng, ranks, sizes, bool(rng.integers(2)))
    keys = np.stack([(size * rng.random(global_rows) ** 2) for size in sizes]).astype(rng.choice(["int32", "int64"]))
    keys[rng.random(keys.shape) < rng.choice([0, 0.1])] = -1  # none
    rows = share_of(global_rows, ranks, 0)
    counting = PairLists.create(HOST, layout, rows, [0] * ranks, own=False)
    count_pairs(keys.reshape(-1), global_rows, layout, counting)
    capacities = np.ceil(counting.totals.max(axis=1) * room).astype(np.int64).tolist()
    relay, size = np.full((ranks, ranks), -1, np.int32), 0
    for owner, asking in rng.integers(0, ranks, (4, 2)) if rng.integers(3) else ():
        if relay[owner, asking] < 0:
            relay[owner, asking] = size
            size += capacities[owner]
    expected = PairLists.create(
        HOST, layout, rows, capacities, own=bool(rng.integers(2)), listed=listed, relay_start=relay, relay_size=size
    )
    expected.relay.fill(layout.relay_pad)
    names = ("counts", "totals", "flag", "asked", "given", "frequent", "own", "sources", "slots", "replicated")
    poison = dict.fromkeys(names, 77)
    found = on_machine(machine, expected, **poison)
    there, moved = on_machine(machine, layout), machine.array(keys.reshape(-1))
    pair_lists_cuda.count_pairs(moved, global_rows, there, found)
    count_pairs(keys.reshape(-1), global_rows, layout, expected)
    np.testing.assert_array_equal(machine.host(found.totals), expected.totals)
    assert (machine.host(found.flag)[0] != 0) == (expected.flag[0] != 0) == (room < 1)
    pair_lists_cuda.list_pairs(moved, global_rows, there, found)
    list_pairs(keys.reshape(-1), global_rows, layout, expected)
    mine = len(sizes) * share_of(global_rows, ranks, layout.rank)
    for name in ("asked", "given", "local", "touched", "relay", "replicated"):
        np.testing.assert_array_equal(machine.host(getattr(found, name)), getattr(expected, name), err_msg=name)
    for name in ("frequent", "own", "sources", "slots"):
        np.testing.assert_array_equal(machine.host(getattr(found, name))[:mine], getattr(expected, name)[:mine])


@pytest.mark.parametrize("wide", [False, True])
def test_places_of_listed_rows(machine: Any, wide: bool, rng: np.random.Generator) -> None:
    sizes, rows = [1, 900, 64, 30_000], int(rng.choice([1, 300, 1025]))
    lists = [np.sort(rng.permutation(size)[: -(-size // 3)]) for size in sizes]
    specs = [TableSpec(name=f"t{size}", rows=size, dim=8) for size in sizes]
    features = [0, 1, 1, 2, 3]
    frequent = FrequentRows.create(specs, [lists[0], lists[1], None, lists[3]])
    keys = np.stack([sizes[table] * rng.random(rows) for table in features]).astype(rng.choice(["int32", "int64"]))
    keys[rng.random(keys.shape) < 0.1] = -1
    expected = np.zeros(keys.size, np.int64 if wide else np.int32)
    place_features(keys.reshape(-1), rows, frequent.on(HOST, features), expected)
    found = machine.array(np.full(keys.size + 7, 77, expected.dtype))
    there = on_machine(machine, frequent.on(HOST, features))
    frequent_rows_cuda.place_features(machine.array(keys.reshape(-1)), rows, there, found)
    np.testing.assert_array_equal(machine.host(found), [*expected, *[77] * 7])
    for feature, own in zip(features, keys, strict=True):
        kept, places = own[own >= 0], places_of_rows(own[own >= 0], None if feature == 2 else lists[feature])
        at = [lists[feature].tolist().index(k) if k in lists[feature] else k + len(lists[feature]) for k in kept]
        assert places.tolist() == (kept if feature == 2 else np.array(at)).tolist()
    mine = expected.reshape(keys.shape)
    assert mine[keys < 0].tolist() == [-1] * int((keys < 0).sum())


@pytest.mark.parametrize(("rows", "short"), [(1, 0), (700, 0), (5000, 3), (513, 1)])
def test_touched_rows(machine: Any, rows: int, short: int, rng: np.random.Generator) -> None:
    touched = (rng.random(rows) < 0.3).astype(np.uint8)
    touched[-1] = 1
    room = int(touched.sum()) - short + (0 if short else 7)
    expected, flag = TouchedRows.create(HOST, rows, np.zeros((room, 4), np.float32)), np.zeros(1, np.int32)
    found, there = on_machine(machine, expected, rows=77, total=77, counts=77), machine.array(flag)
    touched_rows_cuda.list_touched(machine.array(touched), found, there)
    list_touched(touched, expected, flag)
    assert machine.host(there)[0] == flag[0] == (short > 0)
    assert machine.host(found.total)[0] == touched.sum()
    np.testing.assert_array_equal(machine.host(found.rows), expected.rows)
    assert expected.rows[expected.rows >= 0].tolist() == np.flatnonzero(touched)[:room].tolist()


@pytest.mark.parametrize(("groups", "size", "short"), [(1, 5, 0), (3, 1100, 0), (2, 700, 9), (7, 64, 0), (1, 1, 1)])
def test_runs(machine: Any, groups: int, size: int, short: int, rng: np.random.Generator) -> None:
    pad = int(rng.choice([1, 40, 5000]))
    lists = rng.integers(0, pad + 1, (groups, size))
    lists[0] = np.where(rng.random(size) < 0.9, 0, lists[0])
    lists[-1, : size // 2] = pad
    most = max(len(np.unique(own[own != pad])) for own in lists)
    room = [max(0, most - short)] * groups
    nothing = np.empty(0, np.int64), np.empty(0, np.float32)
    sort = RowSort.create(HOST, groups * size, groups * (pad + 1), 8, weighted=False)
    slots, flag = np.zeros(groups * size, np.uint32), np.zeros(1, np.int32)
    expected = Runs.create(HOST, size, pad, room, slots, flag)
    sort_rows(expected.row_start, lists.reshape(-1).astype(np.int32), *nothing, size, groups * (pad + 1), sort)
    rows, named = sort.rows[sort.order], sort.named[sort.order]
    found = on_machine(machine, expected, slots=77, distinct=77, totals=77, counts=77)
    runs_cuda.number_runs(machine.array(rows), found)
    number_runs(rows, expected)
    assert machine.host(found.flag)[0] == expected.flag[0] == (most > room[0])
    for name in ("slots", "distinct", "totals"):
        np.testing.assert_array_equal(machine.host(getattr(found, name)), getattr(expected, name), err_msg=name)
    # Every listed row is the one that its slot stands for.
    kept = expected.distinct[slots] != pad
    np.testing.assert_array_equal(expected.distinct[slots][kept], lists.reshape(-1)[named][kept])
    # Sums by slot.
    gradients = rng.standard_normal((groups * size, 8)).astype(np.float32)
    sums, unit = np.zeros((len(expected.distinct), 8), np.float32), UnitUpdate.create(HOST)
    moved = on_machine(machine, replace(sort, rows=(slots, slots)))
    moved = replace(
        moved, **{name: tuple(machine.array(x) for x in getattr(moved, name)) for name in ("rows", "named")}
    )
    there = machine.array(sums)
    runs_cuda.sum_runs(machine.array(gradients), moved, there, on_machine(machine, unit))
    sum_runs(gradients, replace(sort, rows=(slots, slots)), sums, unit)
    real = expected.distinct != pad
    np.testing.assert_allclose(machine.host(there)[real], sums[real], rtol=1e-4, atol=1e-4)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    ("dim", "source", "target"),
    [(4, "float32", "float32"), (128, "float32", "float16"), (256, "float16", "float16"), (48, "bfloat16", "float32"),
     (128, "float32", "bfloat16")],
)  # fmt: skip
def test_rows_are_moved(machine: Any, dim: int, source: str, target: str, rng: np.random.Generator) -> None:
    count, numbers = int(rng.integers(1, 400)), rng.standard_normal((500, dim)) * np.exp(rng.uniform(-9, 9, (500, 1)))
    numbers[rng.integers(0, 500, 9), 0] = [np.inf, -np.inf, np.nan, 1e30, -1e30, 65520.0, -65520.0, 0.0, 1e-30]
    rows = encode(numbers.astype(np.float32), source)
    where = {"from": rng.integers(-1, 500, count), "to": rng.permutation(600)[:count], "both": None}
    where["to"][rng.random(count) < 0.2] = -1
    for form in ("from", "to", "both"):
        begin = None if form == "to" else where["from"].astype(np.int32)
        end = None if form == "from" else where["to"].astype(np.int32)
        scale = float(rng.choice([1.0, 4.0]))
        expected = encode(rng.standard_normal((600, dim)), target)
        found = machine.array(expected)
        lists = [None if places is None else machine.array(places) for places in (begin, end)]
        row_moves_cuda.move_rows(machine.array(rows), lists[0], found, lists[1], scale)
        move_rows(rows, begin, expected, end, scale)
        got = machine.host(found)
        if target == "bfloat16":  # which no number a rounded NaN becomes is left open
            got, expected = ((x.astype(np.uint32) << 16).view(np.float32) for x in (got, expected))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, "float32") for kind in KINDS), ("sgd", "bfloat16"), ("rowwise_adagrad", "bfloat16")]
)
def test_summed_gradients_update_rows(machine: Any, kind: str, dtype: str, rng: np.random.Generator) -> None:
    config = OptimizerConfig(kind=kind, eps=1e-3, l1=0.01, l2=0.02)  # type: ignore[arg-type]
    rows, dim, touched_rows = 700, int(rng.choice([8, 128, 48])), 500
    weight = encode(rng.standard_normal((rows, dim)), dtype)
    state = [rng.uniform(0.1, 1, (rows, 1 if item.per_row else dim)).astype(np.float32) for item in state_specs(config)]
    sums = rng.standard_normal((touched_rows, dim)).astype(np.float32) * 64
    touched = (rng.random(touched_rows) < 0.4).astype(np.uint8)
    origins = np.array([[5, 3, 2, 0, 0], [9, 0, 1, 0, 200], [7, 1, 3, 8, 200]], np.int64)
    numbers = constants(config, 0.05, 7).tolist()
    scalars = write_scalars(
        np.empty(SIZE, np.float32), lr=0, global_rows=1, valid_rows=1, step=3, seed=int(rng.integers(2**63)),
        sparse=numbers,
    )  # fmt: skip
    guard = write_guard(np.empty(SIZE, np.float32), 64.0)
    arrays = [machine.array(array) for array in (weight, *state)]
    rest = [machine.array(array) for array in (sums, touched, origins, scalars)]
    for place in (NOT_FINITE, OVERFLOW):
        closed = guard.copy()
        closed.view(np.int32)[place] = 1
        sorted_update_cuda.update_summed(kind, arrays[0], arrays[1:], *rest, machine.array(closed))
    np.testing.assert_array_equal(machine.host(arrays[0]), weight)
    sorted_update_cuda.update_summed(kind, arrays[0], arrays[1:], *rest, machine.array(guard))
    before = weight.copy()
    update_summed(kind, weight, state, sums, touched, origins, scalars, guard)
    got, (kept,) = machine.host(arrays[0]), np.nonzero(np.r_[touched, np.zeros(rows - touched_rows, np.uint8)] == 0)
    np.testing.assert_array_equal(got[kept], before[kept])
    if dtype == "bfloat16":
        # Sums whose last bit differs can round to the other neighbour; that they mostly do not shows the same draws.
        assert (got == weight).mean() > 0.9
        got, weight = ((x.astype(np.uint32) << 16).view(np.float32) for x in (got, weight))
        np.testing.assert_allclose(got, weight, rtol=2.0**-6, atol=1e-3)
    else:
        np.testing.assert_allclose(got, weight, rtol=1e-4, atol=1e-4)
    for found, array in zip(arrays[1:], state, strict=True):
        np.testing.assert_allclose(machine.host(found), array, rtol=1e-4, atol=1e-3)


def test_keys_below_zero_name_no_row(machine: Any, rng: np.random.Generator) -> None:
    rows, dim, batch = [40, 300], 16, 130
    keys = rng.integers(-1, [[40], [300]], (2, batch)).astype(np.int32)
    keys[:, rng.random(batch) < 0.3] = -1
    gradients = rng.standard_normal((batch, 3, dim)).astype(np.float32)
    gradients[:, 1:][(keys < 0).T] = np.nan
    weight = rng.standard_normal((sum(rows), dim)).astype(np.float32)
    start, place = np.array([0, 40]), np.array([1, 2])
    scalars = write_scalars(np.empty(SIZE, np.float32), lr=0, global_rows=1, valid_rows=1, step=1, seed=1, sparse=[0.1])
    rest = (gradients, scalars, write_guard(np.empty(SIZE, np.float32), 2.0))
    found = machine.array(weight)
    moved = [machine.array(array) for array in (start, keys.reshape(-1), place)]
    sparse_optim_cuda.sgd_one_hot(found, *moved, batch, *(machine.array(array) for array in rest))
    sgd_one_hot(weight, start, keys.reshape(-1), place, batch, *rest)
    np.testing.assert_allclose(machine.host(found), weight, rtol=1e-4, atol=1e-4)


def test_rows_of_odd_width_are_refused() -> None:
    rows = np.zeros((2, 6), np.float32)
    with pytest.raises(DeviceError, match="embedding_dim: 6"):
        row_moves_cuda.move_rows(rows, None, rows.copy(), None)
    with pytest.raises(DeviceError, match="embedding_dim: 6"):
        sorted_update_cuda.update_summed(
            "sgd", rows, [], rows.copy(), np.ones(2, np.uint8), np.zeros((1, 5), np.int64), rows, rows
        )


class KernelDevice(HostDevice):
    """The host's arrays and the emulated kernels."""

    def __init__(self, machine: Any) -> None:
        super().__init__(1, compiled=False)
        self._machine = machine

    def kernel(self, module: str, name: str) -> Any:
        """The launch of that name."""
        try:
            return getattr(importlib.import_module(f"{module}_cuda"), name, None)
        except ModuleNotFoundError:
            return None


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (0, 2),
        (4, 3),
        (7, 2),
        (8, 4),
        (9, 3),
        (10, 2),
        (11, 4),
        (12, 4),
        (18, 4),
        (20, 3),
        (25, 2),
        (28, 2),
        (30, 4),
        (31, 4),
    ],
)
def test_ranks_train_as_one(machine: Any, number: int, ranks: int) -> None:
    if not machine.emulated:
        pytest.skip("ranks that are threads exchange arrays of the host")
    import exchange_cases as xc
    import rank_threads

    case = xc.CASES[number] if number else replace(xc.CASES[0], dim=8)
    outcomes = rank_threads.run_ranks(ranks, lambda comm: xc.train(case, comm, KernelDevice(machine)))
    xc.check_all(case, outcomes)
