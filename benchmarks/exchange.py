"""The embedding lane over a slow link: what crosses between hosts in a step, and how long a step takes.

    python benchmarks/exchange.py --rates 1gbit 200mbit --batches 2048 8192 --exponents 1.1 0.9 --json figures.json

Makes hosts of network namespaces (root, Linux; `tests/hosts/virtual_hosts.py`), shapes their links to each rate in
turn, and runs every plan with both ways of exchange under one mpirun. How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

PLANS: dict[str, tuple[str | None, Any]] = {
    "table-wise": ("table_wise", False),
    "table-wise de-duplicated": ("table_wise", True),
    "row-wise de-duplicated": ("row_wise", True),
    "hybrid": ("hybrid", False),
    "hybrid de-duplicated": ("hybrid", True),
    "HugeCTR's threshold": ("hybrid", False),
    "auto": (None, "auto"),
}
"""What is forced for all tables: kind, and whether rows are de-duplicated."""


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; the ranks get the same one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="on each host")
    parser.add_argument("--rates", nargs="+", default=["1gbit", "none"], help="of a host's card, in tc's words")
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 8192], help="rows of a global batch")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS), metavar="PLAN")
    parser.add_argument("--exchanges", nargs="+", default=["flat", "hierarchical"], choices=["flat", "hierarchical"])
    parser.add_argument("--exponents", type=float, nargs="+", default=[1.1], help="of the keys' power laws")
    parser.add_argument("--scale", type=int, default=100, help="tables have MLPerf's rows divided by this")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dense", action="store_true", help="with the dense lane: bottom 13-64-dim, top 256-64-1")
    parser.add_argument("--rounds", type=int, default=1, help="more than 1: all plans take turns so many times")
    parser.add_argument("--steps", type=int, default=9, help="timed at most in a round; at least 3")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed steps that are enough in a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one rate")
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    parser.add_argument("--rank-output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def print_table(rate: str, results: list[dict[str, Any]]) -> None:
    """One line per plan and exchange."""
    print(f"\nlink {rate}\n")
    print(
        "| exponent, batch | plan | exchange | vectors MB | keys MB | messages across | MB across "
        "| lane ms, best (median) | step ms | predicted lane ms | frequent rows |"
    )
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for found in results:
        print(
            f"| {found['exponent']}, {found['batch']:,} | {found['plan']} | {found['exchange']} "
            f"| {found['vector_bytes'] / 1e6:.2f} | {found['key_bytes'] / 1e6:.2f} | {found['messages_across']:.0f} "
            f"| {found['bytes_across'] / 1e6:.2f} | {found['lane_best'] * 1e3:.1f} ({found['lane_median'] * 1e3:.1f}) "
            f"| {found['step_median'] * 1e3:.1f} | {found['predicted'] * 1e3:.1f} | {found['frequent_rows']:,} |"
        )


def print_verdicts(rate: str, results: list[dict[str, Any]]) -> None:
    """``auto`` against the best forced plan, and hybrid against the best other one, by medians of the lane."""
    for (exponent, batch), group in itertools.groupby(results, key=lambda found: (found["exponent"], found["batch"])):
        found = list(group)
        times = {(item["plan"], item["exchange"]): item["lane_median"] for item in found if item["plan"] != "auto"}
        rounds = {(item["plan"], item["exchange"]): item["lane_rounds"] for item in found}
        hybrid = {(item["plan"], item["exchange"]): item["lane_median"] for item in found if item["frequent_rows"]}
        others = {(item["plan"], item["exchange"]): item["lane_median"] for item in found if not item["frequent_rows"]}
        parts = [f"{rate}, exponent {exponent}, batch {batch:,}:"]
        if hybrid and others:
            ours, other = min(hybrid, key=hybrid.__getitem__), min(others, key=others.__getitem__)
            parts.append(f"{' '.join(ours)} is {others[other] / hybrid[ours]:.2f} times as fast as {' '.join(other)};")
            if len(rounds[ours]) > 1:
                # Of every round the best of either sort.
                best = [[min(own) for own in zip(*map(rounds.get, sort), strict=True)] for sort in (hybrid, others)]
                ratios = sorted(b / a for a, b in zip(*best, strict=True))
                parts.append(
                    f"round by round, the best of either sort: median {statistics.median(ratios):.2f} "
                    f"({', '.join(f'{ratio:.2f}' for ratio in ratios)});"
                )
        autos = [item for item in found if item["plan"] == "auto"]
        if autos and times:
            best = min(times, key=times.__getitem__)
            label = autos[0]["label"]
            parts.append(
                f"auto ({label}) takes {autos[0]['lane_median'] / times[best]:.2f} times as long as {' '.join(best)}"
            )
        print(" ".join(parts))


def main() -> int:
    """Make the hosts, run the ranks at every rate."""
    options = parse()
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
            program = [sys.executable, "-m", "mpi4py", str(HERE / "exchange_rank.py"), *sys.argv[1:]]
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
                said = (done.stderr or done.stdout)[-4000:]
                print(f"{said}exchange: rate {rate}: the ranks ended with code {done.returncode}", file=sys.stderr)
                return 1
            figures["rates"][rate] = json.loads(output.read_text())
            print_table(rate, figures["rates"][rate]["results"])
            print()
            print_verdicts(rate, figures["rates"][rate]["results"])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
