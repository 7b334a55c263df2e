"""Timelines: chosen ticks whole, Chrome's format as its specification has it, lanes that are joined and told apart."""

from __future__ import annotations

import json
import re
import sys
import types
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dlrm.device import Recording
from dlrm.errors import ConfigError
from dlrm.host_streams import DoneEvent, InlineStream
from embedding.comm import SingleComm
from pipeline.lanes_chart import caption, lanes_chart
from pipeline.profiler import nvtx_ranges
from pipeline.run_trace import read_lanes
from pipeline.schedule import (
    EVAL_OVERLAPPED,
    TRAIN_EXCHANGED,
    TRAIN_OVERLAPPED,
    TRAIN_SEQUENTIAL,
    at_depth,
    execute,
    ring_size,
)
from pipeline.stages import S
from pipeline.trace import (
    Run,
    StageClock,
    Timeline,
    chrome_trace,
    gather_runs,
    idle_of,
    lane_of,
    overlap_of,
    runs_of,
)

sys.path.insert(0, str(Path(__file__).parent))

from trace_events import check_trace_events


class TickingDevice:
    """Streams that run inline; the clock moves on by 1 s at every look at it."""

    def __init__(self, *, replays=False):
        self.now, self.steps_behind = 0.0, int(replays)
        self.recordings = []

    def mark(self):
        self.now += 1.0
        return self.now

    def elapsed(self, start, end):
        return end - start

    @contextmanager
    def streams(self, names):
        yield self

    def issue(self, stream, work, after=()):
        return InlineStream().issue(stream, work, after)

    def repeat(self, issue, after, recording):
        self.recordings.append(recording)
        issue()

    def join(self, events):
        pass

    def record(self):
        return DoneEvent()


class QuietStages:
    def __init__(self):
        self.inside, self.seen = [], []

    def run(self, stage, flight):
        self.seen.append((stage, flight.number, *self.inside))


class FakeFlight:
    whole = True
    recording = Recording()
    form = 0

    def accept(self, number):
        self.number = number


def run_schedule(rows, batches, clock, device, stages=None):
    ring = [FakeFlight() for _ in range(ring_size(rows))]
    for _ in execute(
        rows, stages=stages or QuietStages(), ring=ring, batches=iter(range(batches)), device=device, clock=clock
    ):
        pass


@pytest.mark.parametrize("rows", [TRAIN_SEQUENTIAL, at_depth(TRAIN_OVERLAPPED, 4), at_depth(EVAL_OVERLAPPED, 2)])
def test_chosen_ticks_are_kept_whole(rows, rng):
    device = TickingDevice()
    chosen = sorted(rng.choice(np.arange(1, 12), 4, replace=False).tolist())
    timeline = Timeline(device, chosen, 100)
    run_schedule(rows, 20, StageClock(device, timeline), device)
    found = [(run.stage, run.number, run.tick) for run in timeline.runs()]
    expected = [(row.stage, 100 + tick + row.ahead, 100 + tick) for tick in chosen for row in rows]
    assert sorted(found) == sorted(expected)
    assert all(left.start < left.end <= right.start for left, right in pairwise(timeline.runs()))


def test_a_stage_that_runs_twice_is_a_mean_and_the_next_reading_starts_again():
    device = TickingDevice()
    clock = StageClock(device)
    assert clock.take_ms() == {}
    run_schedule(TRAIN_SEQUENTIAL, 3, clock, device)
    assert clock.take_ms() == dict.fromkeys(S, 1000.0)
    assert clock.take_ms() == {}


def test_where_steps_are_replayed_only_chosen_ones_are_issued_and_timed():
    device = TickingDevice(replays=True)
    clock = StageClock(device, Timeline(device, {2, 3}))
    run_schedule(TRAIN_SEQUENTIAL, 6, clock, device)
    assert [bool(recording) for recording in device.recordings[:6]] == [True, True, False, False, True, True]
    assert {run.tick for run in clock.timeline.runs()} == {2, 3}
    assert clock.take_ms() == dict.fromkeys(S, 1000.0)


def random_runs(rng, count=60):
    """Runs of all stages at random times, each stage on a stream of its own."""
    runs = []
    for number in range(count):
        start = rng.uniform(0, 30)
        stage = list(S)[number % len(S)]
        runs.append(Run(stage, f"s-{stage}", number // len(S), number // len(S), start, start + rng.exponential(0.5)))
    return sorted(runs, key=lambda run: run.start)


def test_overlap_and_idle_time_are_what_sampling_finds(rng):
    """Lanes on a fine grid: the union of runs, one class against the other."""
    runs = random_runs(rng)
    start, end = min(run.start for run in runs), max(run.end for run in runs)
    middles = start + (np.arange(400_000) + 0.5) * (end - start) / 400_000
    step_ms = 1e3 * (end - start) / 400_000
    work = {lane: np.zeros(len(middles), bool) for lane in ("dense", "embedding", "other")}
    for run in runs:
        work[lane_of(run.stage)] |= (middles >= run.start) & (middles < run.end)
    found = overlap_of(runs)
    tolerance = step_ms * 2 * len(runs)
    assert found["dense_ms"] == pytest.approx(step_ms * work["dense"].sum(), abs=tolerance)
    assert found["embedding_ms"] == pytest.approx(step_ms * work["embedding"].sum(), abs=tolerance)
    assert found["both_ms"] == pytest.approx(step_ms * (work["dense"] & work["embedding"]).sum(), abs=tolerance)
    assert found["ratio"] == pytest.approx(found["both_ms"] / min(found["dense_ms"], found["embedding_ms"]))
    for lane in ("dense", "embedding"):
        gaps = idle_of(runs, lane)
        assert 1e3 * sum(stop - begin for begin, stop in gaps) == pytest.approx(
            1e3 * (end - start) - found[f"{lane}_ms"]
        )


def test_a_lane_that_did_nothing_has_no_ratio():
    assert overlap_of([])["ratio"] is None
    assert overlap_of([Run(S.lookup, "main", 0, 0, 0.0, 1.0)])["ratio"] is None


@pytest.mark.parametrize("rows", [TRAIN_SEQUENTIAL, at_depth(TRAIN_EXCHANGED, 3), at_depth(EVAL_OVERLAPPED, 3)])
def test_the_trace_is_in_chromes_format_and_says_what_ran(rows):
    device = TickingDevice()
    timeline = Timeline(device, {3, 4, 5}, 1)
    run_schedule(rows, 12, StageClock(device, timeline), device)
    runs = gather_runs(timeline, SingleComm())
    trace = chrome_trace([runs[0], runs[0]])
    assert check_trace_events(trace) > 0
    again = runs_of(trace, rank=1)
    assert [(run.stage, run.stream, run.number, run.tick) for run in again] == [
        (run.stage, run.stream, run.number, run.tick) for run in runs[0]
    ]
    np.testing.assert_allclose([run.end for run in again], [run.end for run in runs[0]], rtol=1e-12)


def write_trace(folder, runs):
    (folder / "trace").mkdir()
    (folder / "trace" / "train.json").write_text(json.dumps(chrome_trace([runs])))


def test_the_picture_has_every_run_every_gap_and_the_ratio(tmp_path):
    device = TickingDevice()
    timeline = Timeline(device, {3, 4, 5, 9}, 1)
    run_schedule(at_depth(TRAIN_OVERLAPPED, 3), 12, StageClock(device, timeline), device)
    write_trace(tmp_path, timeline.runs())
    lanes = read_lanes(tmp_path)["train"]
    assert lanes["ticks"] == [4, 5, 6, 10]
    assert {run["tick"] for run in lanes["runs"]} == {4, 5, 6}  # one after the other: what can be drawn
    assert len(lanes["runs"]) == 3 * len(S)
    assert lanes["ratio"] == 0.0  # this device does one thing at a time
    assert f"overlap ratio {lanes['ratio']:.2f}" in caption(lanes)
    picture = lanes_chart(lanes, "x", "step")
    assert picture.count('class="run tone-') == len(lanes["runs"]) + 4  # and the legend
    drawn = [run for run in timeline.runs() if run.tick < 10]
    gaps = sum(len(idle_of(drawn, lane)) for lane in ("dense", "embedding"))
    assert picture.count('class="idle"') == gaps + 1
    both = {(run.stage, run.number) for run in drawn}
    numbers = {run.number for run in drawn}
    bands = sum({(S.output_dist, n), (S.top_forward, n)} <= both for n in numbers)
    bands += sum({(S.top_backward, n), (S.grad_dist, n)} <= both for n in numbers)
    assert picture.count('class="crossing"') == bands == 6


def test_batches_that_share_the_dense_lane_are_drawn_beside_each_other(tmp_path):
    """On one GPU the bottom layers of a batch run beside the top layers of the one before."""
    runs = [
        Run(S.top_forward, "dense", 4, 4, 0.0, 0.004), Run(S.bottom_forward, "ahead", 5, 4, 0.001, 0.002),
        Run(S.top_forward, "dense", 5, 5, 0.004, 0.005),
    ]  # fmt: skip
    write_trace(tmp_path, runs)
    picture = lanes_chart(read_lanes(tmp_path)["train"], "x", "step")
    bars = re.findall(r'<rect class="run tone-b[^"]*" x="[^"]*" y="([^"]*)" width="[^"]*" height="([^"]*)"', picture)
    (top, half), (ahead, also), (alone, whole) = ([float(number) for number in bar] for bar in bars[:3])
    assert half == also == whole / 2
    assert top == ahead + half
    assert alone == ahead


def test_nothing_traced_draws_nothing(tmp_path):
    assert read_lanes(tmp_path) == {}
    write_trace(tmp_path, [])
    assert lanes_chart(read_lanes(tmp_path)["train"], "x", "step") == ""


def test_ranges_name_what_is_timed(monkeypatch):
    """With NVIDIA's package, or CuPy's module where that is missing."""
    stages = QuietStages()

    @contextmanager
    def annotate(name):
        stages.inside.append(name)
        yield
        stages.inside.pop()

    package = types.ModuleType("nvtx")
    package.annotate = annotate
    cupy = types.ModuleType("cupy.cuda.nvtx")
    cupy.RangePush, cupy.RangePop = stages.inside.append, stages.inside.pop
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", types.ModuleType("cupy.cuda"))
    monkeypatch.setitem(sys.modules, "cupy.cuda.nvtx", cupy)
    for found in (package, None):
        monkeypatch.setitem(sys.modules, "nvtx", found)
        stages.seen = []
        device = TickingDevice()
        run_schedule(TRAIN_SEQUENTIAL, 2, StageClock(device, ranges=nvtx_ranges()), device, stages)
        assert stages.seen == [(stage, number, f"{stage} {number}") for number in range(2) for stage in S]
        assert stages.inside == []
    monkeypatch.setitem(sys.modules, "cupy.cuda.nvtx", None)
    with pytest.raises(ConfigError, match=r"trace\.nvtx"):
        nvtx_ranges()
