"""Which stage, on which stream, after what, how many batches ahead: tables of rows and one short executor.

``after`` names stages of the same batch. Tick k issues every row for batch ``k + ahead``; ticks start below zero,
so that filling and draining need no code of their own, and all streams are joined at a tick's end. The ring holds
``1 + max(ahead)`` Flights.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dlrm.device import Device, Event
from pipeline.flight import Flight
from pipeline.loader import LoadedBatch
from pipeline.stages import S, Stages


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a schedule."""

    stage: S
    stream: str
    after: tuple[S, ...] = ()
    ahead: int = 0


TRAIN_SEQUENTIAL = (
    Row(S.upload, "main"),
    Row(S.input_dist, "main", after=(S.upload,)),
    Row(S.lookup, "main", after=(S.input_dist,)),
    Row(S.output_dist, "main", after=(S.lookup,)),
    Row(S.bottom_forward, "main", after=(S.upload,)),
    Row(S.top_forward, "main", after=(S.output_dist, S.bottom_forward)),
    Row(S.loss, "main", after=(S.top_forward,)),
    Row(S.top_backward, "main", after=(S.loss,)),
    Row(S.grad_dist, "main", after=(S.top_backward,)),
    Row(S.bottom_backward, "main", after=(S.top_backward,)),
    Row(S.reduce_dense, "main", after=(S.bottom_backward,)),
    Row(S.sparse_update, "main", after=(S.grad_dist,)),
    Row(S.dense_update, "main", after=(S.reduce_dense,)),
)

EVAL_SEQUENTIAL = TRAIN_SEQUENTIAL[:6]  # forward only: up to the logits


class StageClock:
    """Seconds spent per stage since the last reading."""

    def __init__(self) -> None:
        """Start at zero."""
        self._seconds: defaultdict[S, float] = defaultdict(float)

    def add(self, stage: S, seconds: float) -> None:
        """Count one run of a stage."""
        self._seconds[stage] += seconds

    def take_ms(self, steps: int) -> dict[str, float]:
        """Mean milliseconds per step by stage since the last call."""
        means = {str(stage): 1e3 * seconds / max(steps, 1) for stage, seconds in self._seconds.items()}
        self._seconds.clear()
        return means


def ring_size(rows: Sequence[Row]) -> int:
    """Flights that a schedule needs."""
    return 1 + max(row.ahead for row in rows)


def execute(
    rows: Sequence[Row],
    *,
    stages: Stages,
    ring: Sequence[Flight],
    batches: Iterator[LoadedBatch],
    device: Device,
    clock: StageClock | None = None,
) -> Iterator[Flight]:
    """Run a schedule over all batches; yields each batch's Flight once its last stage is done.

    The caller may read the Flight, evaluate or save until it asks for the next one.
    """
    most_ahead = max(row.ahead for row in rows)
    done: dict[tuple[S, int], Event] = {}
    issued = 0
    exhausted = False
    tick = -most_ahead
    while not exhausted or tick < issued:
        batch = None if exhausted else next(batches, None)
        if batch is None:
            exhausted = True
        else:
            ring[issued % len(ring)].accept(batch)
            issued += 1
        for row in rows:
            number = tick + row.ahead
            if not 0 <= number < issued:
                continue
            with device.on(row.stream):
                for stage in row.after:
                    device.wait(done[stage, number])
                start = time.perf_counter()
                stages.run(row.stage, ring[number % len(ring)])
                if clock is not None:
                    clock.add(row.stage, time.perf_counter() - start)
                done[row.stage, number] = device.record(row.stream)
        for row in rows:
            if event := done.pop((row.stage, tick), None):
                device.wait(event)
        if 0 <= tick < issued:
            yield ring[tick % len(ring)]
        tick += 1
