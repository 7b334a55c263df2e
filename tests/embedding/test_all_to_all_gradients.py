"""Rows from owners and gradients back: what arrives, sums per row, what is left to send, and the compiled parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placed_ranks import NODES, on_nodes

from dlrm.device import HostDevice
from embedding.all_to_all import Flat, Hierarchical
from embedding.comm_counting import CountingComm
from embedding.row_route import RowRoute, number_ids, reduce_then_exchange, sum_by_slot
from embedding.topology import Topology
from embedding.wire import Wire

REFERENCE, COMPILED = HostDevice(compiled=False), HostDevice(threads=2)


def draw(seed: int, rank: int, ranks: int, pool: int, dtype: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """ids (of ``pool`` possible ones), rows whose sums are exact, counts; some destinations get nothing."""
    rng = np.random.default_rng([seed, rank])
    counts = rng.integers(0, 7, ranks) * (rng.random(ranks) < 0.7)
    ids = rng.integers(-pool, pool, int(counts.sum())).astype(dtype)
    rows = rng.integers(-64, 64, (len(ids), 3)).astype(np.float32)
    return ids, rows, counts.tolist()


def sums(ids: np.ndarray, rows: np.ndarray) -> dict[int, list[float]]:
    return {int(key): rows[ids == key].sum(axis=0).tolist() for key in np.unique(ids)}


@given(NODES, st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 10**6]), st.sampled_from(["int32", "int64"]))
@settings(max_examples=60, deadline=None)
def test_every_owner_gets_every_gradient_once(node_of: list[int], seed: int, pool: int, dtype: str) -> None:
    ranks = len(node_of)
    everyone = [draw(seed, rank, ranks, pool, dtype) for rank in range(ranks)]

    def towards(sources: list[int], owner: int) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for source in sources:
            ids, rows, counts = everyone[source]
            begin = sum(counts[:owner])
            parts.append((ids[begin : begin + counts[owner]], rows[begin : begin + counts[owner]]))
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def work(comm: CountingComm, topology: Topology) -> None:
        ids, rows, counts = everyone[comm.rank]
        expected = sums(*towards(list(range(ranks)), comm.rank))
        for exchange in (Flat(comm), Hierarchical(comm, topology)):
            for device in (REFERENCE, COMPILED):
                found_ids, found_rows = reduce_then_exchange(exchange, ids, rows, counts, device=device)
                assert found_ids.dtype == dtype
                assert sums(found_ids, found_rows) == expected
        if topology.num_nodes == 1:
            return
        # From each node in turn: its distinct ids in order of occurrence.
        route = RowRoute(exchange, ids, counts, REFERENCE)
        pieces = [towards(topology.ranks_of(node), comm.rank)[0] for node in range(topology.num_nodes)]
        distinct = [list(dict.fromkeys(piece.tolist())) for piece in pieces]
        assert route.counts == [len(part) for part in distinct]
        assert route.ids.tolist() == [key for part in distinct for key in part]
        # The route serves several rows, of other widths and types too.
        twice = np.repeat(rows, 2, axis=1).astype(np.float64)
        out = np.full((len(route.ids) + 1, 6), np.nan)
        doubled = {key: np.repeat(row, 2).tolist() for key, row in expected.items()}
        route.start_send(twice, out)()
        assert sums(route.ids, out[: len(route.ids)]) == doubled
        assert np.isnan(out[len(route.ids) :]).all()

    on_nodes(node_of, work)


def test_sums_repeat_bit_for_bit_and_agree_with_flat(seed: int) -> None:
    def work(comm: CountingComm, topology: Topology) -> Any:
        rng = np.random.default_rng([seed, comm.rank])
        counts = [50] * comm.size
        ids, rows = rng.integers(0, 20, 200), rng.normal(size=(200, 8)).astype(np.float32)
        results = []
        for exchange, device in (
            (Hierarchical(comm, topology), REFERENCE),
            (Hierarchical(comm, topology), COMPILED),
            (Flat(comm), REFERENCE),
        ):
            found = reduce_then_exchange(exchange, ids, rows, counts, device=device)
            total = np.zeros((20, 8))
            np.add.at(total, found[0], found[1])
            results.append((*found, total))
        reference, compiled, flat = results
        np.testing.assert_array_equal(reference[0], compiled[0])
        np.testing.assert_array_equal(reference[1], compiled[1])
        # 10 of a row's terms (100 of a batch) are added in single precision inside a node.
        np.testing.assert_allclose(reference[2], flat[2], rtol=0, atol=3e-5)

    on_nodes([0, 1, 0, 1], work)


@given(NODES, st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 10**6]), st.sampled_from([(), (3,), (2, 2)]))
@settings(max_examples=60, deadline=None)
def test_everyone_gets_the_rows_that_it_asked_for(
    node_of: list[int], seed: int, pool: int, width: tuple[int, ...]
) -> None:
    """Rows are random bits that depend on the owner and the id: what comes is equal bit for bit."""
    ranks = len(node_of)
    tables = np.random.default_rng(seed).integers(0, 256, (ranks, 2 * pool if pool < 10 else 97, *width), np.uint8)

    def rows_of(owner: int, ids: np.ndarray) -> np.ndarray:
        return tables[owner][(ids + pool) % tables.shape[1]]

    def work(comm: CountingComm, topology: Topology) -> None:
        ids, _, counts = draw(seed, comm.rank, ranks, pool, "int64")
        expected = np.concatenate([rows_of(o, part) for o, part in enumerate(np.split(ids, np.cumsum(counts)[:-1]))])
        note = [comm.rank, 10 * comm.rank]
        exchange = Hierarchical(comm, topology)
        for way in (Flat(comm), exchange, exchange):
            route = RowRoute(way, ids, counts, COMPILED, note)
            np.testing.assert_array_equal(route.notes, [[rank, 10 * rank] for rank in range(ranks)])
            found = np.full((len(ids) + 1, *width), 7, np.uint8)
            route.start_fetch(rows_of(comm.rank, route.ids), found)()
            np.testing.assert_array_equal(found[:-1], expected)
            assert (found[-1] == 7).all()

    on_nodes(node_of, work)


@pytest.mark.parametrize("node_of", [[0, 0, 1, 1], [0, 0, 0, 1, 1]])
@pytest.mark.parametrize(("precision", "error"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_sums_are_rounded_once_on_the_way_between_nodes(
    node_of: list[int], precision: Any, error: float, seed: int
) -> None:
    def work(comm: CountingComm, topology: Topology) -> None:
        wire = Wire(precision, np.dtype(np.float32), COMPILED)
        ids = np.tile(np.arange(5), comm.size)
        rows = np.random.default_rng([seed, comm.rank]).uniform(0.5, 1, (len(ids), 4)).astype(np.float32)
        exact, rounded = (np.full((5 * topology.num_nodes, 4), np.nan, np.float32) for _ in range(2))
        route = RowRoute(Hierarchical(comm, topology), ids, [5] * comm.size, COMPILED)
        route.start_send(rows, exact)()
        route.start_send(rows, rounded, wire, 4.0)()
        np.testing.assert_allclose(rounded, exact, rtol=error)
        assert (rounded != exact).any()
        flat = RowRoute(Flat(comm), ids, [5] * comm.size, COMPILED)
        apart, apart_rounded = (np.full((5 * comm.size, 4), np.nan, np.float32) for _ in range(2))
        flat.start_send(rows, apart)()
        flat.start_send(rows, apart_rounded, wire, 4.0)()
        np.testing.assert_allclose(apart_rounded, apart, rtol=error)

    on_nodes(node_of, work)


def test_less_crosses_between_nodes(seed: int) -> None:
    """Both ranks of each node want the same 6 rows of each owner: half the rows and half the messages, both ways."""

    def work(comm: CountingComm, topology: Topology) -> list[list[int]]:
        ids = np.tile(np.random.default_rng(seed).permutation(6), comm.size)
        rows = np.ones((len(ids), 4), np.float32)
        sent = []
        for exchange in (Flat(comm), Hierarchical(comm, topology)):
            comm.traffic.clear()
            route = RowRoute(exchange, ids, [6] * comm.size, COMPILED, note=[1, 2])
            owned = np.ones((len(route.ids), 4), np.float32)
            numbers = [comm.traffic.messages_across, comm.traffic.bytes_across]
            for start, source, target in ((route.start_fetch, owned, rows), (route.start_send, rows, owned)):
                comm.traffic.clear()
                start(source, target)()
                numbers += [comm.traffic.messages_across, comm.traffic.bytes_across]
            sent.append(numbers)
        return sent

    flat, hierarchical = np.array(on_nodes([0, 0, 1, 1], work)).sum(axis=0).tolist()
    assert flat == [2 * 8, 8 * (6 + 3) * 8, *[8, 8 * 6 * 16] * 2]
    assert hierarchical == [2 * 4, 4 * (6 + 1 + 2 * 2) * 8, *[4, 4 * 6 * 16] * 2]


@pytest.mark.parametrize("keys", [0, 1, 7, 3000])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_compiled_numbering_equals_the_reference(keys: int, dtype: str, rng: np.random.Generator) -> None:
    limits = np.iinfo(dtype)
    for low, high in ((0, 5), (-3, 2000), (limits.min, limits.max)):
        ids = rng.integers(low, high, keys, endpoint=True).astype(dtype)
        found = []
        for device in (REFERENCE, COMPILED):
            slots, distinct = np.full(keys, -9, np.int64), np.zeros(keys, dtype)
            count = number_ids(ids, slots, distinct, device=device)
            np.testing.assert_array_equal(distinct[:count][slots], ids)
            assert len(set(distinct[:count].tolist())) == count
            found.append((count, slots.tolist()))
        assert found[0] == found[1]


@pytest.mark.parametrize("dim", [1, 16, 70])
def test_compiled_sums_equal_the_reference(dim: int, rng: np.random.Generator) -> None:
    slots = rng.integers(0, 30, 200)
    rows = rng.normal(size=(205, dim)).astype(np.float32)  # more than there are slots
    found = []
    for device in (REFERENCE, COMPILED):
        out = np.full((30, dim), np.nan, np.float32)
        sum_by_slot(rows, slots, out, device=device)
        found.append(out)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], [rows[:200][slots == slot].sum(axis=0) for slot in range(30)], atol=1e-5)
