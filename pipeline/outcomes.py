"""The losses of steps that have been issued, looked at by all ranks alike."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import numpy as np

from dlrm.errors import CrosslaneError
from embedding.comm import Comm
from pipeline import stop
from pipeline.stages import Outcome


class RanOverError(Exception):
    """The exchange of a step ran over its lists: it and the steps behind it have changed nothing.

    Attributes:
        step: its number.
        rows: of all ranks in the steps that were issued for nothing.
    """

    def __init__(self, step: int, rows: int) -> None:
        super().__init__(f"step {step}")
        self.step, self.rows = step, rows


class Outcomes:
    """What came of the last steps (all methods but ``add`` are collective).

    Attributes:
        loss: of the last step that was looked at, of all ranks.
    """

    def __init__(self, comm: Comm, scored: Callable[[], bool], lr: float) -> None:
        """None yet.

        Args:
            comm: all ranks.
            scored: whether this rank has the metrics of an evaluation under way.
            lr: for the error message.
        """
        self.loss = 0.0
        self._comm, self._scored, self._lr = comm, scored, lr
        self._control = np.zeros(3)
        self._issued: deque[tuple[int, int, Outcome]] = deque()

    def add(self, step: int, rows: int, outcome: Outcome) -> None:
        """A step has been issued.

        Args:
            step: its number.
            rows: of its global batch.
            outcome: what came of it.
        """
        self._issued.append((step, rows, outcome))

    def look(self, behind: int) -> tuple[bool, bool]:
        """Look at the losses of all steps but the last ``behind``; (whether to stop, whether all have scored).

        Raises:
            CrosslaneError: a loss is not a number.
            RanOverError: on every rank, where a step has to be done again; it and those behind it are forgotten.
        """
        stopping = scored = False
        if len(self._issued) <= behind:
            _, stopping, scored = self._agree(0.0)
        while len(self._issued) > behind:
            step, _, outcome = self._issued[0]
            if outcome.overflowed():
                over = RanOverError(step, sum(rows for _, rows, _ in self._issued))
                self._issued.clear()
                raise over
            self._issued.popleft()
            self.loss, stop_now, scored_now = self._agree(outcome.loss())
            stopping, scored = stopping or stop_now, scored or scored_now
            if not math.isfinite(self.loss):
                raise CrosslaneError(
                    f"loss is {self.loss} at step {step}; lower optimizer.lr (now {self._lr}) or "
                    f"lengthen learning_rate.warmup_steps; the last checkpoint is kept"
                )
        return stopping, scored

    def _agree(self, loss: float) -> tuple[float, bool, bool]:
        """Sum of the losses, whether any rank was asked to stop, whether all have scored: one all-reduce a step."""
        self._control[:] = loss, stop.requested(), self._scored()
        self._comm.all_reduce(self._control).wait()
        return float(self._control[0]), bool(self._control[1]), self._control[2] == self._comm.size
