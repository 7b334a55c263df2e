"""How fast ranks reach each other, inside a node and between nodes: measured by short probes, or given.

A rate is what one rank sends to others while all ranks of its group send as much. A latency is the time of one
message to one peer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dlrm.device import Device, HostDevice
from dlrm.errors import ConfigError
from embedding.comm import Comm
from embedding.lookup import gather_pool
from embedding.slots import RowLayout, route_keys
from embedding.topology import Topology

_SMALL_BYTES = 8
_FIRST_LARGE_BYTES = 1 << 18
_LAST_LARGE_BYTES = 1 << 22
_LONG_ENOUGH_S = 0.02
"""A collective that takes so long is past its start-up; larger ones would only cost time."""
_REPEATS = 5
_WORK_ROWS, _WORK_DIM, _WORK_KEYS = 1 << 17, 128, 1 << 14
_SHARED_FROM = 1.4
"""One rank a node is so many times faster alone than with its neighbours where they share the way out."""


@dataclass(frozen=True, slots=True)
class Link:
    """One collective over one kind of link.

    Attributes:
        bytes_per_s: that a rank sends.
        latency_s: of a message to a peer.
    """

    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a rate or a latency cannot be.
        """
        if not (self.bytes_per_s > 0 and math.isfinite(self.bytes_per_s) and 0 <= self.latency_s < math.inf):
            raise ConfigError(
                f"link rates: {self.bytes_per_s!r} bytes/s, latency {self.latency_s!r} s; the rate must be above 0, "
                "the latency at least 0, both finite"
            )


