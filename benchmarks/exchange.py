"""The embedding lane over a slow link: what crosses between hosts in a step, and how long a step takes.

    python benchmarks/exchange.py --rates 1gbit 200mbit none --batches 2048 8192 --json figures.json

Makes hosts of network namespaces (root, Linux; `tests/hosts/virtual_hosts.py`), shapes their links to each rate in
turn, and runs every plan with both ways of exchange under one mpirun. How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

MLPERF_ROWS = (
    *(39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10),
    *(2208, 11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36),
)
"""Criteo 1TB with at most 40 million rows a table, as in MLPerf Training."""

PLANS = {
    "table-wise": ("table_wise", False),
    "table-wise de-duplicated": ("table_wise", True),
    "row-wise de-duplicated": ("row_wise", True),
    "hybrid": ("hybrid", False),
    "hybrid de-duplicated": ("hybrid", True),
    "auto": (None, "auto"),
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; the ranks get the same one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="on each host")
    parser.add_argument("--rates", nargs="+", default=["1gbit", "none"], help="of a host's card, in tc's words")
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 8192], help="rows of a global batch")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS), metavar="PLAN")
    parser.add_argument("--exponent", type=float, default=1.1, help="of the power law that keys are drawn from")
    parser.add_argument("--scale", type=int, default=100, help="tables have MLPerf's rows divided by this")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one rate")
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    parser.add_argument("--rank-output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def measure_rank(options: argparse.Namespace) -> None:
    """Program of one rank: every plan and exchange, on batches that are the same for all of them."""
    from pipeline.threads import launched_ranks, settle_threads

    settle_threads()
    from embedding.comm_counting import CountingComm
    from embedding.comm_mpi import world
    from embedding.links import probe
    from embedding.placement import TableSpec
    from embedding.topology import discover

    carrier = world(launched_ranks())
    topology = discover(carrier)
    comm = CountingComm(carrier, topology.node_of)
    counted = discover(comm)
    specs = tuple(
        TableSpec(name=f"t{i}", rows=max(1, rows // options.scale), dim=options.dim)
        for i, rows in enumerate(MLPERF_ROWS)
    )
    links = probe(carrier, topology)
    results = []
    for batch in options.batches:
        keys = draw_batches(specs, batch, options, carrier.rank, carrier.size)
        for name in options.plans:
            modes = ("auto",) if name == "auto" else ("flat", "hierarchical")
            for mode in modes if name != "table-wise" else ("flat",):  # pooled vectors travel flat
                found = run_plan(specs, name, mode, batch, keys, comm, counted, links, options)
                results.append({"plan": name, "batch": batch, **found})
    if carrier.rank == 0:
        options.rank_output.write_text(json.dumps({"links": links.to_values(), "results": results}))
    carrier.barrier()


def draw_batches(specs: Any, batch: int, options: argparse.Namespace, rank: int, ranks: int) -> list[Any]:
    """This rank's share of three batches, keys by a power law over the rows of each table."""
    import numpy as np

    from embedding.jagged import Jagged
    from embedding.topology import share_of

    rng = np.random.default_rng([options.seed, batch, rank])
    rows = share_of(batch, ranks, rank)
    sums = [np.cumsum(np.arange(1, spec.rows + 1) ** -options.exponent) for spec in specs]
    drawn = []
    for _ in range(3):
        keys = [np.searchsorted(total, rng.random(rows) * total[-1]).clip(max=len(total) - 1) for total in sums]
        drawn.append(Jagged(np.concatenate(keys).astype(np.int32), None, None, len(specs), rows))
    return drawn


