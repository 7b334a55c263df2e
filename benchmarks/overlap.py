"""What running the two lanes beside each other gains: one rank of CPUs, two hosts on a slow link, any number of GPUs.

    python benchmarks/overlap.py [--rate 100mbit] [--pairs 10]
    python benchmarks/overlap.py --gpu 1 2 [--gpu-options --json FILE ...]

One rank on this machine's cores: the default setting (which picks the sequential schedule where it predicts no gain)
against no overlap. Two hosts (``tests/hosts/virtual_hosts.py``, which needs root), a rank and one thread each, their
cards shaped to ``--rate``: overlapped against sequential. Runs take turns; medians, their ratio, the lanes in
milliseconds a batch, and the overlap ratio (time saved / shorter lane) are printed. ``--trace FOLDER`` keeps Chrome
traces of overlapped runs. Last, one rank trains with an evaluation every 5 % of an epoch: how much of the run these
take. ``--gpu`` takes runs of so many GPUs instead (``overlap_gpu.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

from virtual_hosts import VirtualHosts, why_not  # noqa: E402

from pipeline.progress import read_records  # noqa: E402
from pipeline.trace import DENSE_LANE, EMBEDDING_LANE  # noqa: E402
from pipeline.writer import DatasetWriter, TableInfo  # noqa: E402
from service.launchers.mpi import engine_command, engine_environment, find_mpirun  # noqa: E402

NUM_TABLES, TABLE_ROWS, NUM_DENSE = 26, 20_000, 13


def write_data(folder: Path, train: int, test: int) -> None:
    """Random rows, one key a table."""
    rng = np.random.default_rng(0)
    tables = [TableInfo(name=f"C{i + 1}", rows=TABLE_ROWS) for i in range(NUM_TABLES)]
    names = [f"I{i + 1}" for i in range(NUM_DENSE)]
    with DatasetWriter(folder, name="overlap", dense_names=names, tables=tables) as writer:
        for split, rows in (("train", train), ("test", test)):
            keys = rng.integers(0, TABLE_ROWS, (rows, NUM_TABLES)).astype(np.int32)
            dense = rng.normal(size=(rows, NUM_DENSE)).astype(np.float32)
            writer.write(split, rng.integers(0, 2, rows), dense, keys)
        writer.finish()


def show(title: str, result: dict[str, Any], base: str, other: str) -> None:
    """Print one comparison."""
    seconds = result["seconds"]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [left / right for left, right in zip(seconds[base], seconds[other], strict=True)]
    lanes = {
        name: sum(ms for stage, ms in result["stages_ms"].items() if stage in stages)
        for name, stages in (("dense", DENSE_LANE), ("embedding", EMBEDDING_LANE))
    }
    per_batch = 1e3 * (medians[base] - medians[other]) / result["batches"]
    print(
        f"{title}: {base} {medians[base]:.3f} s, {other} {medians[other]:.3f} s: {medians[base] / medians[other]:.3f} x"
        f" (pairs {min(ratios):.3f} to {max(ratios):.3f}); lanes alone: dense {lanes['dense']:.1f} ms, embedding "
        f"{lanes['embedding']:.1f} ms a batch; saved {per_batch:.1f} ms, overlap ratio "
        f"{per_batch / min(lanes.values()):.2f}; same bits: {'yes' if result['equal'] else 'NO'}"
    )
    print(f"  default would choose: {json.dumps(result['default'])}")
    print(f"  stages, ms a batch: { {stage: round(ms, 1) for stage, ms in result['stages_ms'].items()} }")


def show_ratio(result: dict[str, Any], batch: int) -> None:
    """Print how fast an evaluated row is beside a trained one; both runs are the default's."""
    rates = {
        what: result[what]["batches"] * batch / statistics.median(result[what]["seconds"]["default"])
        for what in ("eval", "train")
    }
    print(
        f"evaluation {rates['eval']:,.0f} samples/s, metrics included, training {rates['train']:,.0f}: "
        f"{rates['eval'] / rates['train']:.2f} x"
    )


