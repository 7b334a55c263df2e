"""Carriers of device buffers without a GPU: staged through the host, and NCCL's calls on an NCCL of threads."""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
import time
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import comm_cases
import exchange_cases as xc
import numpy as np
import pytest
import rank_threads

from dlrm.device import HostDevice
from dlrm.errors import CommError
from embedding.comm import SingleComm
from embedding.comm_staged import StagedComm
from embedding.comm_watch import Watch
from embedding.device_links import probe_device
from embedding.topology import discover


@pytest.mark.parametrize("size", [1, 3, 4])
def test_staged_buffers(size: int) -> None:
    rank_threads.run_ranks(size, lambda comm: comm_cases.run_all(StagedComm(comm, HostDevice(compiled=False))))


def test_tables_over_staged_buffers() -> None:
    case = xc.CASES[8]

    def train(comm: Any) -> xc.Outcome:
        device = HostDevice(compiled=False)
        return xc.train(case, StagedComm(comm, device), device)

    xc.check_all(case, rank_threads.run_ranks(3, train))


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (2, 1), (4, 2), (3, 2), (2, 2)])
def test_every_rank_gets_the_same_rates_of_the_device(ranks: int, nodes: int) -> None:
    device = HostDevice(compiled=False)

    def measure(comm: Any) -> Any:
        return probe_device(
            StagedComm(comm, device), comm, discover(comm, nodes), device, large_bytes=1 << 16, work_rows=4096
        )

    rates = rank_threads.run_ranks(ranks, measure)
    assert all(rate == rates[0] for rate in rates)
    assert rates[0].work.rows_bytes_per_s > 0
    if ranks > 1:
        assert rates[0].source == "measured on the device"
        # One rank a node, or one node: there is one kind of link.
        assert (rates[0].inside is rates[0].across) == (ranks == nodes or nodes == 1)
        assert rates[0].inside_reduce == rates[0].across_reduce


class NcclError(RuntimeError):
    """As CuPy's."""


class Wires:
    """What ranks have sent to each other and not received yet, by communicator."""

    def __init__(self) -> None:
        self.sent: dict[Any, list[bytes]] = {}
        self.made = 0
        self.alive: set[int] = set()
        self.group = threading.local()


class FakeCommunicator:
    """Point-to-point messages between threads, on memory that pointers name; a group is done at its end."""

    def __init__(self, wires: Wires, size: int, identifier: bytes, rank: int) -> None:
        assert len(identifier) == 128
        assert isinstance(identifier, bytes)
        self.wires, self.size, self.identifier, self.rank = wires, size, identifier, rank
        wires.alive.add(id(self))

    def send(self, pointer: int, count: int, kind: int, peer: int, stream: int) -> None:
        assert stream == 11
        key = (self.identifier, self.rank, peer)
        data = ctypes.string_at(pointer, count * SIZES[kind])
        self.wires.group.sends.append(lambda: self.wires.sent.setdefault(key, []).append(data))

    def recv(self, pointer: int, count: int, kind: int, peer: int, stream: int) -> None:
        assert stream == 11
        self.wires.group.receives.append((self, (self.identifier, peer, self.rank), pointer, count * SIZES[kind]))

    def destroy(self) -> None:
        self.wires.alive.remove(id(self))

    def check_async_error(self) -> None:
        """All is well."""


SIZES = {1: 1, 2: 4}


