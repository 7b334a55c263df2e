"""Ways to run the two lanes of an evaluation beside each other on one GPU, that only a measurement can choose between.

    python benchmarks/gpu_lanes.py
    python benchmarks/gpu_lanes.py --batches 65536 --only "fused, one stream" "on 24 multiprocessors"

The product's kernels at MLPerf's shape (tables capped, fp16, keys of a power law), batch after batch through a ring of
three; every form as one graph of many batches, or issued where it cannot be captured. ``apart``: look-up, then
interaction; ``fused``: both in one kernel. A lane is held to some multiprocessors by a smaller grid (``blocks of``) or
by partitions of the chip (green contexts: ``on``), products told of the rest or not (cublasLt's SM count). Forms take
turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import cupy  # noqa: E402
from cuda.bindings import driver  # noqa: E402
from overlap_gpu import build  # noqa: E402

from dlrm import cublaslt, interaction_cuda  # noqa: E402
from dlrm.interaction import gather_interaction, interaction_forward  # noqa: E402
from embedding.comm import SingleComm  # noqa: E402
from pipeline.engine import Engine  # noqa: E402
from pipeline.feed import TrainingFeed  # noqa: E402
from pipeline.flight import Flight  # noqa: E402

RING = 3
APART, FUSED = ("lookup", "bottom", "cross", "top"), ("bottom", "fused", "top")


@dataclass(frozen=True, slots=True)
class Form:
    """How the pieces of a batch are run.

    Attributes:
        pieces: in the order of the batch.
        beside: those of the embedding lane, one batch ahead; others are the dense lane's.
        first: the lane whose blocks go first where both wait for room: ``embedding``, ``dense`` or neither.
        blocks_of: multiprocessors that the fused kernel's grid is made for; 0: all.
        partition: multiprocessors of the embedding lane, the others are the dense lane's; 0: both have all.
        told: cublasLt knows how many multiprocessors it has.
    """

    pieces: tuple[str, ...]
    beside: frozenset[str] = frozenset()
    first: str = ""
    blocks_of: int = 0
    partition: int = 0
    told: bool = False


def forms() -> dict[str, Form]:
    """By name."""
    lane = frozenset({"bottom", "fused"})
    found = {
        "apart, one stream": Form(APART),
        "fused, one stream": Form(FUSED),
        "apart, look-up beside": Form(APART, frozenset({"lookup"})),
        "fused beside top": Form(FUSED, lane),
        "fused beside top, embedding first": Form(FUSED, lane, "embedding"),
        "fused beside top, dense first": Form(FUSED, lane, "dense"),
        "fused alone beside, embedding first": Form(FUSED, frozenset({"fused"}), "embedding"),
    }
    for count in (16, 24, 32, 48, 66):
        found[f"fused beside top, blocks of {count}"] = Form(FUSED, lane, "embedding", blocks_of=count)
    for count in (24, 32):
        found[f"fused beside top, blocks of {count}, told"] = Form(FUSED, lane, "embedding", blocks_of=count, told=True)
    for count in (16, 32, 48, 64):
        for name, aware in (("", False), (", told", True)):
            found[f"fused beside top, on {count}{name}"] = Form(
                FUSED, lane, blocks_of=count, partition=count, told=aware
            )
    for count in (16, 32, 48):
        found[f"fused alone beside, on {count}, told"] = Form(
            FUSED, frozenset({"fused"}), blocks_of=count, partition=count, told=True
        )
    for count in (8, 16, 24):
        found[f"apart, look-up beside, on {count}"] = Form(APART, frozenset({"lookup"}), partition=count)
        found[f"apart, look-up beside, on {count}, told"] = Form(
            APART, frozenset({"lookup"}), partition=count, told=True
        )
    return found


class Work:
    """The pieces over some batches that stay where they are."""

    def __init__(self, engine: Engine, batches: int) -> None:
        self._engine = engine
        stages: Any = engine.stages
        self._stages = stages
        rows = engine.config.data.batch_size
        self.flights: list[Flight] = [stages.flight(rows, training=False) for _ in range(batches)]
        with TrainingFeed(engine, engine.dataset.split("train")).batches(start_step=0, stop_step=batches) as feed:
            for flight, batch in zip(self.flights, feed, strict=True):
                flight.accept(batch)
                stages.upload(flight)
                stages.input_dist(flight)
        cupy.cuda.Device().synchronize()

    def run(self, piece: str, number: int) -> None:
        """Issue one piece of a batch on the current stream."""
        flight, model, device = self.flights[number % len(self.flights)], self._engine.model, self._engine.device
        work, rows = flight.workspace, flight.rows
        crossed = work.interaction[:rows]
        if piece == "bottom":
            self._stages.bottom_forward(flight)
        elif piece == "lookup":
            self._stages.embedding.lookup(flight.embedding)
        elif piece == "cross":
            interaction_forward(work.vectors[:rows], crossed, first=model.first, device=device)
        elif piece == "fused":
            bottom, weight, row_start, keys, count = self._stages._rows_of(flight)  # noqa: SLF001
            gather_interaction(
                bottom, weight, row_start, keys, count, crossed, first=model.first, device=device
            )  # fmt: skip
        else:
            model.top_mlp_forward(work, rows)


class Lanes:
    """Streams of a form."""

    def __init__(self, form: Form) -> None:
        if form.partition:
            self.embedding, self.dense = partition(form.partition)
        else:
            self.embedding, self.dense = (
                stream_of(name, -1 if form.first == name else 0) for name in ("embedding", "dense")
            )

    def of(self, form: Form, piece: str) -> Any:
        """The stream of a piece."""
        return self.embedding if piece in form.beside else self.dense


@cache
def stream_of(lane: str, priority: int) -> Any:  # noqa: ARG001 each lane has its own
    """A stream of the whole chip."""
    return cupy.cuda.Stream(non_blocking=True, priority=priority)


@cache
def partition(count: int) -> tuple[Any, Any]:
    """Streams of so many multiprocessors and of all others."""
    device = checked(driver.cuDeviceGet(0))
    every = checked(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    groups, _, rest = checked(driver.cuDevSmResourceSplitByCount(1, every, 0, count))
    streams = []
    for part in (groups[0], rest):
        description = checked(driver.cuDevResourceGenerateDesc([part], 1))
        context = checked(driver.cuGreenCtxCreate(description, device, 1))  # CU_GREEN_CTX_DEFAULT_STREAM
        stream = checked(driver.cuGreenCtxStreamCreate(context, 1, 0))  # CU_STREAM_NON_BLOCKING
        streams.append(cupy.cuda.ExternalStream(int(stream)))
    print(f"partition of {count}: {groups[0].sm.smCount} and {rest.sm.smCount} multiprocessors", flush=True)
    return streams[0], streams[1]


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver gives."""
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"driver: {result[0].name}")
    return result[1] if len(result) == 2 else result[1:]


