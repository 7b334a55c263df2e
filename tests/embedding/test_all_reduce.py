"""Sums over ranks in one step and in two: the same numbers everywhere, and little between nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rank_threads import run_ranks

from embedding.all_reduce import OneLevel, TwoLevel, all_reduce_of, part_multiple
from embedding.comm_counting import CountingComm
from embedding.exchange_cost import Shape
from embedding.placement import node_of_ranks
from embedding.topology import discover


@pytest.mark.parametrize(("ranks", "nodes"), [(4, 2), (6, 2), (6, 3), (8, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_levels_sum_over_all_ranks(rng: np.random.Generator, ranks: int, nodes: int, dtype: str) -> None:
    multiple = part_multiple(node_of_ranks(ranks, nodes))
    size = multiple * int(rng.integers(1, 40))
    numbers = rng.standard_normal((3, ranks, size)).astype(dtype)

    def work(comm: Any) -> tuple[list[np.ndarray], int, int]:
        counting = CountingComm(comm, node_of_ranks(ranks, nodes))
        reduce = all_reduce_of(counting, discover(counting, nodes=nodes))
        assert isinstance(reduce, TwoLevel)
        counting.traffic.clear()
        results = []
        for batch in range(3):  # again with room that was used before, and a part of it only
            buffer = numbers[batch, comm.rank, : size if batch != 1 else multiple].copy()
            reduce.start(buffer).wait()
            results.append(buffer)
        return results, counting.traffic.bytes_inside, counting.traffic.bytes_across

    results = run_ranks(ranks, work)
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    for batch in range(3):
        expected = numbers[batch].sum(axis=0)[: len(results[0][0][batch])]
        for found, _, _ in results:
            np.testing.assert_allclose(found[batch], expected, rtol=0, atol=ranks * tolerance)
            np.testing.assert_array_equal(found[batch], results[0][0][batch])  # replicas stay equal bit for bit
    buffer_bytes = (2 * size + multiple) * np.dtype(dtype).itemsize
    inside, across = Shape(ranks, nodes).reduce_bytes(buffer_bytes)
    assert sum(result[1] for result in results) == pytest.approx(inside)
    assert sum(result[2] for result in results) == pytest.approx(across)
    assert across == pytest.approx(2 * (nodes - 1) * buffer_bytes)


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (3, 1), (3, 3), (5, 2)])
def test_one_node_lone_ranks_and_uneven_nodes_sum_in_one_step(ranks: int, nodes: int) -> None:
    def work(comm: Any) -> tuple[bool, float]:
        reduce = all_reduce_of(comm, discover(comm, nodes=nodes))
        buffer = np.full(3, comm.rank + 1.0)
        reduce.start(buffer).wait()
        return isinstance(reduce, OneLevel), float(buffer[0])

    assert part_multiple(node_of_ranks(ranks, nodes)) == 1
    assert run_ranks(ranks, work) == [(True, ranks * (ranks + 1) / 2)] * ranks
