"""Hierarchical all-to-all against flat: nodes of any sizes, ranks in any order, empty parts, two exchanges at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placed_ranks import NODES, on_nodes

from dlrm.errors import CommError
from embedding.all_to_all import Flat, Hierarchical
from embedding.comm_counting import CountingComm
from embedding.topology import Topology


def chunks(rng: np.random.Generator, ranks: int, most: int) -> np.ndarray:
    """[W, W] lengths, of which many are 0."""
    return rng.integers(0, most + 1, (ranks, ranks)) * (rng.random((ranks, ranks)) < rng.choice([0.0, 0.5, 1.0]))


@given(NODES, st.integers(0, 2**32 - 1), st.sampled_from([(), (3,), (2, 2)]), st.sampled_from(["float32", "int64"]))
@settings(max_examples=80, deadline=None)
def test_hierarchical_brings_what_flat_brings(
    node_of: list[int], seed: int, width: tuple[int, ...], dtype: str
) -> None:
    def work(comm: Any, topology: Topology) -> None:
        numbers = np.random.default_rng([seed, comm.rank])
        shared = np.random.default_rng(seed)  # all ranks draw the same lengths
        flat, hierarchical = Flat(comm), Hierarchical(comm, topology)
        for _ in range(2):  # the second time in the buffers of the first
            under_way = []
            for _ in range(2):
                counts = chunks(shared, comm.size, 5)
                going, coming = counts[comm.rank].tolist(), counts[:, comm.rank].tolist()
                send = numbers.integers(-(2**20), 2**20, (sum(going) + 1, *width)).astype(dtype)
                expected, found = (np.full((sum(coming) + 2, *width), -5, dtype) for _ in range(2))
                flat.all_to_all_v(send, going, expected, coming).wait()
                event = hierarchical.all_to_all_v(send, going, found, coming)
                under_way.append((event, send, send.copy(), found, expected))
            for event, send, before, found, expected in reversed(under_way):
                event.wait()
                event.wait()  # no second effect
                np.testing.assert_array_equal(send, before)
                np.testing.assert_array_equal(found, expected)

    on_nodes(node_of, work)


def messages_across(node_of: list[int], kind: type[Flat | Hierarchical]) -> tuple[int, int]:
    """Messages and bytes between nodes of one exchange in which everyone sends everyone three rows of eight bytes."""

    def work(comm: CountingComm, topology: Topology) -> tuple[int, int]:
        exchange = Flat(comm) if kind is Flat else Hierarchical(comm, topology)
        counts = [3] * comm.size
        send, recv = np.zeros((3 * comm.size, 2), np.float32), np.empty((3 * comm.size, 2), np.float32)
        comm.traffic.clear()
        exchange.all_to_all_v(send, counts, recv, counts).wait()
        return comm.traffic.messages_across, comm.traffic.bytes_across

    messages, size = zip(*on_nodes(node_of, work), strict=True)
    return sum(messages), sum(size)


@pytest.mark.parametrize(
    ("node_of", "flat", "hierarchical"),
    [
        ([0, 0, 1, 1], 8, 4),
        ([0, 0, 0, 0, 1, 1, 1, 1], 32, 8),
        ([0, 0, 1, 1, 2, 2, 3, 3], 48, 24),
        ([0, 1, 0, 1, 0, 1], 18, 6),
        ([0, 0, 0, 1, 1], 12, 4),
        ([0, 0, 0, 1], 6, 2),
        ([0, 1], 2, 2),
        ([0, 0, 0], 0, 0),
    ],
)
def test_messages_between_nodes(node_of: list[int], flat: int, hierarchical: int) -> None:
    """Products of the nodes' sizes, against lanes times pairs of nodes: at most half wherever nodes have two ranks."""
    pairs = sum(a != b for a in node_of for b in node_of)
    assert messages_across(node_of, Flat) == (flat, pairs * 24)
    assert messages_across(node_of, Hierarchical) == (hierarchical, pairs * 24)  # the same bytes


def test_counts_beyond_a_buffer_and_a_foreign_topology_are_refused() -> None:
    def work(comm: CountingComm, topology: Topology) -> None:
        short, counts = np.zeros(3, np.int32), [1] * comm.size
        with pytest.raises(CommError, match="add up to 4, but the buffer holds 3"):
            Hierarchical(comm, topology).all_to_all_v(short, counts, np.zeros(4, np.int32), counts)
        with pytest.raises(CommError, match="4 ranks, not 2"):
            Hierarchical(topology.inside, topology)

    on_nodes([0, 0, 1, 1], work)


@given(NODES)
@settings(max_examples=20, deadline=None)
def test_topology_names_the_place_of_every_rank(node_of: list[int]) -> None:
    names = list(dict.fromkeys(node_of))  # nodes are numbered by their lowest rank
    expected = [names.index(node) for node in node_of]
    places = [node_of[:rank].count(node) for rank, node in enumerate(node_of)]

    def work(comm: CountingComm, topology: Topology) -> Topology:
        return topology

    for rank, found in enumerate(on_nodes(node_of, work)):
        assert found.node_of == tuple(expected)
        assert found.local_of == tuple(places)
        assert (found.node, found.local_rank) == (expected[rank], places[rank])
        assert found.ranks_of(found.node)[found.local_rank] == rank
        peers = [node for node in range(found.num_nodes) if len(found.ranks_of(node)) > places[rank]]
        assert (found.across.size, found.across.rank) == (len(peers), peers.index(expected[rank]))
