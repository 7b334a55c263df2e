"""Which stage, on which stream, after what, how many batches ahead: tables of rows and one short executor.

Tick k issues every row for batch ``k + ahead``, in the order of the table; ticks start below zero, so that filling and
draining need no code of their own. Work on one stream keeps that order, and a tick begins once the one before has
ended: ``after`` names what else a row waits for, stages of the same batch. The ring holds ``1 + max(ahead)`` Flights.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from dlrm.device import Device, Event, Recording, Streams
from pipeline.device_feed import DeviceBatch
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


TRAIN_SEQUENTIAL = tuple(Row(stage, "main") for stage in S)
EVAL_SEQUENTIAL = TRAIN_SEQUENTIAL[:6]  # forward only: up to the logits

# Rows are looked up after the last update, so that none is stale: what runs beside the dense lane is the exchange of
# the same batch, and upload and keys of later ones.
TRAIN_OVERLAPPED = (
    Row(S.upload, "copy", ahead=3),
    Row(S.lookup, "embedding", after=(S.input_dist,)),
    Row(S.output_dist, "comm", after=(S.lookup,)),
    Row(S.input_dist, "comm", after=(S.upload,), ahead=1),
    Row(S.bottom_forward, "dense", after=(S.upload,)),
    Row(S.top_forward, "dense", after=(S.output_dist,)),
    Row(S.loss, "dense"),
    Row(S.top_backward, "dense"),
    Row(S.sum_replicated, "embedding", after=(S.top_backward,)),
    Row(S.grad_dist, "comm", after=(S.top_backward,)),
    Row(S.reduce_replicated, "comm", after=(S.sum_replicated,)),
    Row(S.top_weight_backward, "dense"),
    Row(S.reduce_top, "comm", after=(S.top_weight_backward,)),
    Row(S.bottom_backward, "dense"),
    Row(S.reduce_bottom, "comm", after=(S.bottom_backward,)),
    Row(S.sparse_update, "embedding", after=(S.reduce_replicated,)),
    Row(S.dense_update, "dense", after=(S.reduce_bottom,)),
)

# On several GPUs the rows of batch i + 1 travel once batch i has updated them, so that none is stale, and beside weight
# gradients: the next step begins with rows that are there.
TRAIN_EXCHANGED = (
    Row(S.upload, "copy", ahead=3),
    Row(S.input_dist, "comm", after=(S.upload,), ahead=1),
    Row(S.bottom_forward, "dense", after=(S.upload,)),
    Row(S.top_forward, "dense", after=(S.output_dist,)),
    Row(S.loss, "dense"),
    Row(S.top_backward, "dense"),
    Row(S.sum_replicated, "embedding", after=(S.top_backward,)),
    Row(S.grad_dist, "comm", after=(S.top_backward,)),
    Row(S.reduce_replicated, "comm", after=(S.sum_replicated,)),
    Row(S.sparse_update, "embedding", after=(S.reduce_replicated,)),
    Row(S.lookup, "embedding", after=(S.input_dist,), ahead=1),
    Row(S.top_weight_backward, "dense"),
    Row(S.reduce_top, "comm", after=(S.top_weight_backward,)),
    Row(S.output_dist, "comm", after=(S.lookup,), ahead=1),
    Row(S.bottom_backward, "dense"),
    Row(S.reduce_bottom, "comm", after=(S.bottom_backward,)),
    Row(S.dense_update, "dense", after=(S.reduce_bottom,)),
)

# The dense part of batch i beside the whole embedding lane of batch i + 1; one deeper, beside the keys of i + 2 too.
EVAL_OVERLAPPED = (
    Row(S.upload, "copy", ahead=3),
    Row(S.input_dist, "comm", after=(S.upload,), ahead=2),
    Row(S.lookup, "embedding", after=(S.input_dist,), ahead=1),
    Row(S.output_dist, "comm", after=(S.lookup,), ahead=1),
    Row(S.bottom_forward, "dense", after=(S.upload,)),
    Row(S.top_forward, "dense", after=(S.output_dist,)),
)

# On one GPU look-up and interaction can be one kernel, behind the bottom layers: all of a batch but the top layers runs
# beside those of the batch before. What is ahead takes room first (``dlrm.cuda``).
EVAL_FUSED = (
    Row(S.upload, "copy", ahead=3),
    Row(S.input_dist, "ahead", after=(S.upload,), ahead=1),
    Row(S.bottom_forward, "ahead", ahead=1),
    Row(S.lookup, "ahead", ahead=1),
    Row(S.output_dist, "ahead", ahead=1),
    Row(S.top_forward, "dense"),
)

_CHANGING = (S.upload,)
"""Stages whose arguments change from batch to batch; all others find what changes in arrays of their Flight."""


def at_depth(rows: Sequence[Row], depth: int) -> tuple[Row, ...]:
    """A schedule with at most ``depth`` batches in flight.

    What runs beside an earlier batch may stand behind its rows in the table; with one batch, the order is that of
    ``S``.
    """
    capped = tuple(replace(row, ahead=min(row.ahead, depth - 1)) for row in rows)
    return capped if depth > 1 else tuple(sorted(capped, key=lambda row: list(S).index(row.stage)))


def ring_size(rows: Sequence[Row]) -> int:
    """Flights that a schedule needs."""
    return 1 + max(row.ahead for row in rows)


def stream_names(rows: Sequence[Row]) -> list[str]:
    """Streams of a schedule, each once."""
    return list(dict.fromkeys(row.stream for row in rows))


class Clock(Protocol):
    """Times runs of stages."""

    def times(self, tick: int) -> bool:
        """Whether it times the runs of a tick: these are issued, never replayed."""

    def run(self, row: Row, number: int, work: Callable[[], None]) -> None:
        """Do ``work``, which is ``row`` of batch ``number`` from 0, and note when; called on the row's stream."""