class Buffer(np.ndarray):
    """A host array with a pointer as CuPy's have it."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.__array_interface__["data"][0])


@pytest.fixture
def fake_nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Wires]]:
    """``embedding.comm_nccl`` over a CuPy that has nothing but what it asks for."""
    wires = Wires()
    nccl, cupy = ModuleType("cupy.cuda.nccl"), ModuleType("cupy")
    for name in ("FLOAT32", "FLOAT64", "FLOAT16", "INT32", "INT64", "UINT8", "SUM", "MAX", "MIN"):
        setattr(nccl, f"NCCL_{name}", 1)

    def unique() -> bytes:
        wires.made += 1
        return bytes([256 - wires.made, *range(127)])

    def start() -> None:
        wires.group.sends, wires.group.receives = [], []

    def end() -> None:
        for send in wires.group.sends:
            send()
        for communicator, key, pointer, count in wires.group.receives:
            communicator.meet()
            data = wires.sent[key].pop(0)
            assert len(data) == count
            ctypes.memmove(pointer, data, count)

    nccl.NcclError, nccl.get_unique_id = NcclError, unique  # type: ignore[attr-defined]
    nccl.groupStart, nccl.groupEnd = start, end  # type: ignore[attr-defined]
    stream = SimpleNamespace(ptr=11, synchronize=lambda: None)
    device = SimpleNamespace(use=lambda: None, synchronize=lambda: None)
    cuda = SimpleNamespace(nccl=nccl, Device=lambda index: device, get_current_stream=lambda: stream)
    cupy.cuda = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", nccl)
    monkeypatch.delitem(sys.modules, "embedding.comm_nccl", raising=False)
    module = importlib.import_module("embedding.comm_nccl")
    nccl.NcclCommunicator = lambda size, identifier, rank: FakeCommunicator(wires, size, identifier, rank)  # type: ignore[attr-defined]
    yield module, wires
    sys.modules.pop("embedding.comm_nccl", None)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_nccl_sends_every_chunk_to_its_rank(fake_nccl: tuple[Any, Wires], size: int) -> None:
    module, wires = fake_nccl

    class Carrier:
        """Buffers with pointers."""

        def __init__(self, host: Any) -> None:
            self.comm = module.NcclComm(host, 0)
            self.rank, self.size = host.rank, host.size
            self.comm._comm.meet = host.barrier

        def all_to_all(self, send: np.ndarray, recv: np.ndarray) -> Any:
            return self.comm.all_to_all(send.view(Buffer), recv.view(Buffer))

        def all_to_all_v(self, send: np.ndarray, going: Any, recv: np.ndarray, coming: Any) -> Any:
            return self.comm.all_to_all_v(send.view(Buffer), going, recv.view(Buffer), coming)

    def work(host: Any) -> None:
        carrier = Carrier(host)
        for dtype in comm_cases.DTYPES:
            comm_cases.all_to_all(carrier, dtype)
        part = carrier.comm.split(host.rank % 2, host.rank)
        assert part.size == len(range(host.rank % 2, size, 2))
        for _ in range(2):
            carrier.comm.close()

    rank_threads.run_ranks(size, work)
    assert wires.made == 1 + min(2, size)
    assert not wires.alive
    assert not any(thread.name == "nccl-watch" for thread in threading.enumerate())


def test_an_error_that_nobody_waits_for_ends_the_run() -> None:
    said: list[str] = []
    told = threading.Event()

    def end(sentence: str) -> None:
        said.append(sentence)
        told.set()

    errors: dict[str, str] = {}
    watch = Watch(SingleComm(), errors.get, interval_s=0.01, end=end)
    for name in ("first", "second", "gone"):
        watch.add(name)
    watch.drop("gone")
    errors["gone"] = "nobody asks"
    time.sleep(0.1)
    assert not said
    errors["second"] = "remote process exited"
    assert told.wait(60)
    watch.stop()
    (sentence,) = said
    assert sentence.startswith("NCCL: rank 0 of 1: remote process exited; ")


def test_a_dtype_that_nccl_does_not_add_up_is_refused(fake_nccl: tuple[Any, Wires]) -> None:
    module, _ = fake_nccl
    comm = module.NcclComm(SingleComm(), 0)
    with pytest.raises(CommError, match="dtype uint16: ranks add up only float32"):
        comm.all_reduce(np.zeros(3, np.uint16).view(Buffer))
    comm.close()
