"""What the training rate of a progress record is taken from: samples and seconds since the record before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class RateWindow:
    """Samples and seconds since the last record, without pauses and without a process's first steps.

    In those kernels are compiled where they are not cached, and on a GPU measured and captured.
    """

    def __init__(self, cold_steps: int) -> None:
        """Leave the first ``cold_steps`` of this process out."""
        self._cold_steps = cold_steps
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._start = time.perf_counter()
        self._samples = self._cold_samples = 0
        self._cold_seconds = 0.0

    def add(self, samples: int) -> None:
        """A step has been issued."""
        self._samples += samples

    def warm_up(self, samples: int, settle: Callable[[], object]) -> None:
        """The same step is known to be sound; after the last one to be left out, ``settle`` waits for its end."""
        if self._cold_steps:
            self._cold_steps -= 1
            if not self._cold_steps:
                settle()
            self._cold_seconds = time.perf_counter() - self._start
            self._cold_samples += samples

    def take_back(self, samples: int) -> None:
        """Steps that have to be done again."""
        self._samples -= samples
        if self._cold_samples:
            self.reset()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what happens inside out."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def take(self) -> tuple[int, float]:
        """Samples and their seconds; the next window begins."""
        seconds = time.perf_counter() - self._start - self._cold_seconds
        samples = self._samples - self._cold_samples
        self.reset()
        return samples, seconds
