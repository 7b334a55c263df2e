"""A ``Comm`` that counts what leaves this rank, inside its node and across nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from embedding.comm import Comm, Event, Reduction


@dataclass(slots=True)
class Traffic:
    """What one rank sent; empty parts of an exchange are no messages.

    Attributes:
        messages_inside: messages to ranks of this node.
        messages_across: messages to ranks of other nodes.
        bytes_inside: bytes to ranks of this node.
        bytes_across: bytes to ranks of other nodes.
    """

    messages_inside: int = 0
    messages_across: int = 0
    bytes_inside: int = 0
    bytes_across: int = 0

    def clear(self) -> None:
        """Start again from nothing."""
        self.messages_inside = self.messages_across = self.bytes_inside = self.bytes_across = 0


class CountingComm:
    """Hands every call on to another ``Comm`` and counts it; sub-groups count into the same ``Traffic``.

    All-to-all is counted pair by pair. Reductions, gathers and broadcasts are counted as rings, whatever the
    carrier does: every rank sends to its right neighbour, an all-reduce ``2 (W - 1) / W`` of the buffer.
    """

    def __init__(self, comm: Comm, node_of: Sequence[int], traffic: Traffic | None = None) -> None:
        """Count what this rank sends over ``comm``.

        Args:
            comm: the carrier.
            node_of: [W] node of each of its ranks.
            traffic: where to count.
        """
        self.comm = comm
        self.rank = comm.rank
        self.size = comm.size
        self.traffic = Traffic() if traffic is None else traffic
        self._node_of = list(node_of)

    def _count(self, to: int, size: int, messages: int = 1) -> None:
        if to == self.rank or size == 0:
            return
        if self._node_of[to] == self._node_of[self.rank]:
            self.traffic.messages_inside += messages
            self.traffic.bytes_inside += size
        else:
            self.traffic.messages_across += messages
            self.traffic.bytes_across += size

    def _ring(self, size: float, messages: int) -> None:
        self._count((self.rank + 1) % self.size, round(size), messages)

    def all_to_all(self, send: Any, recv: Any) -> Event:
        """See ``Comm.all_to_all``."""
        for rank in range(self.size):
            self._count(rank, send.nbytes // self.size)
        return self.comm.all_to_all(send, recv)

    def all_to_all_v(self, send: Any, send_counts: Sequence[int], recv: Any, recv_counts: Sequence[int]) -> Event:
        """See ``Comm.all_to_all_v``."""
        element = send.itemsize * int(np.prod(send.shape[1:], dtype=np.int64))
        for rank, count in enumerate(send_counts):
            self._count(rank, int(count) * element)
        return self.comm.all_to_all_v(send, send_counts, recv, recv_counts)

    def all_reduce(self, buffer: Any, op: Reduction = "sum") -> Event:
        """See ``Comm.all_reduce``."""
        self._ring(2 * (self.size - 1) / self.size * buffer.nbytes, 2 * (self.size - 1))
        return self.comm.all_reduce(buffer, op)

    def all_gather(self, send: Any, recv: Any) -> Event:
        """See ``Comm.all_gather``."""
        self._ring((self.size - 1) * send.nbytes, self.size - 1)
        return self.comm.all_gather(send, recv)

    def broadcast(self, buffer: Any, root: int = 0) -> Event:
        """See ``Comm.broadcast``."""
        if (self.rank + 1) % self.size != root:
            self._ring(buffer.nbytes, 1)
        return self.comm.broadcast(buffer, root)

    def split(self, color: int, key: int) -> CountingComm:
        """See ``Comm.split``."""
        return self._derived(self.comm.split(color, key))

    def split_node(self) -> CountingComm:
        """See ``Comm.split_node``."""
        return self._derived(self.comm.split_node())

    def _derived(self, part: Comm) -> CountingComm:
        nodes = np.empty(part.size, np.int64)
        part.all_gather(np.array([self._node_of[self.rank]], np.int64), nodes).wait()
        return CountingComm(part, nodes.tolist(), self.traffic)

    def barrier(self) -> None:
        """See ``Comm.barrier``."""
        self.comm.barrier()

    def progress(self) -> None:
        """See ``Comm.progress``."""
        self.comm.progress()

    def abort(self, code: int) -> NoReturn:
        """See ``Comm.abort``."""
        self.comm.abort(code)
