"""How fast ranks reach each other, inside a node and between nodes: measured by short probes, or given.

A rate is what one rank sends to others while all ranks of its group send as much. A latency is the time of one
message to one peer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dlrm.device import Device, HostDevice
from dlrm.errors import ConfigError
from embedding.all_reduce import add_parts, part_multiple
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
        latency_s: of a message to a peer; all-reduce: of each of 2 ceil(log2 n) rounds among n ranks.
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

    Each is run small and large a few times, in the shape in which a step sends: all ranks at once, each to all others
    inside its node or outside of it, so that the ranks of a node share its way out. The time of the slowest rank
    counts, the median of the runs. A link that is not there (one node, one rank a node) takes the figures of the
    other. Takes about a second where links are faster than 100 MB/s.

    Args:
        comm: all ranks.
        topology: their nodes, found from ``comm``.
        device: what gathers rows; ``None``: one thread of the CPU.
    """
    if comm.size == 1:
        return replace(
            DEFAULT, work=_measure_work(comm, device or HostDevice(1)), source="one rank: nothing to measure"
        )
    sizes = np.bincount(np.asarray(topology.node_of))
    two_levels = part_multiple(topology.node_of) > 1
    measured: dict[str, Link] = {}
    for name, group, there in (
        ("inside", topology.inside, sizes.max() > 1),
        ("across", topology.across, len(sizes) > 1),
    ):
        if not there:
            continue
        same = name == "inside"
        peers = [r for r, node in enumerate(topology.node_of) if (node == topology.node) == same and r != comm.rank]
        most = int(sizes.max()) - 1 if same else comm.size - int(sizes.min())
        measured[name] = _measure(comm, _all_to_all(comm, peers, most), starts=most)
        if group.size < comm.size and not two_levels:
            group = comm  # one all-reduce over everything
        ranks = int(sizes.max()) if same else len(sizes)
        reduce = _in_parts(group) if two_levels else _all_reduce(group)
        measured[f"{name}_reduce"] = _measure(comm, reduce, starts=2 * math.ceil(math.log2(max(2, ranks))))
    for name, other in (("inside", "across"), ("across", "inside")):
        if name not in measured:
            measured[name], measured[f"{name}_reduce"] = measured[other], measured[f"{other}_reduce"]
    shared = False
    if sizes.min() > 1 and len(sizes) > 1:
        others = [r for r, node in enumerate(topology.node_of) if node != topology.node and not topology.local_of[r]]
        peers = others if topology.local_rank == 0 else []
        alone = _measure(comm, _all_to_all(comm, peers, len(sizes) - 1), starts=1)
        shared = alone.bytes_per_s > _SHARED_FROM * measured["across"].bytes_per_s
    return LinkRates(
        **measured, work=_measure_work(comm, device or HostDevice(1)), across_shared=shared, source="measured"
    )


Prepare = Callable[[int], tuple[Callable[[], None], float]]
"""Of so many bytes: what runs a collective, and the bytes that a rank sends in it."""


def _all_to_all(comm: Comm, peers: Sequence[int], most: int) -> Prepare:
    """Between this rank and ``peers``; ``most``: peers of the rank that has most of them."""

    def prepare(size: int) -> tuple[Callable[[], None], float]:
        each = max(1, size // 4 // most)
        counts = [each * (rank in peers) for rank in range(comm.size)]
        send, recv = (np.zeros(sum(counts), np.float32) for _ in range(2))
        return lambda: comm.all_to_all_v(send, counts, recv, counts).wait(), 4.0 * each * most

    return prepare


def _in_parts(group: Comm) -> Prepare:
    """What ``all_reduce.TwoLevel`` does on one level: parts go around, and come back summed."""

    def prepare(size: int) -> tuple[Callable[[], None], float]:
        buffer = np.zeros(group.size * max(1, size // 4 // group.size), np.float32)
        parts = np.empty_like(buffer)

        def run() -> None:
            group.all_to_all(buffer, parts).wait()
            group.all_gather(add_parts(parts, group.size), buffer).wait()

        return run, 2 * buffer.nbytes * (group.size - 1) / group.size

    return prepare


def _all_reduce(group: Comm) -> Prepare:
    def prepare(size: int) -> tuple[Callable[[], None], float]:
        buffer = np.zeros(max(1, size // 4), np.float32)
        return lambda: group.all_reduce(buffer).wait(), 2 * buffer.nbytes * (group.size - 1) / group.size

    return prepare


def _measure(comm: Comm, prepare: Prepare, *, starts: int) -> Link:
    """Fit a start-up time and a rate to a small and a large run.

    Args:
        comm: all ranks, which take part at once.
        prepare: the collective; a rank without peers only takes part in the timing.
        starts: start-ups of a message that the small run's time is made of.
    """
    small = median_seconds(comm, prepare(_SMALL_BYTES)[0])
    size = _FIRST_LARGE_BYTES
    while True:
        run, moved = prepare(size)
        large = median_seconds(comm, run)
        if large >= _LONG_ENOUGH_S or size >= _LAST_LARGE_BYTES:
            break
        size *= 4
    # Noise may make the large run look as short as the small one.
    return Link(moved / max(large - small, large / 10, 1e-9), small / starts)


def median_seconds(comm: Comm, run: Callable[[], None]) -> float:
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
    # Half of the keys are among the first 2,000 rows, about as in data that follows a power law: caches help.
    keys = (len(table) * rng.random(_WORK_KEYS) ** 6).astype(np.int32)
    zero, no_offsets, no_weights = np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    layout = RowLayout(zero, zero, np.ones(1, np.bool_), zero, np.zeros((1, 1), np.int64), 0)
    slots, ids, destination = (np.empty(_WORK_KEYS, np.int32) for _ in range(3))

    def gather() -> None:
        gather_pool(
            table, zero, keys, no_offsets, no_weights, np.zeros(1, np.bool_), zero, len(keys), out, device=device
        )

    def deduplicate() -> None:
        route_keys(keys, no_offsets, len(keys), layout, slots, ids, destination, device=device)

    return WorkRates(
        out.nbytes / max(median_seconds(comm, gather), 1e-9), median_seconds(comm, deduplicate) / len(keys)
    )
