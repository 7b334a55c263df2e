"""When the stages of a run ran: means for progress records, and a timeline of chosen steps.

A timeline becomes Chrome's trace format, which https://ui.perfetto.dev opens.
Times of ranks count from a barrier that all of them have left. A tick begins once the one before has ended, so that
chosen ticks show everything that was at work in them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import Any, TypeAlias

from dlrm.device import Device, Mark
from embedding.comm import Comm, all_gather_bytes
from pipeline.schedule import Row
from pipeline.stages import S

DENSE_LANE = frozenset(
    {S.bottom_forward, S.top_forward, S.loss, S.top_backward, S.bottom_backward, S.top_weight_backward, S.dense_update}
)
EMBEDDING_LANE = frozenset(
    {S.input_dist, S.lookup, S.output_dist, S.sum_replicated, S.grad_dist, S.reduce_replicated, S.sparse_update}
)
"""Upload and the dense all-reduce belong to neither lane."""


Ranges: TypeAlias = Callable[[str], AbstractContextManager[Any]]
"""Names what is done inside it, for a profiler."""


class StageClock:
    """Seconds spent per stage since the last reading, and a timeline where one is kept.

    Where steps are replayed (GPUs), only those of the timeline are timed, since these are issued instead.
    """

    def __init__(self, device: Device, timeline: Timeline | None = None, ranges: Ranges | None = None) -> None:
        """Start at zero; ``ranges`` gets the name of every stage that is timed."""
        self.timeline = timeline
        self._device, self._ranges = device, ranges
        self._replays = device.steps_behind > 0
        self._seconds: defaultdict[S, float] = defaultdict(float)
        self._runs: defaultdict[S, int] = defaultdict(int)
        self._ahead: list[tuple[S, Mark, Mark]] = []

    def times(self, tick: int) -> bool:
        """See ``schedule.Clock``."""
        return not self._replays or (self.timeline is not None and tick in self.timeline.ticks)

    def run(self, row: Row, number: int, work: Callable[[], None]) -> None:
        """See ``schedule.Clock``. A stage always runs on the same stream, hence never twice at once."""
        start = self._device.mark()
        if self._ranges is None:
            work()
        else:
            with self._ranges(f"{row.stage} {number}"):
                work()
        end = self._device.mark()
        if self._replays:
            self._ahead.append((row.stage, start, end))  # not there yet
        else:
            self._count(row.stage, start, end)
        if self.timeline is not None:
            self.timeline.add(row, number, start, end)

    def take_ms(self) -> dict[str, float]:
        """Mean milliseconds of a run by stage since the last call, in the order of the stages."""
        ahead, self._ahead = self._ahead, []
        for span in ahead:
            self._count(*span)
        seconds, runs = dict(self._seconds), dict(self._runs)
        self._seconds.clear()
        self._runs.clear()
        return {str(stage): 1e3 * seconds[stage] / runs[stage] for stage in S if stage in seconds}

    def _count(self, stage: S, start: Mark, end: Mark) -> None:
        self._seconds[stage] += self._device.elapsed(start, end)
        self._runs[stage] += 1


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a stage.

    Attributes:
        stage: which.
        stream: where.
        number: of the batch.
        tick: number of the batch that the schedule had come to, with which the tick ends.
        start: seconds.
        end: seconds.
    """

    stage: S
    stream: str
    number: int
    tick: int
    start: float
    end: float


class Timeline:
    """All runs of some ticks of a schedule: of the batch with which each ends, and of those further ahead."""

    def __init__(self, device: Device, ticks: Iterable[int], first: int = 0) -> None:
        """Keep these ticks, counted from 0.

        Args:
            device: whose clock it is.
            ticks: which.
            first: what the batch of tick 0 is called.
        """
        self.ticks = frozenset(ticks)
        self._device, self._first = device, first
        self._zero = device.mark()
        self._spans: list[tuple[Row, int, Mark, Mark]] = []

    def __len__(self) -> int:
        """Runs that it has."""
        return len(self._spans)

    def start(self) -> None:
        """Count times from now on: a moment that all ranks share."""
        self._zero = self._device.mark()

    def add(self, row: Row, number: int, start: Mark, end: Mark) -> None:
        """Keep a run of batch ``number``, from 0, if it belongs to one of the ticks."""
        if number - row.ahead in self.ticks:
            self._spans.append((row, number, start, end))

    def runs(self) -> list[Run]:
        """What was kept, in the order of the starts."""
        found = [
            Run(
                row.stage,
                row.stream,
                self._first + number,
                self._first + number - row.ahead,
                self._device.elapsed(self._zero, start),
                self._device.elapsed(self._zero, end),
            )
            for row, number, start, end in self._spans
        ]
        return sorted(found, key=lambda run: run.start)