def execute(
    rows: Sequence[Row],
    *,
    stages: Stages,
    ring: Sequence[Flight],
    batches: Iterator[LoadedBatch | DeviceBatch],
    device: Device,
    clock: Clock | None = None,
) -> Generator[Flight, None, None]:
    """Run a schedule over all batches; yields each batch's Flight once its last stage is done.

    The caller may read the Flight, evaluate or save until it asks for the next one: nothing is under way meanwhile, and
    what it has started itself comes before everything that follows.
    """
    most_ahead = ring_size(rows) - 1
    issued, exhausted = 0, False
    tick = -most_ahead
    with device.streams(stream_names(rows)) as streams:
        while not exhausted or tick < issued:
            batch = None if exhausted else next(batches, None)
            if batch is None:
                exhausted = True
            else:
                ring[issued % len(ring)].accept(batch)
                issued += 1
            now = _Tick(tick, issued, ring, stages, streams, clock)
            uploads = now.issue([row for row in rows if row.stage in _CHANGING])
            others = [row for row in rows if row.stage not in _CHANGING]
            streams.repeat(partial(now.issue, others), now.awaited(others), now.recording(others))
            streams.join(uploads)
            if 0 <= tick < issued:
                yield ring[tick % len(ring)]
                streams.join([device.record()])
            tick += 1


@dataclass(slots=True)
class _Tick:
    """Issues the rows of one tick."""

    number: int
    issued: int
    ring: Sequence[Flight]
    stages: Stages
    streams: Streams
    clock: Clock | None
    events: dict[tuple[S, int], Event] = field(default_factory=dict)

    def issue(self, rows: Sequence[Row]) -> list[Event]:
        """Issue those that have a batch; their events."""
        events = []
        for row in self._with_batch(rows):
            # A stage that is further ahead has run in an earlier tick.
            after = [self.events[stage, row.ahead] for stage in row.after if (stage, row.ahead) in self.events]
            event = self.streams.issue(row.stream, self._work(row), after)
            self.events[row.stage, row.ahead] = event
            events.append(event)
        return events

    def awaited(self, rows: Sequence[Row]) -> list[Event]:
        """Events of this tick that these rows wait for."""
        pairs = {(stage, row.ahead) for row in self._with_batch(rows) for stage in row.after}
        return [event for pair, event in self.events.items() if pair in pairs]

    def recording(self, rows: Sequence[Row]) -> Recording | None:
        """That of the ring's position, if every batch is there and whole, so that its shapes never change."""
        chosen = self._with_batch(rows)
        if self._timed() is not None or len(chosen) < len(rows) or not all(self._flight(row).whole for row in chosen):
            return None
        return self.ring[self.number % len(self.ring)].recording.over([self._flight(row).form for row in chosen])

    def _with_batch(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if 0 <= self.number + row.ahead < self.issued]

    def _flight(self, row: Row) -> Flight:
        return self.ring[(self.number + row.ahead) % len(self.ring)]

    def _work(self, row: Row) -> Callable[[], None]:
        work, clock = partial(self.stages.run, row.stage, self._flight(row)), self._timed()
        return work if clock is None else partial(clock.run, row, self.number + row.ahead, work)

    def _timed(self) -> Clock | None:
        return self.clock if self.clock is not None and self.clock.times(self.number) else None
