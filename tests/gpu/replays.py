"""Streams that see whether a step may be replayed: a graph repeats every launch, with the arguments of its capture.

Nothing is captured where kernels run emulated. Instead all work is issued again, and every launch of an emulated kernel
must be one that was noted when a GPU would have captured: the same kernel, grid, numbers and places of arrays. What the
stages' Python notes in the meantime is forgotten, since a graph runs none of it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
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
        self._issued: list[Any] = []

    def issue(self, stream: str, work: Callable[[], None], after: Sequence[Any] = ()) -> Any:
        event = self._streams.issue(stream, partial(_noting, self._launches, work), after)
        self._issued.append(event)
        return event

    def join(self, events: Sequence[Any]) -> None:
        self._streams.join(events)
        self._issued.clear()

    def repeat(self, issue: Callable[[], Sequence[Any]], after: Sequence[Any], recording: Any) -> None:
        if recording is None:
            self.join(issue())
            return
        recording.runs += 1
        if recording.runs == 1:  # kernels are compiled
            self.join(issue())
            return
        self._launches = launches = []
        self.join(self._issued)  # on a GPU their Python has run by now
        noted = _numbers_of(issue) if recording.graph is not None else []
        try:
            self.join(issue())
        finally:
            self._launches = None
        for owner, name, number in noted:
            setattr(owner, name, number)
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


def _numbers_of(issue: Any) -> list[tuple[Any, str, int]]:
    """Every number that the ring's Flights, and the embedding's buffers in them, hold on the host."""
    found: list[tuple[Any, str, int]] = []
    waiting: list[Any] = list(issue.func.__self__.ring)
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, tuple | list):
            waiting.extend(thing)
        elif is_dataclass(thing) and type(thing).__name__.endswith(("Flight", "Buffers", "Bags")):
            for each in fields(thing):
                value = getattr(thing, each.name)
                if type(value) is int:
                    found.append((thing, each.name, value))
                else:
                    waiting.append(value)
    return found


def _noting(launches: list[Any] | None, work: Callable[[], None]) -> None:
    _NOW.launches = launches
    try:
        work()
    finally:
        _NOW.launches = None
