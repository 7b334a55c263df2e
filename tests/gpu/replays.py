"""Streams that see whether a step may be replayed: a graph repeats every launch, with the arguments of its capture.

Nothing is captured where kernels run emulated. Instead all work is issued again, and every launch of an emulated kernel
must be one that was noted when a GPU would have captured: the same kernel, grid, numbers and places of arrays.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

_NOW = threading.local()
"""``launches`` that this thread's kernels are noted in, where it runs work that would be captured."""


def note_launch(*launch: Any) -> None:
    """Called for every launch of an emulated kernel."""
    if (launches := getattr(_NOW, "launches", None)) is not None:
        launches.append(launch)


def may_allocate() -> bool:
    """Whether this thread runs nothing that would be captured."""
    return getattr(_NOW, "launches", None) is None


class Replays:
    """Over the host's streams.

    Attributes:
        recordings: how many were made, and replays of them.
    """

    def __init__(self, streams: Any, recordings: Counter[str]) -> None:
        self._streams, self.recordings = streams, recordings
        self._launches: list[Any] | None = None

    def issue(self, stream: str, work: Callable[[], None], after: Sequence[Any] = ()) -> Any:
        return self._streams.issue(stream, partial(_noting, self._launches, work), after)

    def join(self, events: Sequence[Any]) -> None:
        self._streams.join(events)

    def repeat(self, issue: Callable[[], Sequence[Any]], after: Sequence[Any], recording: Any) -> None:
        if recording is None:
            self.join(issue())
            return
        recording.runs += 1
        if recording.runs == 1:  # kernels are compiled
            self.join(issue())
            return
        self._launches = launches = []
        try:
            self.join(issue())
        finally:
            self._launches = None
        found = Counter(launches)
        if recording.graph is None:
            recording.graph = found
            self.recordings["made"] += 1
            return
        self.recordings["replayed"] += 1
        other = (found - recording.graph) + (recording.graph - found)
        assert not other, f"launches that a replay does not make, or makes otherwise: {other}"


@contextmanager
def replays(streams: Any, recordings: Counter[str]) -> Iterator[Replays]:
    """The streams of a schedule, as ``HostDevice.streams`` gives them."""
    with streams as inner:
        yield Replays(inner, recordings)


def _noting(launches: list[Any] | None, work: Callable[[], None]) -> None:
    _NOW.launches = launches
    try:
        work()
    finally:
        _NOW.launches = None
