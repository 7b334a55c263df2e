"""The sparse update of a captured step follows the trainer's own update of rows over several steps."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.scalars import SIZE, write_guard, write_scalars
from embedding.captured_update import CapturedUpdate
from embedding.plan import TableSpec
from embedding.sparse_optim import KINDS, UpdateScratch, constants, update_rows
from embedding.table import Part, ShardStore, create_shards

NO_OFFSETS, NO_WEIGHTS = np.empty(0, np.int64), np.empty(0, np.float32)
HOST = HostDevice(1, compiled=False)


class Device(HostDevice):
    """What ``CapturedUpdate`` asks of a device, on the machine of these tests."""

    def __init__(self, machine: Any) -> None:
        super().__init__(1, compiled=False)
        self.machine = machine

    def kernel(self, module: str, name: str) -> Any:
        """The launch of that name."""
        return getattr(importlib.import_module(f"{module}_cuda"), name)

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Poisoned."""
        poison = np.zeros(shape, dtype)
        poison.view(np.uint8)[...] = 0xFF
        return self.machine.array(poison)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        """Zeros."""
        return self.machine.array(np.zeros(shape, dtype))

    @property
    def xp(self) -> Any:  # type: ignore[override]
        """``asarray`` alone."""
        return self

    def asarray(self, values: Any, dtype: Any = None) -> Any:
        """A copy on the machine."""
        return self.machine.array(np.asarray(values, dtype))


def moved(store: ShardStore, machine: Any) -> ShardStore:
    state = {name: machine.array(array) for name, array in store.state.items()}
    return ShardStore(store.shards, machine.array(store.weight), state, machine.array(store.row_start))


CASES = [(kind, bags, True) for kind in KINDS for bags in ("one", "bags")]


@pytest.mark.parametrize(
    ("kind", "bags", "deterministic"), [*CASES, ("sgd", "one", False), ("adagrad", "weighted", False)]
)
def test_steps_follow_the_trainers_update(
    machine: Any, kind: str, bags: str, deterministic: bool, rng: np.random.Generator
) -> None:
    sizes, dim, num_rows = [5, 1, 90], 16, 40
    optimizer = OptimizerConfig(kind=kind, eps=1e-3, initial_accumulator=0.1)  # type: ignore[arg-type]
    parts = [Part.whole(TableSpec(name=f"c{i}", rows=size, dim=dim)) for i, size in enumerate(sizes)]
    host = create_shards(parts, dim, device=HOST, optimizer=optimizer, dtype=np.float32, seed=int(rng.integers(2**32)))
    store, device = moved(host, machine), Device(machine)
    mean, place = np.array([True, False, True]), np.array([2, 0, 1])
    captured = CapturedUpdate(
        optimizer, store, mean, place, 5 * 3 * num_rows, one_hot=bags == "one", weighted=bags == "weighted",
        deterministic=deterministic, device=device,
    )  # fmt: skip
    assert captured.atomic is (kind == "sgd" and bags == "one" and not deterministic)
    captured.track_touched()
    scratch = UpdateScratch.create(sum(sizes))
    scratch.track_touched()
    guard = machine.array(write_guard(np.empty(SIZE, np.float32), 128.0))
    for step in range(1, 4):
        lengths = np.ones(3 * num_rows, np.int64) if bags == "one" else rng.integers(0, 6, 3 * num_rows)
        offsets = NO_OFFSETS if bags == "one" else np.concatenate([[0], np.cumsum(lengths)])
        keys = rng.integers(0, np.repeat(np.repeat(sizes, num_rows), lengths)).astype(np.int32)
        weights = rng.uniform(-1, 1, len(keys)).astype(np.float32) if bags == "weighted" else NO_WEIGHTS
        gradients = rng.standard_normal((num_rows, 3, dim)).astype(np.float32)
        update_rows(
            optimizer, host.weight, host.state, host.row_start, keys, offsets, weights, mean, place, num_rows,
            gradients, lr=0.05, step=step, scratch=scratch, device=HOST,
        )  # fmt: skip
        named = [machine.array(array) for array in (keys, offsets, weights)]
        numbers = constants(optimizer, 0.05, step).tolist()
        scalars = write_scalars(
            np.empty(SIZE, np.float32), lr=0, global_rows=1, valid_rows=1, step=step, seed=1, sparse=numbers
        )
        captured.prepare(*named, num_rows)
        captured.update(*named, num_rows, machine.array(gradients * 128), machine.array(scalars), guard)
    tolerance = 1e-3 if kind == "ftrl" else 1e-4
    np.testing.assert_allclose(machine.host(store.weight), host.weight, rtol=tolerance, atol=tolerance)
    for name, array in store.state.items():
        np.testing.assert_allclose(machine.host(array), host.state[name], rtol=tolerance, atol=10 * tolerance)
    np.testing.assert_array_equal(machine.host(captured.touched), scratch.touched)


def test_the_references_run_where_there_are_no_kernels(rng: np.random.Generator) -> None:
    optimizer = OptimizerConfig(kind="adagrad")
    parts = [Part.whole(TableSpec(name="c", rows=9, dim=8))]
    first, second = (
        create_shards(parts, 8, device=HOST, optimizer=optimizer, dtype=np.float32, seed=3) for _ in range(2)
    )
    keys, gradients = rng.integers(0, 9, 30).astype(np.int32), rng.standard_normal((30, 1, 8)).astype(np.float32)
    captured = CapturedUpdate(
        optimizer, first, np.array([False]), np.array([0]), 30, one_hot=True, weighted=False, deterministic=True,
        device=HOST,
    )  # fmt: skip
    captured.prepare(keys, NO_OFFSETS, NO_WEIGHTS, 30)
    scalars = write_scalars(
        np.empty(SIZE, np.float32), lr=0, global_rows=1, valid_rows=30, step=1, seed=1,
        sparse=constants(optimizer, 0.1, 1).tolist(),
    )  # fmt: skip
    captured.update(keys, NO_OFFSETS, NO_WEIGHTS, 30, gradients, scalars, write_guard(np.empty(SIZE, np.float32), 1.0))
    update_rows(
        optimizer, second.weight, second.state, second.row_start, keys, NO_OFFSETS, NO_WEIGHTS, np.array([False]),
        np.array([0]), 30, gradients, lr=0.1, step=1, scratch=UpdateScratch.create(9), device=HOST,
    )  # fmt: skip
    np.testing.assert_allclose(first.weight, second.weight, rtol=1e-6)
