"""The clock of GPU benchmarks: captured work, each launch behind an emptied second-level cache, and a chip's own rates.

What a case is and how its floor comes about: benchmarks/README.md, gpu_kernels.py.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlrm.cuda import CudaDevice
from dlrm.errors import CrosslaneError

FLUSH_BYTES = 256 << 20
HALF, FLOAT = np.float16, np.float32


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to time.

    Attributes:
        name: what it is.
        run: issues it on the current stream.
        bytes: that have to cross the memory's pins once, whatever the order.
        flop: operations of its products.
    """

    name: str
    run: Callable[[], None]
    bytes: float
    flop: float = 0.0


@dataclass(frozen=True, slots=True)
class Figure:
    """A case's result; ``floor_us`` is the longer of the times that bytes and operations need at the GPU's rates."""

    group: str
    name: str
    us: float
    megabytes: float
    gigaflop: float
    floor_us: float

    @property
    def share(self) -> float:
        """Floor over time."""
        return self.floor_us / self.us


class Clock:
    """Times captured work on one GPU.

    Args:
        device: the GPU.
        repetitions: launches of which the median is taken.
    """

    def __init__(self, device: CudaDevice, repetitions: int) -> None:
        self.device, self.repetitions = device, repetitions
        self._flush = cupy.empty(FLUSH_BYTES, np.uint8)
        self.bytes_per_us = self.flop_per_us = 1.0
        self.bytes_per_us = self._copy_rate(1 << 30)
        self.flop_per_us = self._product_rate(8192)

    def _copy_rate(self, size: int) -> float:
        source, target = cupy.zeros(size // 4, FLOAT), cupy.empty(size // 4, FLOAT)
        return 2 * size / self.median_us(lambda: cupy.copyto(target, source))

    def _product_rate(self, width: int) -> float:
        a = cupy.ones((width, width), HALF)
        out = cupy.empty_like(a)
        return 2 * width**3 / self.median_us(lambda: cupy.matmul(a, a, out=out), capture=False)

    def median_us(self, run: Callable[[], Any], *, capture: bool = True) -> float:
        """Microseconds on the GPU, each launch behind an emptied second-level cache."""
        for _ in range(3):
            run()  # compiles, chooses algorithms
        self.device.synchronize()
        launch = self.device.capture("main", run).launch if capture else run
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        times = []
        for _ in range(self.repetitions):
            self._flush.fill(0)
            begin.record()
            launch()
            end.record()
            end.synchronize()
            times.append(1000 * cupy.cuda.get_elapsed_time(begin, end))
        return statistics.median(times)

    def figure(self, group: str, case: Case) -> Figure:
        """Time a case."""
        floor = max(case.bytes / self.bytes_per_us, case.flop / self.flop_per_us)
        return Figure(group, case.name, self.median_us(case.run), case.bytes / 1e6, case.flop / 1e9, floor)


def show(figures: Sequence[Figure]) -> None:
    """Print figures as a table."""
    for item in figures:
        rate = item.megabytes * 1e3 / item.us
        print(
            f"{item.name:44}{item.us:10.1f}{item.megabytes:10.1f}{item.gigaflop:10.1f}{item.floor_us:10.1f}"
            f"{item.share:8.0%}{rate:8.0f}",
            flush=True,
        )


def time_cases(clock: Clock, group: str, cases: Iterator[Case]) -> list[Figure]:
    """Time cases one after the other; one that the project refuses is said so and left out."""
    print(f"\n{group}\n{'':44}{'us':>10}{'MB':>10}{'GFLOP':>10}{'floor us':>10}{'share':>8}{'GB/s':>8}", flush=True)
    figures = []
    while True:
        try:
            case = next(cases, None)
            if case is None:
                break
            figures.append(clock.figure(group, case))
            show(figures[-1:])
        except CrosslaneError as error:
            print(f"  left out: {error}", flush=True)
    return figures
