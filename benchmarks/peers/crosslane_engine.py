"""Crosslane's own side: the trainer's stages in the trainer's order, one repetition of one shape.

The engine is built as a run builds it (``build_engine``) over a data set of a few rows that only names the tables;
the batches that are timed lie in memory, as the peer's do, so that neither side reads a file. The reading of
batches runs on threads of its own in a real run (``pipeline.loader``).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.threads import settle_threads

if TYPE_CHECKING:
    from shapes import Shape

    from pipeline.engine import Engine
    from pipeline.loader import LoadedBatch


def build(shape: Shape, threads: int, lr: float) -> Engine:
    """The engine of a run with this shape."""
    import numpy as np

    from dlrm.config import parse_run_config
    from embedding.comm import SingleComm
    from pipeline.dataset import DatasetWriter, TableInfo
    from pipeline.engine import build_engine

    with tempfile.TemporaryDirectory() as folder:
        tables = [
            TableInfo(name=f"C{i + 1}", rows=rows, hotness=shape.hotness) for i, rows in enumerate(shape.table_rows)
        ]
        dense_names = [f"I{i + 1}" for i in range(shape.num_dense)]
        with DatasetWriter(Path(folder) / "data", name="bench", dense_names=dense_names, tables=tables) as writer:
            keys = np.zeros((2, shape.hotness * len(tables)), np.int32)
            writer.write("train", np.arange(2), np.zeros((2, shape.num_dense), np.float32), keys)
            writer.finish()
        config = parse_run_config(
            {
                "data": {"path": str(Path(folder) / "data"), "batch_size": shape.batch},
                "model": {
                    "embedding_dim": shape.dim,
                    "bottom_mlp": list(shape.bottom),
                    "top_mlp": list(shape.top),
                },
                "optimizer": {"kind": "sgd", "lr": lr},
            }
        )
        return build_engine(config, comm=SingleComm(), threads=threads)


def batches_in_memory(shape: Shape, count: int) -> Iterator[LoadedBatch]:
    """Endless batches as the loader hands them over, ``count`` distinct ones in turn."""
    import numpy as np
    from shapes import make_batches

    from embedding.jagged import Jagged
    from pipeline.formats.batch import HostBatch
    from pipeline.loader import LoadedBatch

    num_tables, bags = len(shape.table_rows), len(shape.table_rows) * shape.batch
    offsets = None if shape.hotness == 1 else np.arange(bags + 1, dtype=np.int64) * shape.hotness
    hosts = [
        HostBatch(
            labels=arrays.labels.astype(np.float32),
            dense=arrays.dense,
            keys=Jagged(arrays.keys.reshape(-1), offsets, None, num_tables, shape.batch),
            num_rows=shape.batch,
        )
        for arrays in make_batches(shape, count)
    ]
    step = 0
    while True:
        step += 1
        host = hosts[step % count]
        yield LoadedBatch(host=host, step=step, epoch=0, global_rows=shape.batch, last_of_epoch=False)


def main() -> None:
    """One repetition."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("--warmup", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    threads = settle_threads()

    from shapes import SHAPES
    from timing import repeat, report

    from pipeline.flight import Flight
    from pipeline.schedule import TRAIN_SEQUENTIAL, execute, ring_size
    from pipeline.trace import StageClock

    shape = SHAPES[options.shape]
    engine = build(shape, threads, lr=0.01)
    ring = [
        Flight.allocate(
            shape.batch, model=engine.model, embedding=engine.embedding, device=engine.device, training=True
        )
        for _ in range(ring_size(TRAIN_SEQUENTIAL))
    ]
    clock = StageClock(engine.device)
    steps = execute(
        TRAIN_SEQUENTIAL,
        stages=engine.stages,
        ring=ring,
        batches=batches_in_memory(shape, options.batches),
        device=engine.device,
        clock=clock,
    )
    losses = []

    def step(_: int) -> None:
        losses.append(next(steps).loss)

    result = repeat(step, warmup_s=options.warmup, measure_s=options.seconds, on_start=lambda: clock.take_ms())
    stages_ms = {stage: round(ms, 3) for stage, ms in clock.take_ms().items()}
    report(**result, version=f"numba {importlib.metadata.version('numba')}", stages_ms=stages_ms, last_loss=losses[-1])


if __name__ == "__main__":
    main()