@dataclass(frozen=True, slots=True)
class WorkRates:
    """What ranks do with rows besides sending them.

    Attributes:
        rows_bytes_per_s: bytes of randomly placed rows that a rank gathers in a second.
        deduplicate_s: to find a key's place among a batch's distinct rows.
    """

    rows_bytes_per_s: float = 4e9
    deduplicate_s: float = 10e-9

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a rate cannot be.
        """
        if not (0 < self.rows_bytes_per_s < math.inf and 0 <= self.deduplicate_s < math.inf):
            raise ConfigError(
                f"work rates: {self.rows_bytes_per_s!r} bytes/s, {self.deduplicate_s!r} s a key; the rate must be "
                "above 0, the time at least 0, both finite"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRates:
    """All-to-all and all-reduce, inside a node and between nodes.

    Attributes:
        inside: all-to-all among the ranks of one node.
        across: all-to-all among ranks of different nodes.
        inside_reduce: all-reduce inside a node; bytes counted as 2 (n - 1) / n of the buffer.
        across_reduce: the same over ranks of different nodes.
        work: of a rank.
        across_shared: the ranks of a node share one way out, so that a lone sender gets the idle ones' part.
        source: where the figures come from.
    """

    inside: Link
    across: Link
    inside_reduce: Link
    across_reduce: Link
    work: WorkRates = field(default_factory=WorkRates)
    across_shared: bool = False
    source: str = "given"

    def to_values(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def rates_from_values(values: Mapping[str, Any]) -> LinkRates:
    """What ``LinkRates.to_values`` wrote; a reduce rate that is left out is that of the all-to-all.

    Raises:
        ConfigError: a field is missing, unknown or out of range.
    """
    known = {"inside", "across", "inside_reduce", "across_reduce", "work", "across_shared", "source"}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"link rates: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
    try:
        links = {name: Link(**values[name]) for name in ("inside", "across")}
        for name in ("inside", "across"):
            reduce = values.get(f"{name}_reduce")
            links[f"{name}_reduce"] = Link(**reduce) if reduce is not None else links[name]
        work = WorkRates(**values.get("work", {}))
        shared = bool(values.get("across_shared", False))
        return LinkRates(**links, work=work, across_shared=shared, source=str(values.get("source", "given")))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"link rates: {error}; 'inside' and 'across' each need bytes_per_s and latency_s in numbers"
        ) from None


def _published(inside: float, across: float) -> LinkRates:
    # Latencies and work are no vendor's figures: a few microseconds of NCCL's send and receive, HBM3e's 4.8 TB/s at
    # a quarter for scattered rows, and a billion keys hashed in a second.
    return LinkRates(
        inside=Link(inside, 2e-6),
        across=Link(across, 5e-6),
        inside_reduce=Link(inside, 2e-6),
        across_reduce=Link(across, 5e-6),
        work=WorkRates(1.2e12, 1e-9),
        source="published",
    )


PUBLISHED: Mapping[str, LinkRates] = {
    # NVLink 4: 450 GB/s a direction; ConnectX-7: 400 Gbit/s a GPU.
    "h100": _published(450e9, 50e9),
    # NVLink 3: 300 GB/s a direction; 200 Gbit/s a GPU.
    "a100": _published(300e9, 25e9),
}
"""Of machines with links of published rates, by name."""

DEFAULT = LinkRates(
    inside=Link(1e9, 30e-6),
    across=Link(110e6, 60e-6),
    inside_reduce=Link(1e9, 30e-6),
    across_reduce=Link(110e6, 60e-6),
    source="supposed: shared memory, and 1 Gbit/s between nodes",
)
"""Where nothing was measured or given."""


def probe(comm: Comm, topology: Topology, device: Device | None = None) -> LinkRates:
    """Measure all collectives that a plan weighs; every rank of ``comm`` calls it, and all get the same figures.

    Each is run small and large a few times, all ranks at once; the time of the slowest rank counts, the median of
    the runs. A link that is not there (one node, one rank a node) takes the figures of the other. Takes well under a
    second where links are faster than 100 MB/s.

    Args:
        comm: all ranks.
        topology: their nodes, found from ``comm``.
        device: what gathers rows; ``None``: one thread of the CPU.
    """
    if comm.size == 1:
        return replace(
            DEFAULT, work=_measure_work(comm, device or HostDevice(1)), source="one rank: nothing to measure"
        )
    measured: dict[str, Link] = {}
    for name, group in (("inside", topology.inside), ("across", topology.across)):
        # A group of one rank has no peers, but its ranks still meet the others in the timing.
        measured[name] = _measure(comm, group, _all_to_all(group), _off_rank)
        measured[f"{name}_reduce"] = _measure(comm, group, _all_reduce(group), _around_ring)
    groups = np.array([topology.inside.size, topology.across.size], np.int64)
    comm.all_reduce(groups, "max").wait()
    for name, other, size in (("inside", "across", groups[0]), ("across", "inside", groups[1])):
        if size == 1:
            measured[name], measured[f"{name}_reduce"] = measured[other], measured[f"{other}_reduce"]
    shared = False
    if groups.min() > 1:
        alone = _measure(
            comm, topology.across, _all_to_all(topology.across), _off_rank, active=topology.local_rank == 0
        )
        shared = alone.bytes_per_s > _SHARED_FROM * measured["across"].bytes_per_s
    return LinkRates(
        **measured, work=_measure_work(comm, device or HostDevice(1)), across_shared=shared, source="measured"
    )


def _off_rank(size: int, peers: int) -> float:
    """Bytes of an all-to-all buffer that are for others."""
    return size * peers / (peers + 1)


def _around_ring(size: int, peers: int) -> float:
    """Bytes that a rank sends in an all-reduce of a buffer."""
    return 2 * size * peers / (peers + 1)


def _all_to_all(group: Comm) -> Callable[[int], Callable[[], None]]:
    def prepare(size: int) -> Callable[[], None]:
        send = np.zeros(max(1, size // 8 // group.size) * group.size, np.int64)
        recv = np.empty_like(send)
        return lambda: group.all_to_all(send, recv).wait()

    return prepare


def _all_reduce(group: Comm) -> Callable[[int], Callable[[], None]]:
    def prepare(size: int) -> Callable[[], None]:
        buffer = np.zeros(max(1, size // 4), np.float32)
        return lambda: group.all_reduce(buffer).wait()

    return prepare


def _measure(
    comm: Comm,
    group: Comm,
    prepare: Callable[[int], Callable[[], None]],
    sent: Callable[[int, int], float],
    *,
    active: bool = True,
) -> Link:
    """Fit a start-up time and a rate to a small and a large run.

    Args:
        comm: all ranks, which take part at once.
        group: this rank's group.
        prepare: gives the collective for a buffer of so many bytes.
        sent: bytes that a rank sends of such a buffer, by number of peers.
        active: whether this rank's group runs; the others only wait.
    """
    peers = np.array([group.size - 1], np.int64)
    comm.all_reduce(peers, "max").wait()
    others = int(peers[0])
    if not others:
        return Link(1.0, 0.0)  # replaced by the other link's

    def seconds(size: int) -> float:
        return _seconds(comm, prepare(size) if active else _nothing)

    small = seconds(_SMALL_BYTES * (others + 1))
    size, large = _FIRST_LARGE_BYTES, 0.0
    while True:
        large = seconds(size)
        if large >= _LONG_ENOUGH_S or size >= _LAST_LARGE_BYTES:
            break
        size *= 4
    moved = sent(size, others)
    # Noise may make the large run look as short as the small one.
    return Link(moved / max(large - small, large / 10, 1e-9), small / others)


def _nothing() -> None:
    """What an idle rank does."""


def _seconds(comm: Comm, run: Callable[[], None]) -> float:
    """Median over the runs of the slowest rank's time; the same on every rank."""
    run()
    times = np.empty(_REPEATS)
    for repeat in range(_REPEATS):
        comm.barrier()
        begin = time.perf_counter()
        run()
        times[repeat] = time.perf_counter() - begin
    comm.all_reduce(times, "max").wait()
    return float(np.median(times))


def _measure_work(comm: Comm, device: Device) -> WorkRates:
    """Measure the ranks' own work, all at once: they share memory and cores."""
    rng = np.random.default_rng(0)
    table = np.ones((_WORK_ROWS, _WORK_DIM), np.float32)  # zeros would share one page of memory
    out = np.empty((_WORK_KEYS, 1, _WORK_DIM), np.float32)
    # Squared, so that small keys come often, as they do in data.
    keys = (len(table) * rng.random(_WORK_KEYS) ** 2).astype(np.int32)
    zero, no_offsets, no_weights = np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    layout = RowLayout(zero, zero, np.ones(1, np.bool_), zero, np.zeros((1, 1), np.int64), 0)
    slots, ids, destination = (np.empty(_WORK_KEYS, np.int32) for _ in range(3))

    def gather() -> None:
        gather_pool(
            table, zero, keys, no_offsets, no_weights, np.zeros(1, np.bool_), zero, len(keys), out, device=device
        )

    def deduplicate() -> None:
        route_keys(keys, no_offsets, len(keys), layout, slots, ids, destination, device=device)

    return WorkRates(out.nbytes / max(_seconds(comm, gather), 1e-9), _seconds(comm, deduplicate) / len(keys))
