"""How fast GPUs reach each other: the probes of ``links`` with buffers of the device, through the carrier of the run.

What the host measures over MPI says nothing about NVLink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from dlrm.device import Array, Device
from embedding.comm import Comm
from embedding.links import Link, LinkRates, WorkRates, median_seconds
from embedding.lookup import gather_pool
from embedding.topology import Topology

_SMALL_BYTES = 64
_LARGE_BYTES = 1 << 26
_WORK_ROWS, _WORK_DIM = 1 << 20, 128
_DEDUPLICATE_S = 2e-10
"""Supposed: two sorts of 1.7 million keys in 0.1 ms each (benchmarks/RESULTS.md), and as much for all the rest."""


def probe_device(
    comm: Comm,
    host: Comm,
    topology: Topology,
    device: Device,
    *,
    large_bytes: int = _LARGE_BYTES,
    work_rows: int = _WORK_ROWS,
) -> LinkRates:
    """Measure what a plan for GPUs weighs; collective, and the same figures on every rank.

    Args:
        comm: all ranks; carries buffers of the device.
        host: the same ranks; carries buffers of the host.
        topology: their nodes.
        device: this rank's.
        large_bytes: what a rank sends in a large message.
        work_rows: of the table that rows are gathered from.
    """
    if comm.size == 1:
        free = Link(1e12, 0.0)  # nothing travels
        return LinkRates(
            inside=free, across=free, inside_reduce=free, across_reduce=free, work=_work(host, device, work_rows),
            source="one rank: nothing to measure",
        )  # fmt: skip
    measured: dict[str, Link] = {}
    for name, same in (("inside", True), ("across", False)):
        peers = [r for r, node in enumerate(topology.node_of) if (node == topology.node) == same and r != comm.rank]
        most = np.array([len(peers)], np.int64)
        host.all_reduce(most, "max").wait()
        if most[0]:
            measured[name] = _all_to_all(comm, host, peers, int(most[0]), device, large_bytes)
    for name, other in (("inside", "across"), ("across", "inside")):
        measured.setdefault(name, measured.get(other, Link(1e12, 0.0)))
    reduce = _all_reduce(comm, host, device, large_bytes)
    return LinkRates(
        inside=measured["inside"], across=measured["across"], inside_reduce=reduce, across_reduce=reduce,
        work=_work(host, device, work_rows), source="measured on the device",
    )  # fmt: skip


def _all_to_all(comm: Comm, host: Comm, peers: Sequence[int], most: int, device: Device, large_bytes: int) -> Link:
    def prepare(size: int) -> tuple[Callable[[], None], float]:
        each = max(1, size // most)
        counts = [each * (rank in peers) for rank in range(comm.size)]
        send, recv = (device.zeros((max(1, sum(counts)), 1), np.uint8) for _ in range(2))

        def run() -> None:
            comm.all_to_all_v(send, counts, recv, counts).wait()
            _finish(device, recv)

        return run, float(each * most)

    return _fit(host, prepare, most, large_bytes)


def _all_reduce(comm: Comm, host: Comm, device: Device, large_bytes: int) -> Link:
    def prepare(size: int) -> tuple[Callable[[], None], float]:
        buffer = device.zeros(size // 4, np.float32)

        def run() -> None:
            comm.all_reduce(buffer).wait()
            _finish(device, buffer)

        return run, 2.0 * buffer.nbytes * (comm.size - 1) / comm.size

    return _fit(host, prepare, 2 * math.ceil(math.log2(comm.size)), large_bytes)


def _fit(host: Comm, prepare: Callable[[int], tuple[Callable[[], None], float]], starts: int, large_bytes: int) -> Link:
    """A start-up time and a rate from a small and a large run."""
    small = median_seconds(host, prepare(_SMALL_BYTES)[0])
    run, moved = prepare(large_bytes)
    large = median_seconds(host, run)
    return Link(moved / max(large - small, large / 10, 1e-9), small / starts)


def _work(host: Comm, device: Device, rows: int) -> WorkRates:
    """Gather rows of which half are among the first 2,000 in a million, as a power law has them."""
    xp, count = device.xp, rows // 4
    table, out = device.zeros((rows, _WORK_DIM), np.float32), device.zeros((count, 1, _WORK_DIM), np.float32)
    keys = (rows * np.random.default_rng(0).random(count) ** 9).astype(np.int32)
    zero, nothing = xp.asarray(np.zeros(1, np.int64)), xp.asarray(np.empty(0, np.int64))
    named, mean, weights = xp.asarray(keys), xp.asarray(np.zeros(1, np.bool_)), xp.asarray(np.empty(0, np.float32))

    def gather() -> None:
        gather_pool(table, zero, named, nothing, weights, mean, zero, count, out, device=device)
        _finish(device, out)

    return WorkRates(out.nbytes / max(median_seconds(host, gather), 1e-9), _DEDUPLICATE_S)


def _finish(device: Device, array: Array) -> None:
    """Wait for what was issued on the current stream."""
    device.read_later(array.reshape(-1)[:1]).values()