def gather_runs(timeline: Timeline, comm: Comm) -> list[list[Run]]:
    """Every rank's runs by rank (collective)."""
    parts = all_gather_bytes(comm, json.dumps([astuple(run) for run in timeline.runs()]).encode())
    return [[Run(S(stage), *rest) for stage, *rest in json.loads(part)] for part in parts]


def chrome_trace(ranks: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """Chrome's trace format: a process for each rank, a thread for each stream, arrows where the lanes cross.

    Args:
        ranks: runs by rank.

    Returns:
        JSON values; ``otherData`` has rank 0's ``overlap_of``.
    """
    events: list[dict[str, Any]] = []
    for rank, runs in enumerate(ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        streams = list(dict.fromkeys(run.stream for run in runs))
        for thread, stream in enumerate(streams):
            names = {"name": f"stream {stream}"}
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": names})
        events += [
            {
                "ph": "X",
                "name": str(run.stage),
                "cat": lane_of(run.stage),
                "pid": rank,
                "tid": streams.index(run.stream),
                "ts": 1e6 * run.start,
                "dur": 1e6 * (run.end - run.start),
                "args": {"batch": run.number, "tick": run.tick},
            }
            for run in runs
        ]
        for number, (giver, taker) in enumerate(crossings(runs)):
            common = {"name": "crossing", "cat": "crossing", "id": f"{rank}.{number}", "pid": rank}
            left, right = streams.index(giver.stream), streams.index(taker.stream)
            events.append({"ph": "s", "tid": left, "ts": 1e6 * giver.end, **common})
            events.append({"ph": "f", "bp": "e", "tid": right, "ts": 1e6 * taker.start, **common})
    overlap = overlap_of(ranks[0]) if ranks else {}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"overlap": overlap}}


def crossings(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Where one lane hands a batch to the other: who gives, who takes."""
    found = {(run.stage, run.number): run for run in runs}
    return [
        (found[giver, number], found[taker, number])
        for giver, taker in ((S.output_dist, S.top_forward), (S.top_backward, S.grad_dist))
        for number in dict.fromkeys(run.number for run in runs)
        if (giver, number) in found and (taker, number) in found
    ]


def runs_of(trace: Mapping[str, Any], rank: int = 0) -> list[Run]:
    """One rank's runs out of what ``chrome_trace`` returned."""
    events = [event for event in trace["traceEvents"] if event["pid"] == rank]
    streams = {
        event["tid"]: event["args"]["name"].removeprefix("stream ")
        for event in events
        if event["name"] == "thread_name"
    }
    return [
        Run(
            S(event["name"]),
            streams[event["tid"]],
            event["args"]["batch"],
            event["args"]["tick"],
            event["ts"] / 1e6,
            (event["ts"] + event["dur"]) / 1e6,
        )
        for event in events
        if event["ph"] == "X"
    ]


def lane_of(stage: S) -> str:
    """``dense``, ``embedding`` or ``other``."""
    return "dense" if stage in DENSE_LANE else "embedding" if stage in EMBEDDING_LANE else "other"


def overlap_of(runs: Sequence[Run]) -> dict[str, float | None]:
    """How much the lanes of one rank ran beside each other.

    Returns:
        ``dense_ms``, ``embedding_ms``: time in which each lane was at work; ``both_ms``: time in which both were,
        which one after the other would have taken longer; ``ratio``: of that to the shorter lane, ``None`` where a lane
        did nothing.
    """
    lanes = {name: _at_work(runs, name) for name in ("dense", "embedding")}
    busy = {name: sum(end - start for start, end in spans) for name, spans in lanes.items()}
    both = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in lanes["dense"]
        for other_start, other_end in lanes["embedding"]
    )
    shorter = min(busy.values())
    return {
        "dense_ms": 1e3 * busy["dense"],
        "embedding_ms": 1e3 * busy["embedding"],
        "both_ms": 1e3 * both,
        "ratio": both / shorter if shorter > 0 else None,
    }


def idle_of(runs: Sequence[Run], lane: str) -> list[tuple[float, float]]:
    """When a lane of one rank was not at work, between the first start and the last end of any run."""
    if not runs:
        return []
    at, end = min(run.start for run in runs), max(run.end for run in runs)
    gaps = []
    for start, stop in [*_at_work(runs, lane), (end, end)]:
        if start > at:
            gaps.append((at, start))
        at = max(at, stop)
    return gaps


def _at_work(runs: Sequence[Run], lane: str) -> list[tuple[float, float]]:
    return _union([(run.start, run.end) for run in runs if lane_of(run.stage) == lane])


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans of time joined where they meet."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined
