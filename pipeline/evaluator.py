"""Scoring a split: the forward-only schedule, then exact metrics over all ranks.

The first pass keeps the split's batches in memory where they fit, so that later ones read no file. The metrics need
nothing but the logits, which stay on the device: ``BackgroundEvaluations`` computes them in a thread of its own, on a
stream and a communicator of its own, beside the next training steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedding.comm import Comm
from embedding.topology import share_of, start_of
from pipeline.course import TrainResult
from pipeline.curves import Curves
from pipeline.dataset import Split
from pipeline.device_feed import Origin
from pipeline.engine import Engine
from pipeline.feed import Batches, evaluation_batches, evaluation_origin
from pipeline.flight import Flight
from pipeline.host_memory import available_memory
from pipeline.loader import LoadedBatch
from pipeline.metrics import Metrics, evaluate_scores
from pipeline.schedule import Clock, execute, ring_size
from pipeline.stages import S


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one pass over a split gave.

    Attributes:
        seconds: of the pass and of the scoring.
        scoring_seconds: of sorting the scores and of the metrics, which may lie beside training steps.
        waited_seconds: in which training stood still for the metrics, and for sending weights where other ranks
            evaluate.
    """

    split: str
    metrics: Metrics
    curves: Curves
    seconds: float
    samples: int
    scoring_seconds: float
    waited_seconds: float = 0.0

    def to_values(self) -> dict[str, Any]:
        """As JSON values, for a progress record."""
        return {
            "split": self.split,
            "seconds": self.seconds,
            "scoring_seconds": self.scoring_seconds,
            "waited_seconds": self.waited_seconds,
            "samples": self.samples,
            "metrics": self.metrics.to_values(),
        }


_SHARE_FOR_CACHE = 0.25
"""Of the memory that is free, for all ranks of a machine together."""


