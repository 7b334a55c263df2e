"""The steps and evaluation batches of a run that are looked at closely: what ``trace`` in the config chooses.

``trace/train.json`` and ``trace/eval.json`` in the run's folder open in https://ui.perfetto.dev; the report draws them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlrm.config import TraceConfig
from dlrm.device import Device
from embedding.comm import Comm
from pipeline.page import replace_file
from pipeline.trace import StageClock, Timeline, chrome_trace, gather_runs, overlap_of, runs_of

_FOLDER = "trace"
_MOST_DRAWN = 6
"""Steps of one picture: more are too narrow to read."""


class RunTrace:
    """Timelines of one run (all methods are collective).

    Attributes:
        clock: of the training.
    """

    def __init__(self, config: TraceConfig, *, device: Device, comm: Comm, directory: Path) -> None:
        """Time nothing closely yet.

        Raises:
            ConfigError: NVTX is wanted, and not there.
        """
        self._config, self._device, self._comm = config, device, comm
        self._folder = directory / _FOLDER
        self._ranges = None
        if config.nvtx:
            from pipeline.profiler import nvtx_ranges

            self._ranges = nvtx_ranges()
        self.clock = StageClock(device, ranges=self._ranges)
        self._evaluation: Timeline | None = None

    def start_training(self, done: int) -> None:
        """Training begins, behind so many steps."""
        ticks = [step - done - 1 for step in self._config.steps if step > done]
        self.clock.timeline = Timeline(self._device, ticks, done + 1) if ticks else None
        self.after_step(done)

    def after_step(self, step: int) -> None:
        """A step has ended, and the next one may be chosen."""
        if self.clock.timeline is None:
            return
        if not len(self.clock.timeline) and step + 1 in self._config.steps:
            self._share_start(self.clock.timeline)
        if step == max(self._config.steps):
            self._end_training()

    def evaluation(self, *, closing: bool = False) -> StageClock | None:
        """A clock for the evaluation that begins; ``None``: nobody asks.

        Args:
            closing: it is the run's last one, which is looked at only if no other was.
        """
        if not self._config.eval_batches or (closing and self._evaluation is not None):
            return None if self._ranges is None else StageClock(self._device, ranges=self._ranges)
        ticks = [batch - 1 for batch in self._config.eval_batches]
        self._evaluation = Timeline(self._device, ticks, 1)
        self._share_start(self._evaluation)
        return StageClock(self._device, self._evaluation, self._ranges)

    def write(self) -> None:
        """Write what has been timed and not been written."""
        self._end_training()
        if self._evaluation is not None:
            self._write("eval", self._evaluation)
            self._evaluation = None

    def _end_training(self) -> None:
        timeline, self.clock.timeline = self.clock.timeline, None
        if timeline is not None and len(timeline):
            self._write("train", timeline)

    def _share_start(self, timeline: Timeline) -> None:
        self._comm.barrier()
        timeline.start()

    def _write(self, what: str, timeline: Timeline) -> None:
        ranks = gather_runs(timeline, self._comm)
        if self._comm.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._folder / f"{what}.json", json.dumps(chrome_trace(ranks)))


def read_lanes(directory: Path) -> dict[str, Any]:
    """What a report draws of a run's traces: rank 0's lanes by ``train`` and ``eval``, those that are there.

    Returns:
        JSON values: the numbers of ``overlap_of``, and the runs of the first chosen steps that follow each other.
    """
    lanes: dict[str, Any] = {}
    for what in ("train", "eval"):
        path = directory / _FOLDER / f"{what}.json"
        if not path.is_file():
            continue
        runs = runs_of(json.loads(path.read_text(encoding="utf-8")))
        ticks = sorted({run.tick for run in runs})
        drawn = [tick for place, tick in enumerate(ticks) if tick - ticks[0] == place][:_MOST_DRAWN]
        lanes[what] = {
            **overlap_of(runs),
            "ticks": ticks,
            "runs": [
                {
                    "stage": str(run.stage),
                    "batch": run.number,
                    "tick": run.tick,
                    "start_ms": 1e3 * run.start,
                    "end_ms": 1e3 * run.end,
                }
                for run in runs
                if run.tick in drawn
            ],
        }
    return lanes
