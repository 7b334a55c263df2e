"""Who holds which rows of a batch, and which ranks share a node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embedding.comm import Comm


def share_of(rows: int, ranks: int, rank: int) -> int:
    """Rows that ``rank`` takes of a batch of ``rows``: the first ``rows % ranks`` ranks take one more.

    A rank may take none.
    """
    return rows // ranks + (rank < rows % ranks)


def start_of(rows: int, ranks: int, rank: int) -> int:
    """First row of ``rank``'s contiguous share; ``start_of(rows, ranks, ranks)`` is ``rows``."""
    return rank * (rows // ranks) + min(rank, rows % ranks)


@dataclass(frozen=True, slots=True)
class Topology:
    """A rank's place, and its two sub-communicators.

    Attributes:
        node: number of this rank's node; nodes are numbered by their lowest rank.
        num_nodes: nodes in all.
        local_rank: this rank's number in its node.
        local_size: ranks in its node.
        inside: the ranks of this node, by local rank.
        across: the ranks with this local rank, one per node that has so many, by node.
        node_of: [W] node of every rank.
        local_of: [W] local rank of every rank.
    """

    node: int
    num_nodes: int
    local_rank: int
    local_size: int
    inside: Comm
    across: Comm
    node_of: tuple[int, ...]
    local_of: tuple[int, ...]

    def ranks_of(self, node: int) -> list[int]:
        """The ranks of a node, by local rank."""
        return [rank for rank, place in enumerate(self.node_of) if place == node]


def discover(comm: Comm, nodes: int | None = None) -> Topology:
    """Find the nodes; every rank of ``comm`` calls it.

    Args:
        comm: the ranks to place.
        nodes: cut the ranks into so many nodes of contiguous ranks instead of looking at the machines (for
            trying several nodes on one machine).
    """
    inside = comm.split_node() if nodes is None else comm.split(comm.rank * nodes // comm.size, comm.rank)
    lowest = np.array([comm.rank], np.int64)
    inside.broadcast(lowest).wait()
    everyones = np.empty(comm.size, np.int64)
    comm.all_gather(lowest, everyones).wait()
    node_of = np.searchsorted(np.unique(everyones), everyones)
    node = int(node_of[comm.rank])
    return Topology(
        node=node,
        num_nodes=int(node_of.max()) + 1,
        local_rank=inside.rank,
        local_size=inside.size,
        inside=inside,
        across=comm.split(inside.rank, node),
        node_of=tuple(node_of.tolist()),
        # Local ranks follow the ranks' order.
        local_of=tuple(int((node_of[:rank] == node_of[rank]).sum()) for rank in range(comm.size)),
    )
