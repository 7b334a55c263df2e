"""When the stages of a run ran: means for progress records, and a timeline of chosen batches."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from pipeline.schedule import Row
from pipeline.stages import S


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
        start: reading of ``time.perf_counter``.
        end: likewise.
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
