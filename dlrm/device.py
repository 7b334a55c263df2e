"""Where arrays live and which implementation of an operation runs: the seam between the mathematics and a machine.

The mathematics is written once against ``device.xp``. A fused operation asks ``device.kernel(__name__, "name")``
and runs the reference below it when the answer is ``None``.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np

from dlrm.host_streams import DoneEvent, host_streams, lane_threads

Array: TypeAlias = Any
"""An array of ``device.xp``: ``numpy.ndarray`` on the host."""

Kernel: TypeAlias = Callable[..., Any]

Mark: TypeAlias = Any
"""A moment in the order of a stream's work: ``Device.mark``."""

ALIGNMENT = 64
"""Bytes that arrays of the host start at a multiple of: a cache line, and the widest vector register."""


class Event(Protocol):
    """A point in a stream's order."""

    def done(self) -> bool:
        """Whether everything issued before it has ended."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until ``done()``."""
        ...


class Reading(Protocol):
    """Numbers on their way to the host."""

    def values(self) -> Array:
        """The host's copy; waits until it is there."""
        ...


class Device(Protocol):
    """One machine part that computes: its arrays, its streams and its kernels."""

    xp: ModuleType
    threads: int
    column_multiple: int
    """Matrices' columns are rounded up to a multiple of this."""
    fuses_relu: bool
    """Whether what makes a gradient also clears it where a ReLU was off, instead of a pass of its own."""
    steps_behind: int
    """How many steps the host may issue before it has to see a result; 0: results are there when a call returns."""

    @property
    def name(self) -> str:
        """What it is, for reports."""
        ...

    @property
    def host(self) -> HostDevice:
        """Runs what is done once and in host memory, such as drawing initial weights."""
        ...

    def kernel(self, module: str, name: str) -> Kernel | None:
        """The fused form of operation ``name`` of ``module``, or ``None``: run the reference."""
        ...

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised array on the device."""
        ...

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """An array of zeros on the device."""
        ...

    def free_memory(self) -> int | None:
        """Bytes that can be allocated; ``None`` where nobody has to ask before."""
        ...

    def relu_mask(self, rows: int, columns: int, training: bool) -> Array | None:
        """Room for what a backward pass has to know of a ReLU's output [rows, columns] besides the output."""
        ...

    def pinned_empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised host array that uploads read without another copy."""
        ...

    def upload(self, host: Array, out: Array) -> Array:
        """Copy a host array into the device array ``out``, in the order of the current stream; returns it."""
        ...

    def download(self, array: Array, out: Array) -> Array:
        """Copy a device array into the host array ``out``, in the order of the current stream; returns it."""
        ...

    def assign(self, host: Array, target: Array) -> None:
        """Write a host array into a device array of the same shape and any strides, converting; waits for it."""
        ...

    def convert(self, source: Array, target: Array) -> None:
        """``target = source`` between float types of the device; uint16 stands for the bits of bfloat16."""
        ...

    def to_host(self, array: Array) -> Array:
        """The array itself where the host can read it, else a copy in host memory."""
        ...

    def read_later(self, array: Array) -> Reading:
        """Start to copy a small array to the host, in the order of what was issued."""
        ...

    def mark(self) -> Mark:
        """The moment at which the current stream gets here; nothing that is replayed may hold one."""
        ...

    def elapsed(self, start: Mark, end: Mark) -> float:
        """Seconds between two marks; waits until both have been reached."""
        ...

    def streams(self, names: Sequence[str]) -> AbstractContextManager[Streams]:
        """In-order queues of these names, for as long as the ``with`` block lasts."""
        ...

    def record(self) -> Event:
        """The point that the current stream has reached."""
        ...

    def on(self, stream: str, after: Sequence[Event] = ()) -> AbstractContextManager[None]:
        """A place for work beside the schedule, in whatever thread.

        What the calling thread starts in the ``with`` block goes to ``stream``, behind ``after``, and has ended when
        the block is left; the thread waits for that stream alone.
        """
        ...


@dataclass(slots=True)
class Recording:
    """What ``Streams.repeat`` remembers of work that is issued again and again over the same arrays.

    Attributes:
        runs: how often the work was done over them.
        graph: of it.
        form: which arrays these are.
    """

    runs: int = 0
    graph: Any = None
    form: Any = None

    def over(self, form: Any) -> Recording:
        """Itself, having forgotten what was recorded over arrays of another form."""
        if form != self.form:
            self.form, self.runs, self.graph = form, 0, None
        return self


class Streams(Protocol):
    """In-order queues of work that run beside each other."""

    def issue(self, stream: str, work: Callable[[], None], after: Sequence[Event] = ()) -> Event:
        """Have ``work`` done on ``stream``: behind what was issued there before, and behind ``after``.

        ``work`` is called by the caller or by the stream's own thread; what it starts belongs to ``stream``.
        """
        ...

    def repeat(self, issue: Callable[[], Sequence[Event]], after: Sequence[Event], recording: Recording | None) -> None:
        """Call ``issue`` and join what it returns, or replay what it issued the last time.

        Args:
            issue: issues work on these streams and returns the events of all of it; what it starts reads all that
                changes from call to call out of arrays.
            after: events of work issued before, for which it waits.
            recording: of this work; ``None``: something is different this time.
        """
        ...

    def join(self, events: Sequence[Event]) -> None:
        """Order what is issued from now on, on whatever stream, behind ``events``; the host reads results behind it.

        Raises:
            Exception: what failed on any stream.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Copied:
    array: Array

    def values(self) -> Array:
        return self.array


