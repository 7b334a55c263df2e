"""One rank of ``overlap.py``: evaluation and training, sequential and overlapped by turns, on one model and its data.

Prints a line of JSON on rank 0: seconds of every run, mean milliseconds of every stage alone, and whether the two
schedules gave the same bits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.threads import launched_ranks, settle_threads

if TYPE_CHECKING:
    from pipeline.engine import Engine
    from pipeline.loader import LoadedBatch
    from pipeline.overlap import Schedule

THREADS = settle_threads()

import numpy as np  # noqa: E402

from dlrm.config import OverlapConfig, parse_run_config  # noqa: E402
from embedding.comm_mpi import finalize, world  # noqa: E402
from pipeline.engine import build_engine  # noqa: E402
from pipeline.evaluator import Evaluator  # noqa: E402
from pipeline.flight import Flight  # noqa: E402
from pipeline.loader import Loader  # noqa: E402
from pipeline.overlap import choose, no_gain_on_host  # noqa: E402
from pipeline.schedule import execute, ring_size  # noqa: E402
from pipeline.trace import StageClock, Timeline, chrome_trace, gather_runs  # noqa: E402

STEPS = 6


def schedules(engine: Engine, what: str, depth: int) -> dict[str, Schedule]:
    """By name: without overlap, as a run would choose by default, and overlapped whatever is predicted."""
    no_gain = no_gain_on_host(engine.comm.size, engine.topology.num_nodes)
    wishes: dict[str, Any] = {"sequential": False, "default": True, "overlapped": "always"}
    return {
        name: choose(OverlapConfig(train=wish, eval=wish, depth=depth), what, no_gain)  # type: ignore[arg-type]
        for name, wish in wishes.items()
    }


def timed(engine: Engine, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the last rank is done, and what ``run`` returned."""
    engine.comm.barrier()
    start = time.perf_counter()
    result = run()
    engine.comm.barrier()
    return time.perf_counter() - start, result


