"""What ranks do together: one protocol, several carriers.

Every collective is called by all ranks of a ``Comm`` in the same order and returns an ``Event``; the buffers
belong to the collective until ``wait()`` returns. Buffers are C-contiguous arrays of float32, float64, int32,
int64 or uint8. A failure of the carrier is a ``CommError``.

Shapes: W ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Protocol, Self

import numpy as np

Reduction = Literal["sum", "max", "min"]


class Event(Protocol):
    """Something under way."""

    def wait(self) -> None:
        """Return once it is done."""


class Comm(Protocol):
    """A group of ranks."""

    @property
    def rank(self) -> int:
        """This process's number in the group, from 0."""

    @property
    def size(self) -> int:
        """Ranks in the group, W."""

    def all_to_all(self, send: Any, recv: Any) -> Event:
        """Chunk r of ``send`` goes to rank r; chunk r of ``recv`` comes from it.

        Args:
            send: [W * n, ...]; W equal chunks along axis 0.
            recv: same shape and dtype.
        """

    def all_to_all_v(self, send: Any, send_counts: Sequence[int], recv: Any, recv_counts: Sequence[int]) -> Event:
        """As ``all_to_all`` with chunks of any length, one after the other.

        Args:
            send: [sum(send_counts) or more, ...].
            send_counts: W lengths in elements of axis 0.
            recv: [sum(recv_counts) or more, ...]; same trailing shape and dtype.
            recv_counts: W lengths in elements of axis 0.
        """

    def all_reduce(self, buffer: Any, op: Reduction = "sum") -> Event:
        """Combine ``buffer`` elementwise over the ranks, in place."""

    def all_gather(self, send: Any, recv: Any) -> Event:
        """Every rank's ``send``, in rank order.

        Args:
            send: any shape, the same on every rank.
            recv: W times as many elements, such as [W, *send.shape].
        """

    def broadcast(self, buffer: Any, root: int = 0) -> Event:
        """Copy ``buffer`` of rank ``root`` into every rank's."""

    def split(self, color: int, key: int) -> Self:
        """The group of the ranks with the same ``color``, ordered by ``key`` and then rank."""

    def split_node(self) -> Self:
        """The group of the ranks that share memory with this one, ordered by rank."""

    def barrier(self) -> None:
        """Return once every rank has called it."""

    def progress(self) -> None:
        """Let what is under way go on; returns at once. For whoever computes while messages travel."""

    def abort(self, code: int) -> NoReturn:
        """End every rank at once with exit code ``code``."""


class DoneEvent:
    """What was done before the call returned."""

    def wait(self) -> None:
        """Nothing is left to wait for."""


_DONE = DoneEvent()


class SingleComm:
    """The only rank: every collective is a copy."""

    rank = 0
    size = 1

    def all_to_all(self, send: Any, recv: Any) -> Event:
        """See ``Comm.all_to_all``."""
        recv[...] = send
        return _DONE

    def all_to_all_v(self, send: Any, send_counts: Sequence[int], recv: Any, recv_counts: Sequence[int]) -> Event:
        """See ``Comm.all_to_all_v``."""
        recv[: recv_counts[0]] = send[: send_counts[0]]
        return _DONE

    def all_reduce(self, buffer: Any, op: Reduction = "sum") -> Event:  # noqa: ARG002 one rank's sum is its own
        """See ``Comm.all_reduce``."""
        return _DONE

    def all_gather(self, send: Any, recv: Any) -> Event:
        """See ``Comm.all_gather``."""
        recv.reshape(send.shape)[...] = send
        return _DONE

    def broadcast(self, buffer: Any, root: int = 0) -> Event:  # noqa: ARG002 there is no one else
        """See ``Comm.broadcast``."""
        return _DONE

    def split(self, color: int, key: int) -> SingleComm:  # noqa: ARG002 one rank stays one rank
        """See ``Comm.split``."""
        return self

    def split_node(self) -> SingleComm:
        """See ``Comm.split_node``."""
        return self

    def barrier(self) -> None:
        """See ``Comm.barrier``."""

    def progress(self) -> None:
        """See ``Comm.progress``."""

    def abort(self, code: int) -> NoReturn:
        """See ``Comm.abort``."""
        sys.exit(code)


def all_gather_bytes(comm: Comm, data: bytes) -> list[bytes]:
    """Every rank's ``data``, in rank order; lengths may differ."""
    lengths = np.empty(comm.size, np.int64)
    comm.all_gather(np.array([len(data)], np.int64), lengths).wait()
    width = int(lengths.max())
    if width == 0:
        return [b""] * comm.size
    send = np.zeros(width, np.uint8)
    send[: len(data)] = np.frombuffer(data, np.uint8)
    recv = np.empty((comm.size, width), np.uint8)
    comm.all_gather(send, recv).wait()
    return [recv[rank, :length].tobytes() for rank, length in enumerate(lengths.tolist())]


def broadcast_bytes(comm: Comm, data: bytes, root: int = 0) -> bytes:
    """Rank ``root``'s ``data`` on every rank; what other ranks hand in is ignored."""
    length = np.array([len(data)], np.int64)
    comm.broadcast(length, root).wait()
    buffer = np.frombuffer(data, np.uint8).copy() if comm.rank == root else np.empty(int(length[0]), np.uint8)
    if buffer.size:
        comm.broadcast(buffer, root).wait()
    return buffer.tobytes()