class HostDevice:
    """The CPU: NumPy arrays, BLAS products, compiled kernels; streams are worker threads (``host_streams.py``).

    Args:
        threads: threads that BLAS and the compiled kernels may use; ``None``: leave their settings.
        compiled: ``False``: never hand out a kernel, so that the references run (tests).
    """

    xp: ModuleType = np
    name = "CPU"
    column_multiple = 1
    fuses_relu = False
    steps_behind = 0

    def __init__(self, threads: int | None = None, *, compiled: bool = True) -> None:
        self.compiled = compiled
        self.threads = threads or 1
        self._lanes = lane_threads(threads) if compiled and threads is not None else None
        self._kernels: dict[tuple[str, str], Kernel | None] = {}
        if compiled and threads is not None:
            import numba  # here: half a second that a reference run need not pay

            # numba refuses more threads than it was started with.
            started: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
            numba.set_num_threads(max(1, min(threads, started)))

    @property
    def host(self) -> HostDevice:
        """This one."""
        return self

    def kernel(self, module: str, name: str) -> Kernel | None:
        """The compiled function ``name`` of ``<module>_numba``, or ``None`` where there is none."""
        if not self.compiled:
            return None
        key = (module, name)
        if key not in self._kernels:
            self._kernels[key] = self._find(module, name)
        return self._kernels[key]

    def _find(self, module: str, name: str) -> Kernel | None:
        if importlib.util.find_spec(f"{module}_numba") is None:
            return None
        found: Kernel | None = getattr(importlib.import_module(f"{module}_numba"), name, None)
        return found

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised C-contiguous array that starts at a multiple of 64 bytes."""
        return _aligned(np.empty, shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """An array of zeros that starts at a multiple of 64 bytes; large ones take memory as they are written."""
        return _aligned(np.zeros, shape, dtype)

    def free_memory(self) -> int | None:
        """``None``: plans look at the machine's memory."""
        return None

    def relu_mask(self, rows: int, columns: int, training: bool) -> None:
        """Nothing: the output alone tells where the ReLU was on."""

    def pinned_empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """The same as ``empty``: the host has nothing to pin for itself."""
        return self.empty(shape, dtype)

    def upload(self, host: Array, out: Array) -> Array:
        """Copy ``host`` into ``out`` of the same shape, widening where ``out`` is wider; returns ``out``."""
        np.copyto(out, host, casting="safe")
        return out

    def download(self, array: Array, out: Array) -> Array:
        """Copy ``array`` into ``out`` of the same shape, widening where ``out`` is wider; returns ``out``."""
        np.copyto(out, array, casting="safe")
        return out

    def assign(self, host: Array, target: Array) -> None:
        """Write ``host`` into ``target``, converting."""
        target[...] = host

    def convert(self, source: Array, target: Array) -> None:
        """``target = source``."""
        target[...] = source

    def to_host(self, array: Array) -> Array:
        """The array itself."""
        return array

    def read_later(self, array: Array) -> Reading:
        """A copy of what the array holds now."""
        return _Copied(array.copy())

    def mark(self) -> float:
        """Now: what was issued is done when its call returns."""
        return time.perf_counter()

    def elapsed(self, start: float, end: float) -> float:
        """Seconds from ``start`` to ``end``."""
        return end - start

    def streams(self, names: Sequence[str]) -> AbstractContextManager[Streams]:
        """One name: a queue that runs inline. Several: a worker thread each (see ``host_streams.lane_threads``)."""
        return host_streams(names, self._lanes)

    def record(self) -> DoneEvent:
        """A point that has come: what a thread starts is done when its call returns."""
        return DoneEvent()

    def on(self, stream: str, after: Sequence[Event] = ()) -> AbstractContextManager[None]:  # noqa: ARG002
        """Nothing to change: the thread does the work itself."""
        return nullcontext()


def _aligned(make: Callable[..., Array], shape: int | tuple[int, ...], dtype: Any) -> Array:
    shape = (shape,) if isinstance(shape, int) else shape
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = make(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
