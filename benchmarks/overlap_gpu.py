"""One rank of ``overlap.py --gpu``: what running the lanes beside each other gains on GPUs.

    python benchmarks/overlap_gpu.py [--json FILE]                 # one GPU
    mpirun -np 2 python -m mpi4py benchmarks/overlap_gpu.py        # two

The product's evaluator and schedules, over rows that are made on the device, kept there, and evaluated again and again.
The whole evaluation (forward and exact metrics) in sequence and overlapped, and the same with look-up and interaction
as one kernel, on several GPUs for each placement of the tables; then training steps, with one kind of overlap after the
other switched on. Variants take turns; medians. ``--device cpu`` tries the program.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.threads import launched_ranks, settle_threads  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from embedding.comm import Comm
    from pipeline.engine import Engine
    from pipeline.stages import Outcome

THREADS = settle_threads()

import numpy as np  # noqa: E402

from dlrm.config import OverlapConfig, parse_run_config  # noqa: E402
from dlrm.errors import CrosslaneError  # noqa: E402
from embedding.comm import SingleComm  # noqa: E402
from pipeline.engine import build_engine  # noqa: E402
from pipeline.engine_cuda import fused_schedule  # noqa: E402
from pipeline.evaluator import Evaluator  # noqa: E402
from pipeline.feed import TrainingFeed  # noqa: E402
from pipeline.overlap import Schedule, choose  # noqa: E402
from pipeline.schedule import TRAIN_OVERLAPPED, TRAIN_SEQUENTIAL, Row, execute, ring_size, stream_names  # noqa: E402
from pipeline.stages import S  # noqa: E402
from pipeline.stages_cuda import Fused  # noqa: E402
from pipeline.trace import StageClock, Timeline, overlap_of  # noqa: E402

FULL_ROWS = 89_137_319
"""Of Criteo Terabyte's test day."""
FULL_TRAINING_ROWS = 4_195_197_692
SHAPES: dict[str, dict[str, Any]] = {
    "cuda": {"embedding_dim": 128, "bottom_mlp": [512, 256, 128], "top_mlp": [1024, 1024, 512, 256, 1]},
    "cpu": {"embedding_dim": 16, "bottom_mlp": [32, 16], "top_mlp": [64, 1]},
}
COPY, KEYS = {S.upload}, {S.input_dist}
EXCHANGE = {S.lookup, S.output_dist, S.sum_replicated, S.grad_dist, S.reduce_replicated, S.sparse_update}
STEPS: dict[str, set[S]] = {
    "upload ahead": COPY,
    "and keys ahead": COPY | KEYS,
    "and rows beside the dense lane": COPY | KEYS | EXCHANGE,
}
"""What is overlapped, one kind after the other; all of ``TRAIN_OVERLAPPED`` besides the dense sums in the last."""

FORMS = ("sequential", "overlapped", "fused", "fused, overlapped")
"""Of evaluations; the last one is what runs take."""
AS_RUNS = "as runs of several GPUs do"
"""Rows travel at the end of the step before."""


def build(options: argparse.Namespace, comm: Comm, placement: str, batch: int) -> Engine:
    """The model over its ranks; ``batch`` is one rank's share."""
    config = parse_run_config(
        {
            "data": {
                "path": f"synthetic:criteo-terabyte?rows={20 * options.rows}&exponent=1.1&cap={options.cap}",
                "batch_size": batch * comm.size, "drop_last": True, "shuffle": False,
            },
            "device": options.device,
            "precision": "fp16" if options.device == "cuda" else "fp32",
            "model": SHAPES[options.device],
            "embedding": {
                "placement": placement, "deduplicate": False, "trial_steps": 0,
                "exchange_precision": "fp16" if options.device == "cuda" and comm.size > 1 else "fp32",
                "calibration_batches": 4,
            },
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "eval": {"batch_size": options.eval_batch * comm.size, "split": "test"},
            "overlap": {"train": "always", "eval": "always", "depth": options.depth},
        }
    )  # fmt: skip
    return build_engine(config, comm=comm, threads=THREADS)


