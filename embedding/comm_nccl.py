"""``Comm`` over NCCL, for buffers of GPUs: every collective goes on the current stream, so that graphs can capture it.

MPI bootstraps: it carries the identifier that the ranks of a communicator share, and everything of the host. A thread
watches for errors that NCCL meets while nobody is calling it, such as a peer that died: it would otherwise wait for
ever. Communicators are destroyed before the process ends (``close``), as the teardown hangs otherwise.

Shapes: W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Self

import cupy
import numpy as np
from cupy.cuda import nccl

from dlrm.errors import CommError
from embedding.comm import Comm, DoneEvent, Event, Reduction, broadcast_bytes
from embedding.comm_watch import Watch
from embedding.nccl_memory import nccl_memory

_TYPES = {
    "float32": nccl.NCCL_FLOAT32,
    "float64": nccl.NCCL_FLOAT64,
    "float16": nccl.NCCL_FLOAT16,
    "int32": nccl.NCCL_INT32,
    "int64": nccl.NCCL_INT64,
    "uint8": nccl.NCCL_UINT8,
}
_OPERATIONS: dict[Reduction, Any] = {"sum": nccl.NCCL_SUM, "max": nccl.NCCL_MAX, "min": nccl.NCCL_MIN}
_DONE = DoneEvent()


class NcclComm:
    """A group of ranks with a GPU each.

    Events that collectives return are done at once for whoever goes on with the same stream.
    """

    def __init__(self, host: Comm, device_index: int, watch: Watch | None = None) -> None:
        """Join the communicator of all ranks of ``host``; collective.

        Args:
            host: the same ranks over MPI.
            device_index: this rank's GPU, of those that the process sees.
            watch: looks for errors; ``None``: one of its own.

        Raises:
            CommError: NCCL does not start, as where two ranks share a GPU.
        """
        self.host, self._index = host, device_index
        self.rank, self.size = host.rank, host.size
        cupy.cuda.Device(device_index).use()
        self._comm = _start(host)
        self._parts: list[NcclComm] = []
        self._memory = nccl_memory()
        self._own_watch = watch is None
        self._watch = Watch(host, _error_of) if watch is None else watch
        self._watch.add(self._comm)

    def all_to_all(self, send: Any, recv: Any) -> Event:
        """See ``Comm.all_to_all``."""
        count = len(send) // self.size
        return self.all_to_all_v(send, [count] * self.size, recv, [count] * self.size)

    def all_to_all_v(self, send: Any, send_counts: Sequence[int], recv: Any, recv_counts: Sequence[int]) -> Event:
        """See ``Comm.all_to_all_v``; the counts are part of what a graph captures."""
        stream = cupy.cuda.get_current_stream().ptr
        going, coming = (np.cumsum([0, *counts], dtype=np.int64).tolist() for counts in (send_counts, recv_counts))
        send_width, recv_width = (buffer.nbytes // max(1, len(buffer)) for buffer in (send, recv))
        own = self.rank
        if send_counts[own]:
            # A copy on the device: NCCL would send it to itself.
            recv[coming[own] : coming[own + 1]] = send[going[own] : going[own + 1]]
        if not any(send_counts[r] or recv_counts[r] for r in range(self.size) if r != own):
            return _DONE

        def exchange() -> None:
            nccl.groupStart()
            # Every rank begins with the one behind it, so that no receiver is everyone's first.
            for distance in range(1, self.size):
                to, source = (own + distance) % self.size, (own - distance) % self.size
                if send_counts[to]:
                    begin, count = send.data.ptr + going[to] * send_width, send_counts[to] * send_width
                    self._comm.send(begin, count, nccl.NCCL_UINT8, to, stream)
                if recv_counts[source]:
                    begin, count = recv.data.ptr + coming[source] * recv_width, recv_counts[source] * recv_width
                    self._comm.recv(begin, count, nccl.NCCL_UINT8, source, stream)
            nccl.groupEnd()

        return self._call("all_to_all", exchange)

    def all_reduce(self, buffer: Any, op: Reduction = "sum") -> Event:
        """See ``Comm.all_reduce``."""
        pointer, kind, operation = buffer.data.ptr, _type(buffer), _OPERATIONS[op]
        stream = cupy.cuda.get_current_stream().ptr
        return self._call(
            "all_reduce", lambda: self._comm.allReduce(pointer, pointer, buffer.size, kind, operation, stream)
        )

    def all_gather(self, send: Any, recv: Any) -> Event:
        """See ``Comm.all_gather``."""
        stream = cupy.cuda.get_current_stream().ptr
        return self._call(
            "all_gather",
            lambda: self._comm.allGather(send.data.ptr, recv.data.ptr, send.nbytes, nccl.NCCL_UINT8, stream),
        )

    def broadcast(self, buffer: Any, root: int = 0) -> Event:
        """See ``Comm.broadcast``."""
        stream, pointer = cupy.cuda.get_current_stream().ptr, buffer.data.ptr
        return self._call(
            "broadcast", lambda: self._comm.broadcast(pointer, pointer, buffer.nbytes, nccl.NCCL_UINT8, root, stream)
        )

    def room(self, shape: tuple[int, ...], dtype: Any) -> Any | None:
        """Zeros whose exchange, once captured, writes straight into the peer's memory; ``None``: there are none.

        NCCL opens such memory to its peers, and copies what lies elsewhere through buffers of its own. What is sent and
        what is received have to be of one kind on all ranks.

        Raises:
            DeviceError: there is not enough memory left.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._memory is None or not size:
            return None
        block, used = self._memory.take(size)
        if used:
            cupy.cuda.Device(self._index).synchronize()
        memory = cupy.cuda.UnownedMemory(block.address, size, block, self._index)
        array = cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))
        array.fill(0)
        return array

    def split(self, color: int, key: int) -> Self:
        """See ``Comm.split``."""
        return self._part(self.host.split(color, key))

    def split_node(self) -> Self:
        """See ``Comm.split_node``."""
        return self._part(self.host.split_node())

    def barrier(self) -> None:
        """See ``Comm.barrier``; the host waits for the current stream first."""
        cupy.cuda.get_current_stream().synchronize()
        self.host.barrier()

    def progress(self) -> None:
        """See ``Comm.progress``."""

    def abort(self, code: int) -> NoReturn:
        """See ``Comm.abort``."""
        self.host.abort(code)

    def close(self) -> None:
        """Destroy the communicator and those split from it; collective, behind all work of the device.

        Graphs that captured collectives have to be gone before: NCCL waits for them. Harmless to call twice. A process
        that fails must not call it: it would wait for ranks that do not come.
        """
        if self._comm is None:
            return
        for part in self._parts:
            part.close()
        cupy.cuda.Device(self._index).synchronize()
        self.host.barrier()
        self._watch.drop(self._comm)
        self._comm.destroy()
        self._comm = None
        if self._memory is not None:
            self._memory.close()
        if self._own_watch:
            self._watch.stop()

    def _part(self, host: Comm) -> Self:
        part = type(self)(host, self._index, self._watch)
        self._parts.append(part)
        return part

    def _call(self, name: str, work: Callable[[], None]) -> Event:
        try:
            work()
        except nccl.NcclError as error:
            raise CommError(f"NCCL {name}: {error}; look at the other ranks' messages for the first cause") from None
        return _DONE


def library_version() -> int:
    """Of NCCL, as it counts: 22703 is 2.27.3."""
    return int(nccl.get_version())


def _start(host: Comm) -> Any:
    """The communicator of the ranks of ``host``.

    Raises:
        CommError: NCCL does not start.
    """
    try:
        own = nccl.get_unique_id() if host.rank == 0 else b""
        return nccl.NcclCommunicator(host.size, broadcast_bytes(host, own), host.rank)
    except nccl.NcclError as error:
        raise CommError(
            f"NCCL: {host.size} ranks cannot start ({error}); give every rank a GPU of its own, and set "
            "NCCL_DEBUG=WARN to see more"
        ) from None


def _error_of(comm: Any) -> str | None:
    """What went wrong with a communicator while nobody called it."""
    try:
        comm.check_async_error()
    except nccl.NcclError as error:
        return str(error)
    return None


def _type(buffer: Any) -> Any:
    """NCCL's name of an array's dtype.

    Raises:
        CommError: ranks do not add this dtype up.
    """
    try:
        return _TYPES[buffer.dtype.name]
    except KeyError:
        raise CommError(f"dtype {buffer.dtype}: ranks add up only {', '.join(_TYPES)}") from None