def evaluations(engine: Engine, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The whole evaluation, metrics included, of the split ``test``."""
    found = schedules(engine, "eval", options.depth)
    evaluators = {
        name: Evaluator(replace(engine, eval_schedule=found[name]), engine.dataset.split("test"), "test")
        for name in names
    }
    clock = StageClock(engine.device)
    evaluators["sequential"].run(clock=clock)  # compiles, and fills the cache
    clock.take_ms()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    bits = set()
    for turn in range(options.pairs + 1):
        for name in names if turn % 2 else names[::-1]:
            measured = clock if name == "sequential" and turn else None
            took, evaluation = timed(engine, lambda name=name, clock=measured: evaluators[name].run(clock=clock))
            bits.add(json.dumps(evaluation.metrics.to_values(), sort_keys=True))
            if turn:  # the first turn warms up
                seconds[name].append(took)
    batches = -(-engine.dataset.split("test").rows // options.batch)
    stages_ms = clock.take_ms()
    return {"seconds": seconds, "stages_ms": stages_ms, "equal": len(bits) == 1, "batches": batches}


def trainings(engine: Engine, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """So many steps from the same weights each time."""
    found = schedules(engine, "train", options.depth)
    batches = read(engine, options.batch)
    arrays = [engine.model.flat_parameters, *(shard.weight for shard in engine.embedding.shards())]
    start = [array.copy() for array in arrays]
    rings = {
        name: [
            Flight.allocate(
                -(-options.batch // engine.comm.size),
                model=engine.model, embedding=engine.embedding, device=engine.device, training=True,
            )
            for _ in range(ring_size(found[name].rows))
        ]
        for name in names
    }  # fmt: skip
    clock = StageClock(engine.device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    equal = True
    ends: list[Any] = []
    for turn in range(options.pairs + 1):
        for name in names if turn % 2 else names[::-1]:
            for array, saved in zip(arrays, start, strict=True):
                array[...] = saved
            measured = clock if name == "sequential" and turn else None
            took, _ = timed(engine, lambda name=name, c=measured: steps(engine, found[name], rings[name], batches, c))
            if turn:
                seconds[name].append(took)
            ends = ends or [array.copy() for array in arrays]
            equal &= all(np.array_equal(array, end) for array, end in zip(arrays, ends, strict=True))
    everywhere = np.array([equal], np.int64)
    engine.comm.all_reduce(everywhere, "min").wait()
    return {
        "seconds": seconds,
        "stages_ms": clock.take_ms(),
        "equal": bool(everywhere[0]),
        "batches": STEPS,
    }


def read(engine: Engine, batch: int) -> list[LoadedBatch]:
    """The batches of a run of training steps, in memory."""
    comm = engine.comm
    with Loader(
        engine.dataset.split("train"), batch_size=batch, rank=comm.rank, ranks=comm.size, seed=1, shuffle=False,
        window=batch, drop_last=True, prefetch=2, epochs=1, stop_step=STEPS,
    ) as loader:  # fmt: skip
        return list(loader)


def steps(
    engine: Engine, schedule: Schedule, ring: list[Flight], batches: list[LoadedBatch], clock: StageClock | None
) -> None:
    """Train on every batch once."""
    fresh: Iterator[LoadedBatch] = (replace(batch) for batch in batches)
    for _ in execute(schedule.rows, stages=engine.stages, ring=ring, batches=fresh, device=engine.device, clock=clock):
        continue


def trace(engine: Engine, what: str, options: argparse.Namespace) -> dict[str, Any]:
    """Chrome trace of one overlapped run."""
    timeline = Timeline(engine.device, range(2, 6), 1)
    schedule = schedules(engine, what, options.depth)["overlapped"]
    engine.comm.barrier()
    timeline.start()
    if what == "eval":
        split = engine.dataset.split("test")
        Evaluator(replace(engine, eval_schedule=schedule), split, "test").run(clock=StageClock(engine.device, timeline))
    else:
        ring = [
            Flight.allocate(
                -(-options.batch // engine.comm.size),
                model=engine.model, embedding=engine.embedding, device=engine.device, training=True,
            )
            for _ in range(ring_size(schedule.rows))
        ]  # fmt: skip
        steps(engine, schedule, ring, read(engine, options.batch), StageClock(engine.device, timeline))
    return chrome_trace(gather_runs(timeline, engine.comm))


def main() -> None:
    """Measure, and print on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--bottom", type=int, nargs="+", required=True)
    parser.add_argument("--top", type=int, nargs="+", required=True)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--placement", default="table_wise")
    parser.add_argument("--what", nargs="+", choices=("eval", "train"), default=("eval", "train"))
    parser.add_argument("--names", nargs="+", default=("sequential", "overlapped"))
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    comm = world(launched_ranks())
    config = parse_run_config(
        {
            "data": {"path": options.data, "batch_size": options.batch},
            "model": {
                "embedding_dim": options.dim,
                "bottom_mlp": [*options.bottom, options.dim],
                "top_mlp": [*options.top, 1],
            },
            "embedding": {"placement": options.placement},
            "optimizer": {"kind": "sgd", "lr": 0.01},
            "eval": {"batch_size": options.batch},
        }
    )
    engine = build_engine(config, comm=comm, threads=THREADS)
    result: dict[str, Any] = {"ranks": comm.size, "nodes": engine.topology.num_nodes, "threads": THREADS}
    for what, measure in (("eval", evaluations), ("train", trainings)):
        if what in options.what:
            result[what] = measure(engine, list(options.names), options)
            chosen = schedules(engine, what, options.depth)["default"]
            result[what]["default"] = chosen.to_values()
            if options.trace:
                result[what]["trace"] = trace(engine, what, options)
    if comm.rank == 0:
        print(json.dumps(result))
    comm.barrier()
    finalize()


if __name__ == "__main__":
    main()
