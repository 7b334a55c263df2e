"""Program of one rank on one of several hosts: nodes as MPI sees them, and both ways of exchange over real links.

Prints, on rank 0, one JSON line: hosts by node, messages and bytes between nodes of one exchange, seconds.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

from pipeline.threads import launched_ranks, settle_threads

settle_threads()
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ranks"))

import comm_cases  # noqa: E402
import numpy as np  # noqa: E402

from dlrm.device import HostDevice  # noqa: E402
from embedding.all_to_all import Flat, Hierarchical  # noqa: E402
from embedding.comm import Comm, all_gather_bytes  # noqa: E402
from embedding.comm_counting import CountingComm  # noqa: E402
from embedding.comm_mpi import world  # noqa: E402
from embedding.row_route import reduce_then_exchange  # noqa: E402
from embedding.topology import Topology, discover  # noqa: E402


def exchanges_agree(comm: Comm, topology: Topology, seed: int) -> None:
    """Flat and hierarchical bring the same rows bit for bit, and gradients with the same sums."""
    shared = np.random.default_rng(seed)
    rng = np.random.default_rng([seed, comm.rank])
    flat, hierarchical = Flat(comm), Hierarchical(comm, topology)
    for most in (0, 3, 2000):
        counts = shared.integers(0, most + 1, (comm.size, comm.size))
        going, coming = counts[comm.rank].tolist(), counts[:, comm.rank].tolist()
        send = rng.normal(size=(sum(going), 16)).astype(np.float32)
        found = [np.full((sum(coming), 16), np.nan, np.float32) for _ in range(2)]
        for exchange, recv in zip((flat, hierarchical), found, strict=True):
            exchange.all_to_all_v(send, going, recv, coming).wait()
        np.testing.assert_array_equal(*found)

        ids = rng.integers(0, 50, len(send))
        exact = rng.integers(-9, 9, send.shape).astype(np.float32)
        sums = np.zeros((2, 50, 16), np.float32)
        for exchange, total in zip((flat, hierarchical), sums, strict=True):
            np.add.at(total, *reduce_then_exchange(exchange, ids, exact, going, device=HostDevice(compiled=False)))
        np.testing.assert_array_equal(*sums)


def measure(comm: CountingComm, topology: Topology, rows: int) -> dict[str, list[float]]:
    """Messages and bytes between nodes, over all ranks, and seconds, of ``rows`` rows of 1 KiB to every rank."""
    result = {}
    counts = [rows] * comm.size
    send = np.ones((rows * comm.size, 256), np.float32)
    recv = np.empty_like(send)
    for exchange in (Flat(comm), Hierarchical(comm, topology)):
        comm.barrier()
        comm.traffic.clear()
        began = time.perf_counter()
        exchange.all_to_all_v(send, counts, recv, counts).wait()
        numbers = np.array([comm.traffic.messages_across, comm.traffic.bytes_across], np.float64)
        seconds = np.array([time.perf_counter() - began])
        comm.comm.all_reduce(numbers).wait()
        comm.comm.all_reduce(seconds, "max").wait()
        result[type(exchange).__name__] = [*numbers.tolist(), float(seconds[0])]
    return result


def main() -> None:
    seed, rows = int(sys.argv[1]), int(sys.argv[2])
    carrier = world(launched_ranks())
    for case in (comm_cases.all_to_all_v, comm_cases.all_reduce, comm_cases.broadcast):
        case(carrier, "float32")
    topology = discover(carrier)
    exchanges_agree(carrier, topology, seed)
    comm = CountingComm(carrier, topology.node_of)
    result: dict[str, object] = dict(measure(comm, discover(comm), rows))
    result["hosts"] = [part.decode() for part in all_gather_bytes(carrier, socket.gethostname().encode())]
    result["node_of"] = topology.node_of
    if carrier.rank == 0:
        print(json.dumps(result), flush=True)
    carrier.barrier()


if __name__ == "__main__":
    main()