class Evaluator:
    """Scores one split as often as asked; its buffers are allocated once.

    Attributes:
        ring: of its batches in flight.
        cached: this rank's batches, kept by the first pass; ``None`` before it, or where they do not fit.
    """

    def __init__(self, engine: Engine, split: Split, name: str) -> None:
        """Allocate the ring of Flights for batches of ``eval.batch_size``."""
        self.engine = engine
        self.split = split
        self.name = name
        self.batch_size = min(engine.config.eval.batch_size, max(split.rows, 1))
        self.ring: list[Flight] = []
        self._make_ring()
        # Of each batch, whether its exchange ran over.
        self._overflows = engine.device.zeros(-(-split.rows // self.batch_size), np.int32)
        rows = sum(self._share(start) for start in range(0, split.rows, self.batch_size))
        self._logits = engine.device.empty(rows, self.ring[0].workspace.logits.dtype)
        self._labels = engine.device.empty(rows, self.ring[0].labels.dtype)
        self.cached: list[LoadedBatch] | None = None
        self._keeps: bool | None = None
        self._origin: Origin | None = None
        self._forward_seconds = 0.0

    def _share(self, start: int) -> int:
        comm = self.engine.comm
        return share_of(min(self.batch_size, self.split.rows - start), comm.size, comm.rank)

    def share_rows(self, other: Evaluator) -> None:
        """Read the rows of a GPU where another evaluator of the split has brought them, or will."""
        if other._origin is None:
            other._origin = evaluation_origin(other.engine, other.split, other.batch_size)
        self._origin = other._origin

    def run(self, *, clock: Clock | None = None) -> Evaluation:
        """Score the split and compute its metrics (collective)."""
        self.forward(clock=clock)
        return self.score(self.engine.comm, self.engine.carrier)

    def forward(self, *, clock: Clock | None = None) -> None:
        """Compute the logits of the whole split (collective)."""
        start = time.perf_counter()
        engine = self.engine
        at = 0
        with ExitStack() as stack:
            for number, flight in enumerate(
                execute(
                    engine.eval_schedule.rows,
                    stages=engine.stages,
                    ring=self.ring,
                    batches=self._batches(stack),
                    device=engine.device,
                    clock=clock,
                )
            ):
                self._keep(flight, at)
                if (flag := engine.stages.overflow(flight)) is not None:
                    self._overflows[number : number + 1] = flag
                at += flight.rows
        if engine.stages.overflow(self.ring[0]) is not None:
            overflows = np.flatnonzero(engine.device.to_host(self._overflows)).tolist()
            for number in overflows:
                self._run_again(number)
            if overflows:
                self._make_ring()
        self._forward_seconds = time.perf_counter() - start

    def _make_ring(self) -> None:
        """Allocate all batches in flight."""
        self.ring.clear()
        for _ in range(ring_size(self.engine.eval_schedule.rows)):
            self.ring.append(self.engine.stages.flight(self.batch_size, training=False))

    def _keep(self, flight: Flight, at: int) -> None:
        """Keep a batch's logits and labels, behind the first ``at`` rows."""
        here = slice(at, at + flight.rows)
        self.engine.device.convert(flight.workspace.logits[: flight.rows], self._logits[here])
        self.engine.device.convert(flight.labels[: flight.rows], self._labels[here])

    def _run_again(self, number: int) -> None:
        """Do a batch whose exchange ran over, with lists that are long enough."""
        engine, flight = self.engine, self.ring[0]
        with (
            evaluation_batches(engine, self.split, self.batch_size, self._origin, number) as batches,
            engine.device.streams(("main",)) as streams,
        ):
            engine.stages.run_exact(next(batches), flight, S.top_forward)
            streams.join([engine.device.record()])
            self._keep(flight, sum(self._share(before * self.batch_size) for before in range(number)))

    def score(self, comm: Comm, carrier: Comm | None) -> Evaluation:
        """Metrics of the last ``forward`` (collective); needs nothing of the model.

        Args:
            comm: all ranks.
            carrier: the same, for arrays of the device; ``None``: those go through the host's memory.
        """
        start = time.perf_counter()
        metrics, curves = evaluate_scores(self._logits, self._labels, comm, self.engine.device, carrier)
        scoring = time.perf_counter() - start
        return Evaluation(self.name, metrics, curves, self._forward_seconds + scoring, self.split.rows, scoring)

    def _batches(self, stack: ExitStack) -> Batches:
        """This rank's batches, from memory once a pass has kept them."""
        if self.cached is not None:
            return iter(self.cached)
        if self._origin is None:
            self._origin = evaluation_origin(self.engine, self.split, self.batch_size)
        batches = stack.enter_context(evaluation_batches(self.engine, self.split, self.batch_size, self._origin))
        return batches if self.engine.layout is not None else self._keeping(batches)

    def _keeping(self, loader: Batches) -> Iterator[LoadedBatch]:
        kept: list[LoadedBatch] = []
        count = -(-self.split.rows // self.batch_size)
        for batch in loader:
            assert isinstance(batch, LoadedBatch)
            if self._keeps is None:
                self._keeps = self.engine.config.eval.cache and self._fits(count * batch.host.nbytes)
            if self._keeps:
                kept.append(batch)
            yield batch
        if self._keeps and len(kept) == count:
            self.cached = kept

    def _fits(self, size: int) -> bool:
        free = available_memory()
        return size * self.engine.topology.local_size <= _SHARE_FOR_CACHE * free

    def write_scores(self, path: Path) -> None:
        """Write the last run's predicted probabilities [rows] as .npy, in row order (collective)."""
        comm = self.engine.comm
        dtype = self._logits.dtype
        if comm.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(self.split.rows,)).flush()
        comm.barrier()
        if self.split.rows:
            scores = np.load(path, mmap_mode="r+")
            at = 0
            for start in range(0, self.split.rows, self.batch_size):
                size = min(self.batch_size, self.split.rows - start)
                first, count = start + start_of(size, comm.size, comm.rank), self._share(start)
                scores[first : first + count] = _sigmoid(self.engine.device.to_host(self._logits[at : at + count]))
                at += count
            scores.flush()
        comm.barrier()


class BackgroundEvaluations:
    """The evaluations of a run, one at a time; all methods are collective but ``done`` and ``close``.

    Attributes:
        elsewhere: other ranks make those during training (``pipeline.dedicated``).
    """

    elsewhere = False

    def __init__(self, engine: Engine, on_end: Callable[[Evaluation, int], None]) -> None:
        """Allocate nothing yet.

        Args:
            engine: what is evaluated.
            on_end: told of every evaluation and its step, by the thread that ends it.
        """
        self._engine = engine
        self._comm = engine.comm.split(0, engine.comm.rank)
        self._on_end = on_end
        self._evaluators: dict[str, Evaluator] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self._scoring: Future[Evaluation] | None = None
        self._step = 0
        self._stalled_seconds = 0.0

    def start(self, split: str, step: int, *, clock: Clock | None = None) -> None:
        """Compute the logits now, and the metrics behind the caller's back.

        What the ranks exchange for them goes through the host's memory: on the device it would have to take turns with
        the exchanges of the steps beside it, in an order that no two ranks share.
        """
        self._start(split, step, None, clock)

    def run(self, split: str, step: int, *, clock: Clock | None = None) -> Evaluation:
        """Evaluate, and wait for the result."""
        self._start(split, step, self._engine.carrier, clock)
        evaluation = self.end()
        assert evaluation is not None
        return evaluation

    def run_here(self, split: str, step: int, *, clock: Clock | None = None) -> Evaluation:
        """As ``run``, by the ranks that train in any case."""
        self._start_here(split, step, self._engine.carrier, clock)
        evaluation = self.end()
        assert evaluation is not None
        return evaluation

    def _start(self, split: str, step: int, carrier: Comm | None, clock: Clock | None) -> None:
        self._start_here(split, step, carrier, clock)

    def _start_here(self, split: str, step: int, carrier: Comm | None, clock: Clock | None) -> None:
        self.end()
        if split not in self._evaluators:
            self._evaluators[split] = Evaluator(self._engine, self._engine.dataset.split(split), split)
        evaluator, device = self._evaluators[split], self._engine.device
        evaluator.forward(clock=clock)
        self._step = step
        forward = device.record()

        def score() -> Evaluation:
            with device.on("scoring", (forward,)):
                return evaluator.score(self._comm, carrier)

        self._scoring = self._pool.submit(score)

    def done(self) -> bool:
        """Whether the metrics of the evaluation under way are there; ``False`` where none is."""
        return self._scoring is not None and self._scoring.done()

    def end(self) -> Evaluation | None:
        """Wait for the evaluation under way.

        Raises:
            DataError: a score is not a number.
        """
        if self._scoring is None:
            return None
        scoring, self._scoring = self._scoring, None
        start = time.perf_counter()
        evaluation = scoring.result()
        stalled, self._stalled_seconds = self._stalled_seconds, 0.0
        evaluation = replace(evaluation, waited_seconds=stalled + time.perf_counter() - start)
        self._on_end(evaluation, self._step)
        return evaluation

    def flights(self) -> list[Flight]:
        """All batches in flight that it has room for."""
        return [flight for evaluator in self._evaluators.values() for flight in evaluator.ring]

    @property
    def pending_step(self) -> int | None:
        """Of the evaluation under way."""
        return None if self._scoring is None else self._step

    def dismiss(self, result: TrainResult) -> None:
        """Tell ranks that wait for evaluations that none will come."""

    def close(self) -> None:
        """End the thread once it is idle; waits for nobody."""
        self._pool.shutdown(wait=False)


def evaluate(engine: Engine, *, split: str | None = None, scores: Path | None = None) -> Evaluation:
    """Score a split once (collective); ``None`` takes the config's closing split."""
    name = split or final_split(engine)
    evaluator = Evaluator(engine, engine.dataset.split(name), name)
    evaluation = evaluator.run()
    for flight in evaluator.ring:
        flight.recording.graph = None
    if scores is not None:
        evaluator.write_scores(scores)
    return evaluation


def final_split(engine: Engine) -> str:
    """The split of the closing evaluation: ``eval.final_split`` where the data has it, else ``eval.split``."""
    wanted = engine.config.eval.final_split
    return wanted if wanted and wanted in engine.dataset.splits else engine.config.eval.split


def _sigmoid(logits: Any) -> Any:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-logits))