def evaluators(engine: Engine, options: argparse.Namespace) -> dict[str, Evaluator]:
    """By name, over one copy of the rows."""
    sequential, overlapped = (
        choose(OverlapConfig(eval=wish, depth=options.depth), "eval", None) for wish in (False, "always")
    )
    wanted: dict[str, tuple[Schedule, bool]] = {
        "sequential": (sequential, False),
        "overlapped": (overlapped, False),
    }
    stages: Any = engine.stages
    embedding: Any = engine.embedding
    fuses = getattr(stages, "fused", Fused()).eval
    if fuses:
        for name, schedule in (("fused", sequential), ("fused, overlapped", overlapped)):
            wanted[name] = (fused_schedule(schedule) if engine.comm.size == 1 else schedule, True)
    split, found = engine.dataset.split("test"), {}
    for name, (schedule, fused) in wanted.items():
        if fuses:  # a Flight keeps what it was made for
            stages.fused, embedding.listed_forward = replace(stages.fused, eval=fused), fused
        found[name] = Evaluator(replace(engine, eval_schedule=schedule), split, "test")
    first = found["sequential"]
    for other in found.values():
        other.share_rows(first)
    return found


def evaluation(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every variant's forward pass and scoring, stages and lanes in milliseconds a batch."""
    comm, device = engine.comm, engine.device
    found = evaluators(engine, options)
    forward: dict[str, list[float]] = {name: [] for name in found}
    scoring: dict[str, list[float]] = {name: [] for name in found}
    metrics: dict[str, set[str]] = {name: set() for name in found}
    for turn in range(options.turns + 1):
        for name in list(found) if turn % 2 else list(found)[::-1]:
            comm.barrier()
            start = time.perf_counter()
            found[name].forward()
            device.record().synchronize()
            comm.barrier()
            middle = time.perf_counter()
            result = found[name].score(comm, engine.carrier)
            comm.barrier()
            metrics[name].add(json.dumps(result.metrics.to_values(), sort_keys=True))
            if turn:  # the first turn reads the rows, compiles and captures
                forward[name].append(middle - start)
                scoring[name].append(time.perf_counter() - middle)
    if engine.stages.counts().get("overflows"):
        sys.exit("overlap_gpu: an exchange ran over, and forms were made anew as the last one")
    batches = -(-found["sequential"].split.rows // found["sequential"].batch_size)
    values: dict[str, Any] = {"rows": found["sequential"].split.rows, "batches": batches}
    values["equal"] = {name: seen == metrics["sequential"] and len(seen) == 1 for name, seen in metrics.items()}
    values["auc"] = json.loads(min(metrics["sequential"]))["auc"]
    for name, evaluator in found.items():
        values[name] = {
            "forward_s": statistics.median(forward[name]), "scoring_s": statistics.median(scoring[name]),
            **looked_at(engine, evaluator, batches),
        }  # fmt: skip
    return values


def looked_at(engine: Engine, evaluator: Evaluator, batches: int) -> dict[str, Any]:
    """Stages and lanes of some batches, issued one by one: milliseconds a batch."""
    ticks = range(min(8, batches - 2), min(24, batches - 1))
    timeline = Timeline(engine.device, ticks, 1)
    clock = StageClock(engine.device, timeline)
    engine.comm.barrier()
    timeline.start()
    evaluator.forward(clock=clock)
    engine.device.record().synchronize()
    lanes = overlap_of(timeline.runs())
    each = {name: value and value / (1 if name == "ratio" else len(ticks)) for name, value in lanes.items()}
    return {"stages_ms": clock.take_ms(), "lanes": each}


def train_variants(engine: Engine) -> Iterator[tuple[str, tuple[Row, ...]]]:
    """Schedules with one kind of overlap after the other, and of several ranks that of a run.

    Of several ranks none that sends keys and rows from two streams, whose order no two ranks would share.
    """
    ranks = engine.comm.size
    yield "sequential", TRAIN_SEQUENTIAL
    for name, chosen in list(STEPS.items())[:-1]:
        if ranks > 1 and S.input_dist in chosen:
            continue
        rows = {row.stage: row for row in TRAIN_OVERLAPPED}
        yield name, tuple(rows[stage] if stage in chosen else Row(stage, "main") for stage in S)
    yield list(STEPS)[-1], TRAIN_OVERLAPPED
    if ranks > 1:
        yield AS_RUNS, engine.train_schedule.rows


def training(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of every variant, each with its stages in milliseconds."""
    variants = dict(train_variants(engine))
    feed = TrainingFeed(engine, engine.dataset.split("train"))
    rings = {
        name: [engine.stages.flight(engine.config.data.batch_size, training=True) for _ in range(ring_size(rows))]
        for name, rows in variants.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(options.turns + 1):
        for name in list(variants) if turn % 2 else list(variants)[::-1]:
            took = steps(engine, feed, variants[name], rings[name], options.steps)
            if turn:
                seconds[name].append(took)
    result: dict[str, Any] = {"batch": engine.config.data.batch_size}
    for name, rows in variants.items():
        timeline = Timeline(engine.device, range(20, 28), 1)
        clock = StageClock(engine.device, timeline)
        steps(engine, feed, rows, rings[name], 32, clock)
        result[name] = {
            "step_s": statistics.median(seconds[name]), "streams": stream_names(rows), "stages_ms": clock.take_ms(),
            "lanes": {key: value and value / (1 if key == "ratio" else 8)
                      for key, value in overlap_of(timeline.runs()).items()},
        }  # fmt: skip
    return result


def steps(
    engine: Engine,
    feed: TrainingFeed,
    rows: Sequence[Row],
    ring: Sequence[Any],
    count: int,
    clock: StageClock | None = None,
) -> float:
    """Seconds a step; losses are looked at behind the steps, as the trainer does.

    The first steps are left out, and the last ones, which drain the ring: they are issued where others are replayed.
    """
    cold = 2 * len(ring)
    issued: deque[Outcome] = deque()
    start = end = 0.0
    with feed.batches(start_step=0, stop_step=cold + count + len(ring)) as batches:
        run = execute(rows, stages=engine.stages, ring=ring, batches=batches, device=engine.device, clock=clock)
        for done, flight in enumerate(run, 1):
            issued.append(engine.stages.outcome(flight))
            ends = done in {cold, cold + count}
            while len(issued) > (0 if ends else engine.device.steps_behind):
                check(issued.popleft().loss())
            if ends:
                start, end = end, time.perf_counter()
        while issued:
            check(issued.popleft().loss())
        return (end - start) / count


def check(loss: float) -> None:
    """A run that has lost its way measures nothing."""
    if not np.isfinite(loss):
        sys.exit(f"overlap_gpu: loss is {loss}")


def main() -> None:
    """Measure; rank 0 prints, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, default=FULL_ROWS, help="rows of the evaluation")
    parser.add_argument("--cap", type=int, default=4_000_000, help="most rows of a table")
    parser.add_argument("--eval-batch", type=int, default=65_536, help="rows of one rank's share")
    parser.add_argument("--batches", type=int, nargs="+", default=[65_536, 6_912], help="the same, in training")
    parser.add_argument("--placements", nargs="+", default=["table_wise", "auto", "hybrid"])
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ranks = launched_ranks()
    comm: Comm = SingleComm()
    if ranks > 1:
        from embedding.comm_mpi import world

        comm = world(ranks)
    results: dict[str, Any] = {"ranks": comm.size, "device": options.device}
    for placement in options.placements if comm.size > 1 else ["auto"]:
        measure(options, comm, placement, results)
        gc.collect()
    if ranks > 1:
        from embedding.comm_mpi import finalize

        comm.barrier()
        finalize()


def measure(options: argparse.Namespace, comm: Comm, placement: str, results: dict[str, Any]) -> None:
    """One placement of the tables; what fails is told, and the next goes on."""
    title = f"{comm.size} GPU(s), {placement}"
    try:
        batches = options.batches if comm.size == 1 else options.batches[:1]
        for number, batch in enumerate(batches):
            engine = build(options, comm, placement, batch)
            if not number:
                results[f"evaluation, {title}"] = found = evaluation(engine, options)
                show_evaluation(comm, title, found)
            if comm.size == 1 or placement == options.placements[0]:
                results[f"training, {title}, {batch}"] = found = training(engine, options)
                show_training(comm, f"{title}, {batch:,} a GPU", found)
                show_shares(comm, results, title, found)
            engine.close()
            del engine
            gc.collect()
            if options.json and comm.rank == 0:
                options.json.write_text(json.dumps(results, indent=1))
    except CrosslaneError as error:
        if comm.size > 1:
            sys.exit(f"{title}: {error}")  # the ranks may have come apart
        print(f"{title}: {error}")


def show_evaluation(comm: Comm, title: str, values: dict[str, Any]) -> None:
    """Print one."""
    if comm.rank:
        return
    print(f"evaluation, {title}: {values['rows']:,} rows, {values['batches']} batches, AUC {values['auc']:.6f}")
    base = values["sequential"]["forward_s"]
    for name in FORMS:
        if name not in values:
            continue
        own = values[name]
        rate = values["rows"] / own["forward_s"] / 1e6
        print(
            f"  {name}: {own['forward_s'] + own['scoring_s']:.3f} s = forward {own['forward_s']:.3f} s "
            f"({rate:.2f} M samples/s, {base / own['forward_s']:.3f} x sequential) + scoring {own['scoring_s']:.3f} s; "
            f"metrics as sequential: {'same bits' if values['equal'][name] else 'DIFFERENT BITS'}"
        )
        print(f"    stages, ms: { {stage: round(ms, 3) for stage, ms in own['stages_ms'].items()} }")
    for together, apart in (("overlapped", "sequential"), ("fused, overlapped", "fused")):
        if together not in values:
            continue
        alone, took = values[apart]["lanes"], values[apart]["forward_s"]
        saved = 1e3 * (took - values[together]["forward_s"]) / values["batches"]
        shorter = min(alone["dense_ms"], alone["embedding_ms"])
        print(
            f"  lanes of '{apart}', ms a batch: dense {alone['dense_ms']:.3f}, embedding {alone['embedding_ms']:.3f}; "
            f"'{together}' saves {saved:.3f}, {took / values[together]['forward_s']:.3f} times as fast, overlap ratio "
            f"{saved / shorter if shorter else float('nan'):.2f}"
        )
    print(flush=True)


def show_training(comm: Comm, title: str, values: dict[str, Any]) -> None:
    """Print one."""
    if comm.rank:
        return
    print(f"training, {title}:")
    base = values["sequential"]["step_s"]
    for name in ("sequential", *STEPS, AS_RUNS):
        if name not in values:
            continue
        own = values[name]
        print(
            f"  {name}: {1e3 * own['step_s']:.3f} ms a step, {values['batch'] / own['step_s'] / 1e6:.2f} M samples/s, "
            f"{base / own['step_s']:.3f} x sequential; both lanes at work {own['lanes']['both_ms']:.3f} ms"
        )
        print(f"    stages, ms: { {stage: round(ms, 3) for stage, ms in own['stages_ms'].items()} }")
    print(flush=True)


def show_shares(comm: Comm, results: dict[str, Any], title: str, values: dict[str, Any]) -> None:
    """Print how evaluation stands to training, by the faster form of each."""
    if comm.rank:
        return
    found = results[f"evaluation, {title}"]
    forms = [found[name] for name in FORMS if name in found]
    forward = min(form["forward_s"] for form in forms)
    step = min(values[name]["step_s"] for name in ("sequential", *STEPS, AS_RUNS) if name in values)
    rate, training_rate = found["rows"] / forward, values["batch"] / step
    between = 0.05 * FULL_TRAINING_ROWS / training_rate
    whole = FULL_ROWS / rate
    print(
        f"  evaluation {rate / training_rate:.2f} times as fast as training a row; with the full set every 5 % of an "
        f"epoch, by these rates, {100 * whole / (whole + between):.1f} % of the run is evaluation "
        f"({whole:.2f} s every {between:.2f} s), scoring that is not hidden would be "
        f"{100 * min(form['scoring_s'] for form in forms) / (whole + between):.2f} %"
    )
    print(flush=True)


if __name__ == "__main__":
    main()
