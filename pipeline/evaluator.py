"""Scoring a split: the forward-only schedule, then exact metrics over all ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedding.topology import share_of, start_of
from pipeline.curves import Curves
from pipeline.dataset import Split
from pipeline.engine import Engine
from pipeline.flight import Flight
from pipeline.loader import Loader
from pipeline.metrics import Metrics, evaluate_scores
from pipeline.schedule import execute, ring_size


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one pass over a split gave."""

    split: str
    metrics: Metrics
    curves: Curves
    seconds: float
    samples: int


class Evaluator:
    """Scores one split as often as asked; its buffers are allocated once."""

    def __init__(self, engine: Engine, split: Split, name: str) -> None:
        """Allocate the ring of Flights for batches of ``eval.batch_size``."""
        self.engine = engine
        self.split = split
        self.name = name
        self.batch_size = min(engine.config.eval.batch_size, max(split.rows, 1))
        capacity = -(-self.batch_size // engine.comm.size)
        self._ring = [
            Flight.allocate(
                capacity, model=engine.model, embedding=engine.embedding, device=engine.device, training=False
            )
            for _ in range(ring_size(engine.eval_schedule.rows))
        ]
        rows = sum(self._share(start) for start in range(0, split.rows, self.batch_size))
        self._logits = np.empty(rows, engine.model.dtype)
        self._labels = np.empty(rows, engine.model.dtype)

    def _share(self, start: int) -> int:
        comm = self.engine.comm
        return share_of(min(self.batch_size, self.split.rows - start), comm.size, comm.rank)

    def run(self) -> Evaluation:
        """Score the split and compute its metrics (collective)."""
        start = time.perf_counter()
        engine = self.engine
        loader = Loader(
            self.split,
            batch_size=self.batch_size,
            rank=engine.comm.rank,
            ranks=engine.comm.size,
            seed=engine.config.seed,
            shuffle=False,
            window=self.batch_size,
            drop_last=False,
            prefetch=engine.config.data.prefetch,
            readers=engine.config.data.readers,
            epochs=1,
        )
        at = 0
        with loader:
            for flight in execute(
                engine.eval_schedule.rows,
                stages=engine.stages,
                ring=self._ring,
                batches=iter(loader),
                device=engine.device,
            ):
                here = slice(at, at + flight.rows)
                engine.device.download(flight.workspace.logits[: flight.rows], self._logits[here])
                engine.device.download(flight.labels[: flight.rows], self._labels[here])
                at += flight.rows
        metrics, curves = evaluate_scores(self._logits, self._labels, engine.comm)
        return Evaluation(self.name, metrics, curves, time.perf_counter() - start, self.split.rows)

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
                scores[first : first + count] = _sigmoid(self._logits[at : at + count])
                at += count
            scores.flush()
        comm.barrier()


def evaluate(engine: Engine, *, split: str | None = None, scores: Path | None = None) -> Evaluation:
    """Score a split once (collective); ``None`` takes the config's closing split."""
    name = split or final_split(engine)
    evaluator = Evaluator(engine, engine.dataset.split(name), name)
    evaluation = evaluator.run()
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
