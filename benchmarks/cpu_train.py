"""Training speed on a CPU against a plain PyTorch DLRM of the same shapes and threads.

    python benchmarks/cpu_train.py --torch-python /path/to/python-with-torch

Every repetition of every engine is a process of its own (two thread pools in one process falsify both), and
the engines take turns, so that a busy minute of the machine meets all of them. Prints, per shape, best and median
samples/s, the ratio to the best peer, and the speed that the matrix products alone would allow in either BLAS.
How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
sys.path.insert(0, str(PEERS))

from shapes import SHAPES, Shape  # noqa: E402  the peers' folder is no package

OVERRIDES = (
    "OPENBLAS_CORETYPE",
    "NVPL_BLAS_DEBUG_CPU_TYPE",
    "NPY_DISABLE_CPU_FEATURES",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
)
"""Variables that force another instruction set than the processor's own, on one side of the comparison."""


def child_environment(threads: int) -> dict[str, str]:
    """This environment with the same threads for everyone and no forced instruction sets."""
    environment = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
    for name in ("CROSSLANE_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    environment["PYTHONPATH"] = str(HERE.parent)
    return environment


def run_child(command: list[str], environment: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """Run one repetition; its result, or ``{"error": why}``."""
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def commands(shape: str, options: argparse.Namespace) -> dict[str, list[str]]:
    """The program of every engine for a shape, by the engine's name."""
    timing = ["--warmup", str(options.warmup), "--seconds", str(options.seconds)]
    threads = ["--threads", str(options.threads)]
    found = {"crosslane": [sys.executable, str(PEERS / "crosslane_engine.py"), shape, *timing]}
    gemm = [str(PEERS / "gemm.py"), shape, *timing, *threads, "--library"]
    if options.torch_python:
        for variant in options.variants:
            peer = [options.torch_python, str(PEERS / "torch_dlrm.py"), shape, *timing, *threads]
            found[f"torch {variant}"] = [*peer, "--variant", variant]
    found["products numpy"] = [sys.executable, *gemm, "numpy"]
    if options.torch_python:
        found["products torch"] = [options.torch_python, *gemm, "torch"]
    return found


def measure(name: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All repetitions of one shape, the engines taking turns."""
    environment = child_environment(options.threads)
    programs = commands(name, options)
    results: dict[str, dict[str, Any]] = {engine: {"samples_per_s": []} for engine in programs}
    for repetition in range(options.repetitions):
        # Each round starts with another engine: nobody always follows the same neighbour.
        order = list(programs)
        order = order[repetition % len(order) :] + order[: repetition % len(order)]
        for engine in order:
            result = results[engine]
            if "error" in result:
                continue
            print(f"  {name}: repetition {repetition + 1}/{options.repetitions}, {engine}", file=sys.stderr)
            timed = run_child(programs[engine], environment, options.timeout)
            if "error" in timed:
                result["error"] = timed["error"]
                continue
            result["samples_per_s"].append(SHAPES[name].batch * timed["steps"] / timed["seconds"])
            result.update({key: timed[key] for key in ("version", "stages_ms") if key in timed})
    for result in results.values():
        if rates := result["samples_per_s"]:
            result["best"], result["median"] = max(rates), statistics.median(rates)
    return results


def compare(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Ratios of Crosslane to the best peer and to the products alone; empty where a side is missing."""
    ours = results["crosslane"]
    peers = [result for engine, result in results.items() if engine.startswith("torch ") and "best" in result]
    ratios: dict[str, float] = {}
    if "best" not in ours:
        return ratios
    if peers:
        for figure in ("best", "median"):
            ratios[f"to_best_peer_{figure}"] = ours[figure] / max(peer[figure] for peer in peers)
    for library in ("numpy", "torch"):
        ceiling = results.get(f"products {library}", {})
        if "best" in ceiling:
            ratios[f"to_products_{library}_best"] = ours["best"] / ceiling["best"]
    return ratios


def print_shape(name: str, shape: Shape, results: Mapping[str, Mapping[str, Any]]) -> None:
    """One shape as a table for people."""
    print(f"\n({name}) {shape.title}; {shape.flops() / 1e9:.2f} GFLOP of products a step")
    print(f"  {'':18} {'best':>10} {'median':>10}   samples/s")
    for engine, result in results.items():
        if "best" in result:
            suffix = ""
            if engine.startswith("products"):
                rate = shape.flops() * result["best"] / shape.batch / 1e9
                suffix = f"   {rate:.0f} GFLOP/s, {result['version']}"
            print(f"  {engine:18} {result['best']:10,.0f} {result['median']:10,.0f}{suffix}")
        if "error" in result:
            print(f"  {engine:18} left out: {result['error']}")
    for ratio, value in compare(results).items():
        print(f"  {ratio.replace('_', ' '):32} {value:6.2f}")
    if stages := results["crosslane"].get("stages_ms"):
        print("  stages, ms: " + ", ".join(f"{stage} {ms:.2f}" for stage, ms in stages.items()))


def find_torch(asked: str | None) -> tuple[str | None, str]:
    """The interpreter that has PyTorch, and what to say about it."""
    if asked:
        probe = [asked, "-c", "import torch; print(torch.__version__)"]
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"error: --torch-python {asked}: cannot import torch there; install it or leave the option out")
        return asked, f"torch {done.stdout.strip()}"
    if importlib.util.find_spec("torch"):
        return find_torch(sys.executable)
    return None, "no PyTorch here: the peer is left out; name an interpreter that has it with --torch-python"


def describe_machine(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": model,
        "cores": cores,
        "threads": threads,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"),
        "overrides_unset": [f"{name}={os.environ[name]}" for name in OVERRIDES if name in os.environ],
    }


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repetitions", type=int, default=5, help="of every engine, in turns (default 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured in each repetition (default 5)")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds before (default 2)")
    parser.add_argument("--threads", type=int, help="for everyone (default: the cores of this process)")
    parser.add_argument("--torch-python", help="interpreter that has PyTorch (default: this one, if it has)")
    parser.add_argument("--variants", nargs="+", choices=("eager", "compile"), default=["eager", "compile"])
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one repetition may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here, too")
    options = parser.parse_args()
    if options.repetitions < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--repetitions and --threads must be at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options.threads = options.threads or cores
    return options


def main() -> None:
    """Measure and print."""
    options = parse_options()
    options.torch_python, note = find_torch(options.torch_python)
    machine = describe_machine(options.threads)
    print(f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads each")
    print(f"{machine['system']}, Python {machine['python']}, {machine['date']}")
    print(f"load average at the start {machine['load_average_at_start']} (quiet is below 0.2); {note}")
    if machine["overrides_unset"]:
        print(f"unset for the engines: {', '.join(machine['overrides_unset'])}")
    record: dict[str, Any] = {"machine": machine, "shapes": {}}
    failed = False
    for name in options.shapes:
        results = measure(name, options)
        print_shape(name, SHAPES[name], results)
        record["shapes"][name] = {"title": SHAPES[name].title, "engines": results, "ratios": compare(results)}
        failed |= "error" in results["crosslane"]
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