def run_plan(
    specs: Any, name: str, mode: str, batch: int, keys: list[Any], comm: Any, topology: Any, links: Any, options: Any
) -> dict[str, Any]:
    """Traffic of all ranks and seconds of the slowest, per step; the first two steps are left out."""
    import numpy as np

    from dlrm.config import OptimizerConfig
    from dlrm.device import HostDevice
    from embedding.all_to_all import Flat, Hierarchical
    from embedding.frequency import Frequency
    from embedding.hybrid import HybridEmbedding
    from embedding.plan import Forced, make_plan, plan_on_first_rank

    kind, deduplicate = PLANS[name]
    rules = {spec.name: Forced(kind=kind) for spec in specs if kind != "hybrid" or spec.rows > 1}
    optimizer = OptimizerConfig(kind="sgd")
    plan = plan_on_first_rank(
        comm.comm,
        lambda: make_plan(
            specs,
            comm.size,
            topology.num_nodes,
            batch_size=batch,
            optimizer=optimizer,
            placements=rules if kind else None,
            frequencies={spec.name: Frequency.power_law(spec.rows, options.exponent) for spec in specs},
            links=links,
            deduplicate=deduplicate,  # type: ignore[arg-type]
            all_to_all=mode,  # type: ignore[arg-type]
        ),
    )
    staged = plan.all_to_all == "hierarchical"
    embedding = HybridEmbedding(
        specs=specs,
        plan=plan,
        comm=comm,
        device=HostDevice(1),
        optimizer=optimizer,
        dtype="float32",
        seed=options.seed,
        first=0,
        all_to_all=Hierarchical(comm, topology) if staged else Flat(comm),
    )
    rows = keys[0].num_rows
    vectors = np.zeros((rows, len(specs), options.dim), np.float32)
    gradients = np.full_like(vectors, 1e-6)
    buffers = embedding.buffers(rows, vectors, gradients)
    seconds, traffic = [], []
    for step in range(1, options.steps + 3):
        comm.comm.barrier()
        comm.traffic.clear()
        began = time.perf_counter()
        embedding.input_dist(keys[step % len(keys)], buffers, batch)
        embedding.lookup(buffers)
        embedding.output_dist(buffers)
        embedding.grad_dist(buffers)
        embedding.sparse_update(buffers, 0.01, step)
        slowest = np.array([time.perf_counter() - began])
        comm.comm.all_reduce(slowest, "max").wait()
        sent = comm.traffic
        numbers = np.array([sent.messages_across, sent.bytes_across, sent.messages_inside, sent.bytes_inside])
        comm.comm.all_reduce(numbers).wait()
        seconds.append(float(slowest[0]))
        traffic.append(numbers)
    mean = np.mean(traffic[2:], axis=0).tolist()
    return {
        "exchange": plan.all_to_all,
        "messages_across": mean[0],
        "bytes_across": mean[1],
        "messages_inside": mean[2],
        "bytes_inside": mean[3],
        "seconds_best": min(seconds[2:]),
        "seconds_median": statistics.median(seconds[2:]),
        "predicted_seconds": plan.step_seconds,
        "frequent_rows": sum(placement.threshold for placement in plan.placements),
    }


def print_table(rate: str, results: list[dict[str, Any]]) -> None:
    """One line per plan and exchange."""
    print(f"\nlink {rate}\n")
    print("| batch | plan | exchange | messages across | MB across | MB inside | ms best | ms median | predicted |")
    print("| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for found in results:
        print(
            f"| {found['batch']:,} | {found['plan']} | {found['exchange']} | {found['messages_across']:.0f} "
            f"| {found['bytes_across'] / 1e6:.2f} | {found['bytes_inside'] / 1e6:.2f} "
            f"| {found['seconds_best'] * 1e3:.1f} | {found['seconds_median'] * 1e3:.1f} "
            f"| {found['predicted_seconds'] * 1e3:.1f} |"
        )


def main() -> int:
    """Make the hosts, run the ranks at every rate."""
    options = parse()
    if options.rank_output:
        measure_rank(options)
        return 0
    from virtual_hosts import VirtualHosts, why_not

    reason = why_not()
    if reason:
        print(f"exchange: {reason}", file=sys.stderr)
        return 2
    figures: dict[str, Any] = {"load_average": os.getloadavg()[0], "cores": os.cpu_count(), "rates": {}}
    print(f"{options.hosts} hosts x {options.ranks} ranks on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder, VirtualHosts(options.hosts) as hosts:
        output = Path(folder) / "figures.json"
        for rate in options.rates:
            hosts.shape(None if rate == "none" else rate)
            program = [sys.executable, "-m", "mpi4py", str(HERE / "exchange.py"), *sys.argv[1:]]
            environment = {"PYTHONPATH": str(ROOT), "CROSSLANE_THREADS": "1"}
            ranks = [options.ranks] * options.hosts
            try:
                done = hosts.run(
                    ranks, [*program, "--rank-output", str(output)], timeout=options.timeout, **environment
                )
            except subprocess.TimeoutExpired:
                print(f"exchange: rate {rate}: took longer than {options.timeout:.0f} s", file=sys.stderr)
                return 1
            if done.returncode:
                print(done.stderr[-4000:], file=sys.stderr)
                return 1
            figures["rates"][rate] = json.loads(output.read_text())
            print_table(rate, figures["rates"][rate]["results"])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
