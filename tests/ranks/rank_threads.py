"""Ranks as threads of one process, one of which runs at a time: collectives without mpirun.

Receive buffers are filled in ``wait()`` and hold nonsense before it, so that a read that comes too early shows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from embedding.comm import SingleComm

CARRIED = ("float32", "float64", "int32", "int64", "uint8")
NONSENSE = 77


class Meeting:
    """Where the threads of one group hand each other values; whoever runs holds the baton."""

    def __init__(self, size: int, baton: threading.Lock) -> None:
        self.barrier = threading.Barrier(size, timeout=120)
        self.baton = baton
        self.values: list[Any] = [None] * size

    def meet(self) -> None:
        self.baton.release()
        try:
            self.barrier.wait()
        finally:
            self.baton.acquire()

    def swap(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.meet()
        everyone = list(self.values)
        self.meet()
        return everyone


class LateEvent:
    def __init__(self, recv: np.ndarray, value: np.ndarray) -> None:
        self.recv, self.value = recv, value
        recv.reshape(-1)[: value.size] = NONSENSE

    def wait(self) -> None:
        self.recv.reshape(-1)[: self.value.size] = self.value.reshape(-1)


class ThreadComm:
    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    def _swap(self, call: str, send: np.ndarray, recv: np.ndarray, *more: Any) -> list[Any]:
        for buffer in (send, recv):
            assert buffer.dtype.name in CARRIED, buffer.dtype
            assert buffer.flags.c_contiguous
        assert send.dtype == recv.dtype
        everyone = self._meeting.swap(self.rank, (call, send.copy(), *more))
        assert {part[0] for part in everyone} == {call}, "ranks call different collectives"
        return [part[1:] for part in everyone]

    def all_to_all(self, send: np.ndarray, recv: np.ndarray) -> LateEvent:
        assert send.shape == recv.shape
        assert len(send) % self.size == 0
        parts = [np.split(part, self.size)[self.rank] for (part,) in self._swap("all_to_all", send, recv)]
        return LateEvent(recv, np.concatenate(parts))

    def all_to_all_v(
        self, send: np.ndarray, send_counts: Sequence[int], recv: np.ndarray, recv_counts: Sequence[int]
    ) -> LateEvent:
        assert send.shape[1:] == recv.shape[1:]
        # Open MPI takes equal pointers for "in place", even where nothing is sent, and waits for ever.
        assert send.ctypes.data != recv.ctypes.data
        assert sum(send_counts) <= len(send)
        assert sum(recv_counts) <= len(recv)
        assert len(send_counts) == len(recv_counts) == self.size
        pieces = []
        for part, counts in self._swap("all_to_all_v", send, recv, list(send_counts)):
            begin = sum(counts[: self.rank])
            pieces.append(part[begin : begin + counts[self.rank]])
        assert [len(piece) for piece in pieces] == list(recv_counts)
        return LateEvent(recv, np.concatenate(pieces))

    def all_reduce(self, buffer: np.ndarray, op: str = "sum") -> LateEvent:
        reduce = {"sum": np.sum, "max": np.max, "min": np.min}[op]
        everyone = [part for (part,) in self._swap("all_reduce", buffer, buffer)]
        return LateEvent(buffer, reduce(np.stack(everyone), axis=0).astype(buffer.dtype))

    def all_gather(self, send: np.ndarray, recv: np.ndarray) -> LateEvent:
        assert recv.size == self.size * send.size
        return LateEvent(recv, np.stack([part for (part,) in self._swap("all_gather", send, recv)]))

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> LateEvent:
        return LateEvent(buffer, self._swap("broadcast", buffer, buffer)[root][0])

    def split(self, color: int, key: int) -> ThreadComm:
        everyone = self._meeting.swap(self.rank, (color, key))
        members = sorted((k, rank) for rank, (c, k) in enumerate(everyone) if c == color)
        ranks = [rank for _, rank in members]
        meeting = Meeting(len(ranks), self._meeting.baton) if ranks[0] == self.rank else None
        meeting = self._meeting.swap(self.rank, meeting)[ranks[0]]
        return ThreadComm(ranks.index(self.rank), len(ranks), meeting)

    def split_node(self) -> ThreadComm:
        return self.split(0, self.rank)

    def barrier(self) -> None:
        self._meeting.meet()

    def progress(self) -> None:
        """Events fill their buffers when they are waited for."""

    def abort(self, code: int) -> None:
        self._meeting.barrier.abort()
        raise SystemExit(code)


def run_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """Results of ``work(comm)`` by rank; the first exception that a rank raised is raised here."""
    if size == 1:
        return [work(SingleComm())]
    meeting = Meeting(size, threading.Lock())
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        with meeting.baton:
            try:
                results[rank] = work(ThreadComm(rank, size, meeting))
            except BaseException as error:  # noqa: BLE001 raised again below
                if not isinstance(error, threading.BrokenBarrierError):
                    errors.append(error)
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
