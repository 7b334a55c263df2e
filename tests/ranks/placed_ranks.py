"""Threaded ranks on nodes of any sizes and in any order, with a count of what they send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rank_threads
from hypothesis import strategies as st

from embedding.comm_counting import CountingComm
from embedding.topology import Topology, discover

NODES = st.lists(st.integers(1, 3), min_size=1, max_size=3).flatmap(
    lambda sizes: st.permutations([node for node, size in enumerate(sizes) for _ in range(size)])
)

"""The node of every rank: up to three nodes of one to three ranks, shuffled."""


class PlacedComm:
    """A carrier whose ``split_node`` follows a list of nodes."""

    def __init__(self, comm: Any, node_of: list[int]) -> None:
        self._comm, self._node_of = comm, node_of
        self.rank, self.size = comm.rank, comm.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def split_node(self) -> Any:
        return self._comm.split(self._node_of[self.rank], self.rank)


def on_nodes(node_of: list[int], work: Callable[[Any, Topology], Any]) -> list[Any]:
    """Results by rank of ``work(counting comm, topology)`` where rank r is on ``node_of[r]``."""

    def run(comm: Any) -> Any:
        counting = CountingComm(PlacedComm(comm, node_of), node_of)
        topology = discover(counting)
        counting.traffic.clear()
        return work(counting, topology)

    return rank_threads.run_ranks(len(node_of), run)