@contextmanager
def fewer_blocks(count: int) -> Iterator[None]:
    """Fused kernels have the grid of a chip of so many multiprocessors."""
    module: Any = interaction_cuda
    before = module.load
    module.load = lambda *arguments: replace(before(*arguments), multiprocessors=count)
    try:
        yield
    finally:
        module.load = before


@contextmanager
def told(count: int, plans: dict[Any, Any]) -> Iterator[None]:
    """Products are planned in ``plans``, for so many multiprocessors, and nothing of it is kept on disk."""
    library: Any = cublaslt
    plain, before, kept = library.Plan, library._plans, library._Kept  # noqa: SLF001
    get, put = kept.get, kept.put

    class Told(plain):  # type: ignore[misc, valid-type]
        def __init__(self, product: cublaslt.Product) -> None:
            super().__init__(product)
            self._set("SM_COUNT_TARGET", count)

    library.Plan, library._plans = Told, plans  # noqa: SLF001
    kept.get, kept.put = lambda *_: None, lambda *_: None
    try:
        yield
    finally:
        library.Plan, library._plans, kept.get, kept.put = plain, before, get, put  # noqa: SLF001


class Runner:
    """One form, warmed up and captured."""

    def __init__(self, name: str, form: Form, work: Work, batches: int, multiprocessors: int) -> None:
        self.name, self._form, self._work, self._batches = name, form, work, batches
        self._lanes, self._plans = Lanes(form), dict[Any, Any]()
        self._rest = multiprocessors - (form.partition or form.blocks_of)
        self._main = stream_of("main", 0)
        self.graph: Any = None
        self.why = ""
        with self._changed(), self._main:
            self._pipeline(2 * RING)  # kernels are compiled, algorithms chosen
            self._main.synchronize()
            try:
                self.graph = captured(self._main, self._issue)
            except Exception as error:  # noqa: BLE001 whatever CUDA or CuPy says: the form is issued then
                self.why = " ".join(str(error).split())[:100]
                cupy.cuda.Device().synchronize()

    def _issue(self) -> None:
        self._pipeline(self._batches)

    @contextmanager
    def _changed(self) -> Iterator[None]:
        """What the form changes."""
        with ExitStack() as changes:
            if self._form.blocks_of:
                changes.enter_context(fewer_blocks(self._form.blocks_of))
            if self._form.told:
                changes.enter_context(told(self._rest, self._plans))
            yield

    def milliseconds(self) -> float:
        """Of a batch."""
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        with self._changed(), self._main as main:
            begin.record(main)
            if self.graph is not None:
                self.graph.launch(main)
            else:
                self._issue()
            end.record(main)
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) / self._batches

    def _pipeline(self, batches: int) -> None:
        """All batches: a batch's first piece waits for the last one of the batch whose room it takes."""
        form, chain = self._form, self._form.pieces
        ahead = {piece: int(piece in form.beside) for piece in chain}
        order = sorted(chain, key=lambda piece: (-ahead[piece], chain.index(piece)))
        streams = {self._lanes.of(form, piece) for piece in chain}
        start = recorded(self._main)
        for stream in streams:
            stream.wait_event(start)
        done: dict[tuple[str, int], Any] = {}
        for tick in range(-1, batches):
            for piece in order:
                number = tick + ahead[piece]
                if not 0 <= number < batches:
                    continue
                stream = self._lanes.of(form, piece)
                place = chain.index(piece)
                for before in ((chain[place - 1], number) if place else None, (chain[-1], number - RING)):
                    if before in done:
                        stream.wait_event(done[before])
                with stream:
                    self._work.run(piece, number)
                done[piece, number] = recorded(stream)
        for stream in streams:
            self._main.wait_event(recorded(stream))


