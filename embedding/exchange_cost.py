"""How long an exchange takes among ranks on nodes, by rates of links. ``docs/plan.md`` derives the formulas.

Shapes: W ranks, N nodes, L = W / N ranks of a node.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from embedding.all_reduce import part_multiple
from embedding.links import Link, LinkRates
from embedding.placement import AllToAll, node_of_ranks

Floats = NDArray[np.float64]


class Shape:
    """Ranks on nodes, and what an exchange among them takes.

    Loads are [W]: bytes between each owner and every one asker.
    """

    def __init__(self, ranks: int, nodes: int) -> None:
        """Place contiguous ranks on nodes."""
        self.ranks, self.nodes = ranks, nodes
        self.node_of = np.array(node_of_ranks(ranks, nodes))
        self.size_of = np.bincount(self.node_of, minlength=nodes)
        self._mates = self.size_of[self.node_of] - 1
        self._local = int(self.size_of.max())

    def inside_bytes(self, load: Floats) -> float:
        """Bytes between ranks of the same node."""
        return float(load @ self._mates)

    def across_bytes(self, load: Floats) -> float:
        """Bytes between ranks of different nodes."""
        return float(load @ (self.ranks - 1 - self._mates))

    def lane_bytes(self, load: Floats, all_to_all: AllToAll) -> float:
        """Bytes that go through a lane on their way to another node, and so cross the inside once more."""
        lanes = int(self.size_of.min())
        return self.across_bytes(load) * (lanes - 1) / lanes if all_to_all == "hierarchical" else 0.0

    def messages(self, all_to_all: AllToAll) -> int:
        """Messages between nodes in one exchange."""
        if all_to_all == "hierarchical":
            return int(self.size_of.min()) * self.nodes * (self.nodes - 1)
        return int(self.ranks**2 - (self.size_of**2).sum())

    def seconds(
        self, load: Floats, links: LinkRates, all_to_all: AllToAll, *, count: int = 1, summed: Floats | None = None
    ) -> float:
        """Time of an exchange: start-up of its messages, then the slowest rank's bytes over the slower link.

        Args:
            load: bytes between each owner and each asker.
            links: rates.
            all_to_all: in one step or in two.
            count: all-to-alls that carry them, one after the other.
            summed: [W] bytes between each owner and every other node, where rows are summed before they cross.
        """
        # An owner sends (or receives) for all others; an asker receives (or sends) from all others.
        per_node = np.bincount(self.node_of, load, self.nodes)[self.node_of]
        inside = np.maximum(load * self._mates, per_node - load)
        across = np.maximum(load * (self.ranks - 1 - self._mates), load.sum() - per_node)
        if links.across_shared:
            across = (np.bincount(self.node_of, across, self.nodes) / self.size_of)[self.node_of]
        mates, others = self._local - 1, self.ranks - self._local
        if self.nodes == 1:
            return count * mates * links.inside.latency_s + float(inside.max()) / links.inside.bytes_per_s
        crossing = across
        if summed is not None:
            crossing = np.maximum(summed, summed.mean()) * (self.nodes - 1)
        across_s = crossing / links.across.bytes_per_s
        if all_to_all == "hierarchical":
            # Of what crosses, all but this lane's own part first goes to a lane inside the node.
            lanes = max(1, int(self.size_of.min()))
            inside_s = (inside + across * (lanes - 1) / lanes) / links.inside.bytes_per_s
            start = mates * links.inside.latency_s + (self.nodes - 1) * links.across.latency_s
            return count * start + float((inside_s + across_s).max())
        start = mates * links.inside.latency_s + others * links.across.latency_s
        return count * start + float(np.maximum(inside / links.inside.bytes_per_s, across_s).max())

    def reduce_bytes(self, size: float) -> tuple[float, float]:
        """Bytes inside and between nodes of an all-reduce: every rank sends 2 (W - 1) / W of the buffer.

        In two levels (``all_reduce.py``) 2 (N - 1) / N of it leave each node; in one, a ring crosses once a node.
        """
        whole = 2 * (self.ranks - 1) * size
        if part_multiple(self.node_of.tolist()) > 1:
            across = 2 * (self.nodes - 1) * size
        else:
            across = whole / self.ranks * self.nodes if self.nodes > 1 else 0.0
        return whole - across, across

    def reduce_seconds(self, size: float, links: LinkRates, *, count: int = 1) -> float:
        """Time of all-reduces: inside the nodes, and between them each rank its part of the buffer.

        Args:
            size: bytes of all buffers.
            links: rates.
            count: all-reduces, one after the other.
        """
        local, nodes = self._local, self.nodes
        inside = _reduce_seconds(size, local, links.inside_reduce, count)
        return inside + _reduce_seconds(size / local, nodes, links.across_reduce, count)

    def reduce_start_bytes(self, links: LinkRates) -> float:
        """What an all-reduce could send in the time that it takes to start; 0 for a single rank."""
        return self.reduced_in(self.reduce_seconds(0.0, links), links)

    def reduced_in(self, seconds: float, links: LinkRates) -> float:
        """What an all-reduce that has started could send in some time; 0 for a single rank."""
        many = float(2**30)
        moving = self.reduce_seconds(many, links) - self.reduce_seconds(0.0, links)
        return seconds / moving * many if moving > 0 else 0.0


def _reduce_seconds(size: float, ranks: int, link: Link, count: int) -> float:
    if ranks == 1:
        return 0.0
    start = 2 * count * math.ceil(math.log2(ranks)) * link.latency_s
    return start + 2 * (ranks - 1) / ranks * size / link.bytes_per_s
