"""Streams of the CPU: one queue that runs inline, or several worker threads that run beside each other.

Compiled kernels, BLAS products and waits for other ranks leave Python's lock to others, so that workers really run at
once. The first failure ends all streams: what has not begun is left out, since a rank that goes on with the
collectives behind a failed one would meet the others in the wrong one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

DENSE = "dense"
"""The stream of the matrix products; all others belong to the embedding lane."""

_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class LaneThreads:
    """Threads of the two lanes while they run beside each other.

    Attributes:
        dense: threads of a product, and of kernels on the ``dense`` stream.
        embedding: threads of a kernel on any other stream.
    """

    dense: int
    embedding: int


def lane_threads(threads: int) -> LaneThreads:
    """Divide a rank's threads between the lanes.

    The embedding lane mostly waits for memory and for other ranks, so that a quarter is enough for it. Of fewer than
    four threads none can be spared: both lanes take all, and share the cores while both compute.
    """
    if threads < 4:
        return LaneThreads(threads, threads)
    return LaneThreads(threads - threads // 4, threads // 4)


class HostEvent:
    """The end of one piece of work."""

    __slots__ = ("_ended", "_streams")

    def __init__(self, streams: WorkerStreams) -> None:
        """Of work on ``streams`` that has not ended."""
        self._ended = threading.Event()
        self._streams = streams

    def done(self) -> bool:
        """Whether the work has ended, or will not be done."""
        return self._ended.is_set()

    def synchronize(self) -> None:
        """Wait for the end.

        Raises:
            Exception: what failed on any of the streams.
        """
        self._ended.wait()
        self._streams.check()

    def set(self) -> None:
        """Say that it has come."""
        self._ended.set()


class DoneEvent:
    """The end of work that was done when it was issued."""

    def done(self) -> bool:
        """Always."""
        return True

    def synchronize(self) -> None:
        """Return at once."""


_DONE = DoneEvent()


class InlineStream:
    """One queue: work is done when its call returns, so that there is never anything to wait for."""

    def issue(self, stream: str, work: Callable[[], None], after: Sequence[Any] = ()) -> DoneEvent:  # noqa: ARG002
        """See ``dlrm.device.Streams.issue``."""
        work()
        return _DONE

    def repeat(self, issue: Callable[[], Sequence[Any]], after: Sequence[Any], recording: Any) -> None:  # noqa: ARG002
        """See ``dlrm.device.Streams.repeat``."""
        issue()

    def join(self, events: Sequence[Any]) -> None:
        """See ``dlrm.device.Streams.join``."""


class WorkerStreams:
    """A worker thread for each stream."""

    def __init__(self, names: Sequence[str], lanes: LaneThreads | None) -> None:
        """Start the workers; ``lanes`` limits the compiled kernels' threads, ``None`` leaves them alone."""
        self._lanes = lanes
        self._queues: dict[str, queue.SimpleQueue[_Work | None]] = {name: queue.SimpleQueue() for name in names}
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._issued: list[HostEvent] = []
        # Daemons: one that waits for a rank that has failed must not keep this process alive.
        self._workers = [
            threading.Thread(target=self._run, args=(name,), name=f"stream {name}", daemon=True) for name in names
        ]
        for worker in self._workers:
            worker.start()

    def issue(self, stream: str, work: Callable[[], None], after: Sequence[Any] = ()) -> HostEvent:
        """See ``dlrm.device.Streams.issue``."""
        event = HostEvent(self)
        with self._lock:
            self._issued.append(event)
            if self._error is not None:
                event.set()
        self._queues[stream].put(_Work(work, after, event))
        return event

    def repeat(self, issue: Callable[[], Sequence[Any]], after: Sequence[Any], recording: Any) -> None:  # noqa: ARG002
        """See ``dlrm.device.Streams.repeat``; each piece of work waits for what it names itself."""
        self.join(issue())

    def join(self, events: Sequence[Any]) -> None:
        """See ``dlrm.device.Streams.join``."""
        for event in events:
            event.synchronize()
        with self._lock:
            self._issued = [event for event in self._issued if not event.done()]

    def check(self) -> None:
        """Raise what failed on any of the streams."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the workers; after a failure, without waiting long for one that cannot end."""
        for waiting in self._queues.values():
            waiting.put(None)
        deadline = None if self._error is None else _PATIENCE_S
        for worker in self._workers:
            worker.join(deadline)

    def fail(self, error: BaseException) -> None:
        """Begin nothing more, and let go of everyone who waits."""
        with self._lock:
            self._error = self._error or error
            for event in self._issued:
                event.set()

    def _run(self, name: str) -> None:
        if self._lanes is not None:
            import numba  # here: half a second that a reference run need not pay

            # The setting belongs to the calling thread.
            threads = self._lanes.dense if name == DENSE else self._lanes.embedding
            numba.set_num_threads(max(1, min(threads, numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
        waiting = self._queues[name]
        while (work := waiting.get()) is not None:
            try:
                for event in work.after:
                    event.synchronize()
                if self._error is None:
                    work.call()
            except BaseException as error:  # noqa: BLE001  the thread that joins raises it
                self.fail(error)
            work.event.set()


@dataclass(frozen=True, slots=True)
class _Work:
    call: Callable[[], None]
    after: Sequence[HostEvent]
    event: HostEvent


@contextmanager
def host_streams(names: Sequence[str], lanes: LaneThreads | None) -> Iterator[InlineStream | WorkerStreams]:
    """The streams of a schedule: inline where there is one, workers where there are several.

    Args:
        names: of the streams.
        lanes: threads of the lanes while they run beside each other; ``None``: leave the libraries' settings.
    """
    if len(names) == 1:
        yield InlineStream()
        return
    with ExitStack() as stack:
        if lanes is not None and lanes.dense != lanes.embedding:
            # BLAS alone: numba's setting is each worker's. Without this package the lanes share the cores less well.
            with suppress(ImportError):
                from threadpoolctl import threadpool_limits

                stack.enter_context(threadpool_limits(lanes.dense, user_api="blas"))
        streams = WorkerStreams(names, lanes)
        stack.callback(streams.close)
        try:
            yield streams
        except BaseException as error:
            streams.fail(error)
            raise
