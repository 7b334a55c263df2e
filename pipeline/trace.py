"""When the stages of a run ran: means for progress records, and a timeline of chosen batches.

A timeline becomes Chrome's trace format, which https://ui.perfetto.dev opens.
Times of ranks count from a barrier that all of them have left.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedding.comm import Comm, all_gather_bytes
from pipeline.schedule import Row
from pipeline.stages import S

DENSE_LANE = frozenset(
    {S.bottom_forward, S.top_forward, S.loss, S.top_backward, S.bottom_backward, S.top_weight_backward, S.dense_update}
)
EMBEDDING_LANE = frozenset({S.input_dist, S.lookup, S.output_dist, S.grad_dist, S.sparse_update})
"""Upload and the dense all-reduce belong to neither lane."""


class StageClock:
    """Seconds spent per stage since the last reading, and a timeline where one is kept."""

    def __init__(self, timeline: Timeline | None = None) -> None:
        """Start at zero."""
        self.timeline = timeline
        self._seconds: defaultdict[S, float] = defaultdict(float)

    def add(self, row: Row, number: int, start: float, end: float) -> None:
        """See ``schedule.Clock``. A stage always runs on the same stream, hence never twice at once."""
        self._seconds[row.stage] += end - start
        if self.timeline is not None:
            self.timeline.add(row, number, start, end)

    def take_ms(self, steps: int) -> dict[str, float]:
        """Mean milliseconds per step by stage since the last call, in the order of the stages."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return {str(stage): 1e3 * seconds[stage] / max(steps, 1) for stage in S if stage in seconds}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a stage.

    Attributes:
        stage: which.
        stream: where.
        number: of the batch, from 0.
        start: seconds.
        end: seconds.
    """

    stage: S
    stream: str
    number: int
    start: float
    end: float


class Timeline:
    """The runs of some batches."""

    def __init__(self, first: int, count: int) -> None:
        """Keep batches ``first`` to ``first + count``, counted from 0."""
        self.runs: list[Run] = []
        self._numbers = range(first, first + count)

    def add(self, row: Row, number: int, start: float, end: float) -> None:
        """See ``schedule.Clock``."""
        if number in self._numbers:
            self.runs.append(Run(row.stage, row.stream, number, start, end))


def gather_runs(timeline: Timeline, comm: Comm, zero: float) -> list[list[Run]]:
    """Every rank's runs by rank, in the order of their starts (collective).

    Args:
        timeline: this rank's.
        comm: all ranks.
        zero: reading of ``time.perf_counter`` here at a moment that all ranks share.
    """
    own = [(run.stage, run.stream, run.number, run.start - zero, run.end - zero) for run in timeline.runs]
    parts = all_gather_bytes(comm, json.dumps(own).encode())
    return [
        sorted((Run(S(stage), *rest) for stage, *rest in json.loads(part)), key=lambda run: run.start) for part in parts
    ]


def chrome_trace(ranks: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """Chrome's trace format: a process for each rank, a thread for each stream.

    Args:
        ranks: runs by rank.

    Returns:
        JSON values; ``overlap_ratio`` is rank 0's.
    """
    events: list[dict[str, Any]] = []
    for rank, runs in enumerate(ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
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
                "args": {"batch": run.number},
            }
            for run in runs
        ]
    ratio = overlap_of(ranks[0])["ratio"] if ranks else None
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"overlap_ratio": ratio}}


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
    """How much the lanes ran beside each other.

    Returns:
        ``dense_ms``, ``embedding_ms``: time in which each lane was at work; ``both_ms``: time in which both were,
        which one after the other would have taken longer; ``ratio``: of that to the shorter lane, ``None`` where a lane
        did nothing.
    """
    lanes = {
        name: _union([(run.start, run.end) for run in runs if lane_of(run.stage) == name])
        for name in ("dense", "embedding")
    }
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


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans of time joined where they meet."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined
