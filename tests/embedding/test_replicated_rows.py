"""Replicated rows: which way their gradients are summed, and that both ways train alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import rank_threads

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from embedding.buffers import BatchBuffers
from embedding.placement import TableSpec
from embedding.reduce_way import ReduceWay, dense_bytes, ring_bytes, touched_bytes
from embedding.replicated import ReplicatedRows
from embedding.sparse_optim import KINDS
from embedding.table import Part

TOUCHED = ReduceWay()
DENSE = ReduceWay(1.0, 1, 1e9)


def build(comm: Any, kind: str = "sgd", rows: tuple[int, ...] = (60, 40), dim: int = 4, way: ReduceWay = TOUCHED):
    specs = [TableSpec(name=f"t{i}", rows=count + 5, dim=dim) for i, count in enumerate(rows)]
    return ReplicatedRows(
        [Part(spec, range(count), range(dim), True) for spec, count in zip(specs, rows, strict=True)],
        dim, comm=comm, device=HostDevice(2),
        optimizer=OptimizerConfig(kind=kind), dtype=np.dtype("float64"), seed=3, way=way,  # type: ignore[arg-type]
    )  # fmt: skip


def step(rows: ReplicatedRows, slots: np.ndarray, gradients: np.ndarray, global_rows: int, number: int = 1) -> dict:
    """One batch in which slot i gets gradient i; returns the bytes."""
    buffers = BatchBuffers(1, None, None, global_rows=global_rows)
    touched = rows.start_touched(buffers, slots)()
    sums, compact = rows.sums(touched)
    sums.fill(0)
    own = slots < rows.rows
    np.add.at(sums, compact[slots[own]] if len(compact) else slots[own], gradients[own])
    event = rows.start_reduce(buffers, slots, touched)
    if event is not None:
        event.wait()
    rows.update(touched, 0.1, number)
    return {"touched": touched, **buffers.sent}


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_make_the_same_step(kind: str, rng: np.random.Generator) -> None:
    """The way is forced by what a collective is said to cost; a row of gradient 0 counts as touched."""
    draws = [[rng.integers(0, 120, 15).astype(np.int32) for _ in range(3)] for _ in range(4)]
    gradients = [[rng.standard_normal((15, 4)) for _ in range(3)] for _ in range(4)]
    for each in gradients:
        each[0][0] = 0

    def work(comm: Any) -> tuple:
        ways = []
        for way in (TOUCHED, DENSE):
            rows = build(comm, kind, way=way)
            start = rows.weight.copy()
            sent = []
            for number in range(4):
                args = draws[number][comm.rank], gradients[number][comm.rank]
                sent.append(step(rows, *args, 45, number + 1))
            ways.append((sent, {"weight": rows.weight, **rows._store.state}, start))
        return ways

    results = rank_threads.run_ranks(3, work)
    for compact, dense in results:
        assert all(sent["touched"] is not None for sent in compact[0])
        assert all(sent["touched"] is None for sent in dense[0])
        for number in range(4):
            touched = np.unique(np.concatenate(draws[number]))
            touched = touched[touched < 100]
            np.testing.assert_array_equal(compact[0][number]["touched"], touched)
            assert compact[0][number]["all_reduce"] == ring_bytes(100, 3) + ring_bytes(len(touched) * 32, 3)
            assert dense[0][number]["all_reduce"] == ring_bytes(100 * 5 * 8, 3)
        never = np.setdiff1d(np.arange(100), np.concatenate([np.concatenate(each) for each in draws]))
        for name, array in compact[1].items():
            np.testing.assert_array_equal(array, dense[1][name], err_msg=name)
            np.testing.assert_array_equal(array, results[0][0][1][name], err_msg=f"replica of {name}")
        assert len(never)
        np.testing.assert_array_equal(compact[1]["weight"][never], compact[2][never])
        assert (compact[1]["weight"] != compact[2]).any()


def test_the_size_of_a_batch_decides_the_way() -> None:
    """Of 1,000 rows 400 are touched by 4,000: both ways take as long where 848 are, that is from 8,480 on."""

    def work(comm: Any) -> list[bool]:
        rows = build(comm, rows=(1000,), dim=8, way=ReduceWay(400.0, 4000, 1000 * 9 * 8 - 1000 - 848 * 64))
        slots = np.arange(3, dtype=np.int32)
        sizes = (8480, 100, 4000, 8479, 10_000)
        return [step(rows, slots, np.ones((3, 8)), size, 1 + n)["touched"] is None for n, size in enumerate(sizes)]

    for ways in rank_threads.run_ranks(2, work):
        assert ways == [True, False, False, False, True]


def test_bytes_of_both_ways() -> None:
    assert touched_bytes(1000, 10, 16, 4) == 1000 + 10 * 64
    assert dense_bytes(1000, 16, 4) == 1000 * 17 * 4
    assert ring_bytes(100, 4) == 150
    assert ring_bytes(100, 1) == 0


def test_no_replicated_rows_need_no_reduction() -> None:
    def work(comm: Any) -> None:
        rows = build(comm, rows=(0,))
        sent = step(rows, np.arange(3, dtype=np.int32), np.ones((3, 4)), 10)
        assert sent["all_reduce"] == 0
        assert rows.shards() == []

    rank_threads.run_ranks(2, work)