def show_schedule(folder: Path, options: argparse.Namespace) -> None:
    """A run that evaluates a set of 1/47 of its epoch (MLPerf's) every 5 % of it: what its time went into."""
    steps = 200
    data, directory = folder / "epoch", folder / "schedule"
    write_data(data, steps * options.batch, steps * options.batch // 47)
    config = {
        "data": {"path": str(data), "batch_size": options.batch, "shuffle": False},
        "model": {"embedding_dim": options.dim, "bottom_mlp": [*options.bottom, options.dim],
                  "top_mlp": [*options.top, 1]},
        "optimizer": {"kind": "sgd", "lr": 0.01},
        "train": {"eval_every": steps // 20, "progress_every": steps // 20},
        "eval": {"batch_size": options.batch, "split": "test"},
        "run": {"directory": str(directory)},
    }  # fmt: skip
    file = folder / "schedule.json"
    file.write_text(json.dumps(config))
    subprocess.run(engine_command(file, 1), env=engine_environment(os.environ), check=True, stdout=subprocess.DEVNULL)
    records = [record for record, _ in read_records(directory / "progress.jsonl")]
    # The first window compiles; the closing evaluation is not of the schedule.
    rates = [record["samples_per_s"] for record in records if record["type"] == "step"][1:]
    trained = sum(steps // 20 * options.batch / rate for rate in rates)
    found = [record for record in records if record["type"] == "eval"][:-1]
    forward = sum(record["seconds"] - record["scoring_seconds"] for record in found)
    waited = sum(record["waited_seconds"] for record in found)
    whole = trained + forward + waited
    evaluated = statistics.median(r["samples"] / (r["seconds"] - r["scoring_seconds"]) for r in found[1:])
    trained_rate = statistics.median(rates)
    print(
        f"in that run evaluation passes {evaluated:,.0f} samples/s, training {trained_rate:,.0f}: "
        f"{evaluated / trained_rate:.2f} x"
    )
    print(
        f"evaluation every 5 % of an epoch of {steps} batches, 1/47 of its rows: "
        f"{100 * (forward + waited) / whole:.2f} % of {whole:.2f} s are evaluation; scoring takes "
        f"{100 * sum(record['scoring_seconds'] for record in found) / whole:.2f} % beside the steps, of which training "
        f"waits for {100 * waited / whole:.3f} %"
    )


def run_gpus(ranks: int, options: list[str]) -> int:
    """Start ``overlap_gpu.py``, a rank for each GPU."""
    program = [sys.executable, *(["-m", "mpi4py"] if ranks > 1 else []), str(ROOT / "benchmarks" / "overlap_gpu.py")]
    launcher = find_mpirun().arguments(ranks) if ranks > 1 else []
    return subprocess.run([*launcher, *program, *options], env=engine_environment(os.environ), check=False).returncode


def main() -> int:
    """Run the comparisons that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", default="100mbit", help="of each host's card (tc's words)")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--only", choices=("rank", "hosts", "schedule"))
    parser.add_argument("--gpu", type=int, nargs="+", metavar="RANKS", help="GPUs of each run")
    parser.add_argument("--gpu-options", nargs=argparse.REMAINDER, default=[], help="handed to overlap_gpu.py; last")
    parser.add_argument("--what", nargs="+", choices=("eval", "train"), default=["eval", "train"])
    parser.add_argument("--batch", type=int, default=4096, help="rows of a global batch")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--bottom", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--top", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    if options.gpu:
        return max(run_gpus(ranks, options.gpu_options) for ranks in options.gpu)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_data(data, 6 * options.batch, 10 * options.batch)
        program = [sys.executable, "-m", "mpi4py", str(ROOT / "benchmarks" / "overlap_rank.py"), str(data)]
        shape = ["--batch", options.batch, "--dim", options.dim, "--depth", options.depth, "--pairs", options.pairs]
        program += [*map(str, shape), "--bottom", *map(str, options.bottom), "--top", *map(str, options.top)]
        program += ["--what", *options.what, *(["--trace"] if options.trace else [])]
        if options.only in {None, "rank"}:
            done = subprocess.run(
                [program[0], *program[3:], "--names", "sequential", "default"],
                env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            report(done, "one rank", "default", options)
        if options.only in {None, "schedule"}:
            show_schedule(Path(folder), options)
        if options.only in {None, "hosts"}:
            if reason := why_not():
                print(f"two hosts: not measured ({reason})")
                return 0
            with VirtualHosts(2) as hosts:
                hosts.shape(options.rate)
                done = hosts.run([1, 1], program, timeout=540, PYTHONPATH=str(ROOT), CROSSLANE_THREADS="1")
                report(done, f"two hosts, {options.rate}", "overlapped", options)
    return 0


def report(done: subprocess.CompletedProcess[str], title: str, other: str, options: argparse.Namespace) -> None:
    """Print what a run gave, and keep its traces."""
    if done.returncode:
        sys.exit(f"{title}: exit code {done.returncode}\n{done.stderr}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if result["ranks"] == 1 and set(options.what) == {"eval", "train"}:
        show_ratio(result, options.batch)
    for what in options.what:
        show(f"{title}, {result['threads']} threads a rank, {what}", result[what], "sequential", other)
        if options.trace:
            options.trace.mkdir(parents=True, exist_ok=True)
            path = options.trace / f"{what}-{result['ranks']}.json"
            path.write_text(json.dumps(result[what]["trace"]))
            print(f"  trace {path}: overlap ratio {result[what]['trace']['otherData']['overlap']['ratio']:.2f}")


if __name__ == "__main__":
    sys.exit(main())