def captured(stream: Any, issue: Callable[[], None]) -> Any:
    """A graph of what is issued behind ``stream``."""
    stream.begin_capture()
    try:
        issue()
    except BaseException:
        with suppress(cupy.cuda.runtime.CUDARuntimeError):
            stream.end_capture()
        raise
    return stream.end_capture()


def recorded(stream: Any) -> Any:
    """An event behind what was issued on a stream."""
    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    return event


def compare(options: argparse.Namespace, batch: int) -> None:
    """All forms at one size of batch."""
    engine = build(options, SingleComm(), "auto", batch)
    work = Work(engine, RING)
    multiprocessors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
    count = max(24, 24 * 65_536 // batch // 4)
    runners = []
    for name, form in forms().items():
        if options.only and not any(part in name for part in options.only):
            continue
        try:
            runners.append(Runner(name, form, work, count, multiprocessors))
        except Exception as error:  # noqa: BLE001 a form that this machine does not have
            print(f"  {name}: {' '.join(str(error).split())[:200]}", flush=True)
    times: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for turn in range(options.rounds + 1):
        for runner in runners[:: 1 if turn % 2 else -1]:
            taken = runner.milliseconds()
            if turn:
                times[runner.name].append(taken)
    print(f"\n{engine.device.name}, batch {batch:,}: microseconds a batch, times apart, times fused", flush=True)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for runner in runners:
        own = medians[runner.name]
        against = [medians.get(f"{base}, one stream", float("nan")) / own for base in ("apart", "fused")]
        how = "" if runner.graph is not None else f"  issued: {runner.why}"
        print(f"  {runner.name:44}{1e3 * own:9.1f}{against[0]:9.3f}{against[1]:9.3f}{how}", flush=True)
    engine.close()


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[65_536])
    parser.add_argument("--cap", type=int, default=4_000_000, help="most rows of a table")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the forms' names")
    options = parser.parse_args()
    options.device, options.rows, options.depth = "cuda", 1_000_000, 3
    for batch in options.batches:
        options.eval_batch = batch
        compare(options, batch)


if __name__ == "__main__":
    main()
