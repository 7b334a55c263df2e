"""The executor: every stage of every batch runs once, in an order that keeps all waits."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.device import Recording
from dlrm.host_streams import DoneEvent, InlineStream
from pipeline.schedule import (
    EVAL_OVERLAPPED,
    EVAL_SEQUENTIAL,
    TRAIN_OVERLAPPED,
    TRAIN_SEQUENTIAL,
    Row,
    at_depth,
    execute,
    ring_size,
)
from pipeline.stages import FIELDS, S, Stages

AHEAD = (
    Row(S.upload, "copy", ahead=2),
    Row(S.input_dist, "comm", after=(S.upload,), ahead=1),
    Row(S.lookup, "embedding", after=(S.input_dist,)),
    Row(S.top_forward, "main", after=(S.lookup,)),
)


class InlineDevice:
    """Runs everything at once, in the order in which it is issued."""

    @contextmanager
    def streams(self, names):
        yield InlineStream()

    def record(self):
        return DoneEvent()


class RecordingStages:
    def __init__(self):
        self.runs = []

    def run(self, stage, flight):
        self.runs.append((stage, flight.number))


class FakeFlight:
    number = None
    whole = False
    recording = None
    form = 0

    def accept(self, number):
        self.number = number


def run_schedule(rows, count):
    stages = RecordingStages()
    ring = [FakeFlight() for _ in range(ring_size(rows))]
    flights = execute(rows, stages=stages, ring=ring, batches=iter(range(count)), device=InlineDevice())
    return stages.runs, [flight.number for flight in flights]


TABLES = [
    *(TRAIN_SEQUENTIAL, EVAL_SEQUENTIAL, AHEAD),
    *(at_depth(rows, depth) for rows in (TRAIN_OVERLAPPED, EVAL_OVERLAPPED) for depth in range(1, 5)),
]


@given(count=st.integers(0, 9), rows=st.sampled_from(TABLES))
def test_every_stage_of_every_batch_runs_once_after_what_it_waits_for(count, rows):
    runs, yielded = run_schedule(rows, count)
    assert yielded == list(range(count))
    assert sorted(runs) == sorted((row.stage, number) for row in rows for number in range(count))
    place = {run: index for index, run in enumerate(runs)}
    for row in rows:
        for number in range(count):
            for stage in row.after:
                assert place[stage, number] < place[row.stage, number]


def test_batches_ahead_are_issued_ahead():
    runs, _ = run_schedule(AHEAD, 4)
    assert runs.index((S.upload, 2)) < runs.index((S.top_forward, 0))
    assert runs.index((S.upload, 3)) > runs.index((S.top_forward, 0))


class NotingStreams(InlineStream):
    def __init__(self):
        self.recordings = []

    def repeat(self, issue, after, recording):
        self.recordings.append(recording)
        super().repeat(issue, after, recording)


class NotingDevice(InlineDevice):
    def __init__(self):
        self.noted = NotingStreams()

    @contextmanager
    def streams(self, names):
        yield self.noted


@pytest.mark.parametrize("partial_batch", [None, 5, 0])
def test_a_tick_may_be_recorded_where_every_batch_of_it_is_whole(partial_batch):
    ring = [FakeFlight() for _ in range(ring_size(AHEAD))]
    for flight in ring:
        flight.recording = Recording()
    places = {id(flight.recording): place for place, flight in enumerate(ring)} | {id(None): None}

    def batches():
        for number in range(6):
            ring[number % len(ring)].whole = number != partial_batch
            yield number

    device = NotingDevice()
    for _ in execute(AHEAD, stages=RecordingStages(), ring=ring, batches=batches(), device=device):
        pass
    # Ticks -2 and -1 fill the ring; tick k has batch k + 1 behind its upload, and the last one drains.
    expected = [None, None, 0, 1, 2, 0, 1, None]
    for tick in range(-2, 6):
        if partial_batch in (tick, tick + 1):
            expected[tick + 2] = None
    assert [places[id(recording)] for recording in device.noted.recordings] == expected


def test_the_ring_holds_one_flight_more_than_the_batches_ahead():
    assert ring_size(TRAIN_SEQUENTIAL) == 1
    assert ring_size(AHEAD) == 3
    assert [ring_size(at_depth(TRAIN_OVERLAPPED, depth)) for depth in range(1, 5)] == [1, 2, 3, 4]


def test_every_stage_declares_its_fields_and_exists():
    assert set(FIELDS) == set(S)
    assert all(callable(getattr(Stages, stage)) for stage in S)
