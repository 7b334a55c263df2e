"""``Comm`` for buffers of a device that go through pinned memory of the host and another ``Comm``, such as MPI.

NCCL wants a GPU for every rank. With this carrier 4 or 8 ranks share one or two GPUs, which is how exchanges between
nodes are tried where there is one machine. The host waits for the device in every call, so that nothing can be captured
into a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from dlrm.device import Array, Device
from embedding.comm import Comm, Event, Reduction


@dataclass(slots=True)
class StagedEvent:
    """Something under way on the host, and what brings it to the device."""

    event: Event
    arrive: Callable[[], None] | None

    def wait(self) -> None:
        """Return once what came has been sent to the device, in the order of the current stream."""
        if self.arrive is not None:
            self.event.wait()
            self.arrive()
            self.arrive = None


class StagedComm:
    """The ranks of another ``Comm``, with buffers of a device.

    Args:
        host: carries the host's buffers.
        device: holds the others.
    """

    def __init__(self, host: Comm, device: Device) -> None:
        self.host, self._device = host, device
        self.rank, self.size = host.rank, host.size
        self._pools: dict[tuple[str, Any], Array] = {}
        self._busy: set[tuple[str, Any]] = set()

    def all_to_all(self, send: Any, recv: Any) -> Event:
        """See ``Comm.all_to_all``."""
        return self._through(send, recv, self.host.all_to_all)

    def all_to_all_v(self, send: Any, send_counts: Sequence[int], recv: Any, recv_counts: Sequence[int]) -> Event:
        """See ``Comm.all_to_all_v``."""

        def start(going: Array, coming: Array) -> Event:
            return self.host.all_to_all_v(going, send_counts, coming, recv_counts)

        return self._through(send[: sum(send_counts)], recv[: sum(recv_counts)], start)

    def all_reduce(self, buffer: Any, op: Reduction = "sum") -> Event:
        """See ``Comm.all_reduce``."""
        return self._in_place(buffer, lambda own: self.host.all_reduce(own, op))

    def all_gather(self, send: Any, recv: Any) -> Event:
        """See ``Comm.all_gather``."""
        return self._through(send, recv, self.host.all_gather)

    def broadcast(self, buffer: Any, root: int = 0) -> Event:
        """See ``Comm.broadcast``."""
        return self._in_place(buffer, lambda own: self.host.broadcast(own, root))

    def split(self, color: int, key: int) -> Self:
        """See ``Comm.split``."""
        return type(self)(self.host.split(color, key), self._device)

    def split_node(self) -> Self:
        """See ``Comm.split_node``."""
        return type(self)(self.host.split_node(), self._device)

    def barrier(self) -> None:
        """See ``Comm.barrier``."""
        self.host.barrier()

    def progress(self) -> None:
        """See ``Comm.progress``."""
        self.host.progress()

    def abort(self, code: int) -> NoReturn:
        """See ``Comm.abort``."""
        self.host.abort(code)

    def _through(self, send: Any, recv: Any, start: Callable[[Array, Array], Event]) -> Event:
        going, sent = self._room("send", send)
        coming, received = self._room("recv", recv)
        self._device.download(send, going)
        event = start(going, coming)

        def arrive() -> None:
            self._upload(coming, recv)
            self._busy -= {sent, received}

        return StagedEvent(event, arrive)

    def _in_place(self, buffer: Any, start: Callable[[Array], Event]) -> Event:
        own, place = self._room("send", buffer)
        self._device.download(buffer, own)
        event = start(own)

        def arrive() -> None:
            self._upload(own, buffer)
            self._busy -= {place}

        return StagedEvent(event, arrive)

    def _upload(self, host: Array, buffer: Any) -> None:
        self._device.upload(host, buffer)
        if buffer.size:
            # The next call uses the room again, whatever its stream: the copy has to be done.
            self._device.read_later(buffer.reshape(-1)[:1]).values()

    def _room(self, name: str, like: Any) -> tuple[Array, tuple[str, Any]]:
        """Pinned memory of the shape and dtype of ``like``, and what it is given back by."""
        number = 0
        while (place := (f"{name}{number}", like.dtype)) in self._busy:
            number += 1
        self._busy.add(place)
        size = math.prod(like.shape)
        pool = self._pools.get(place)
        if pool is None or pool.size < size:
            pool = self._pools[place] = self._device.pinned_empty(size + size // 4 + 1, like.dtype)
        return pool[:size].reshape(like.shape), place
