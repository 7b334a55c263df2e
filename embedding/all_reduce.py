"""Sums over all ranks, in one step or in two: inside the nodes first, so that little crosses between them.

A ring over all ranks sends ``2 (W - 1) / W`` of the buffer over every hop between nodes. In two levels, each rank of a
node sums a part of the buffer over its node, sums that part with the same ranks of the other nodes, and hands it to its
node: ``2 (N - 1) / N`` of the buffer leave a node, whatever the number of its ranks. All together the ranks send as
much either way.

The order of every sum is fixed (by local rank, then node), and each number is summed on one rank or by the same sum on
several: all ranks get the same bits, in every run.

Shapes: W ranks, N nodes, L ranks of each, S numbers of a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from dlrm.device import Array
from embedding.all_to_all import BufferPool
from embedding.comm import Comm, Event
from embedding.topology import Topology


class AllReduce(Protocol):
    """What sums gradients."""

    @property
    def multiple(self) -> int:
        """Buffers hold a multiple of so many numbers."""

    def start(self, buffer: Array) -> Event:
        """Sum ``buffer`` [S] over all ranks, in place; it belongs to the sum until ``wait()`` returns."""


class OneLevel:
    """The carrier's own all-reduce."""

    multiple = 1

    def __init__(self, comm: Comm) -> None:
        """Over the ranks of ``comm``."""
        self._comm = comm

    def start(self, buffer: Array) -> Event:
        """See ``AllReduce.start``."""
        return self._comm.all_reduce(buffer)


class TwoLevel:
    """Inside the nodes, between them, inside again; the first is done when ``start`` returns."""

    def __init__(self, topology: Topology) -> None:
        """Over all ranks of ``topology``, whose nodes are of one size."""
        self._inside, self._across = topology.inside, topology.across
        self.multiple = part_multiple(topology.node_of)
        self._pool = BufferPool()

    def start(self, buffer: Array) -> Event:
        """See ``AllReduce.start``."""
        local, nodes = self._inside.size, self._across.size
        parts = self._pool.take(len(buffer), buffer)
        whole = parts[: len(buffer)]
        self._inside.all_to_all(buffer, whole).wait()
        own = add_parts(whole, local)
        others = self._pool.take(len(own) * nodes, buffer)
        if nodes == 2:  # one exchange instead of two, of as many bytes
            crossing = others[: len(own) * nodes]
            event = self._across.all_gather(own, crossing)
        else:
            crossing = others[: len(own)]
            event = self._across.all_to_all(own, crossing)

        def finish() -> None:
            event.wait()
            summed = add_parts(crossing, nodes)
            if nodes != 2:
                self._across.all_gather(summed, own).wait()
                summed = own
            self._inside.all_gather(summed, buffer).wait()
            self._pool.give(parts)
            self._pool.give(others)

        return _Finishing(finish)


class _Finishing:
    """An event whose end takes work."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def wait(self) -> None:
        self._finish()


def add_parts(parts: Array, count: int) -> Array:
    """The first of ``count`` equal parts, to which the others have been added in their order."""
    rows = parts.reshape(count, -1)
    for row in rows[1:]:
        np.add(rows[0], row, out=rows[0])
    first: Array = rows[0]
    return first


def part_multiple(node_of: Sequence[int]) -> int:
    """What the length of a buffer has to be a multiple of; 1: the sum goes in one step.

    Args:
        node_of: [W] node of every rank.
    """
    sizes = np.bincount(np.asarray(node_of))
    local, nodes = int(sizes.max()), len(sizes)
    if nodes == 1 or local == 1 or local != int(sizes.min()):
        return 1
    return local if nodes == 2 else local * nodes


def all_reduce_of(comm: Comm, topology: Topology | None) -> AllReduce:
    """Two levels where nodes are of one size and have several ranks, else one.

    Args:
        comm: all ranks.
        topology: their nodes, found from ``comm``; ``None``: unknown.
    """
    if topology is None or part_multiple(topology.node_of) == 1:
        return OneLevel(comm)
    return TwoLevel(topology)
