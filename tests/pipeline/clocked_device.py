"""A device without hardware that proves the order of a schedule: vector clocks on every stream.

Work counts as done at no particular time, only behind what its stream did before, what it was told to wait for, and
what the host had joined when it was issued. Every access to a field is compared with those before: it must be behind
what it depends on, and it must meet the value of the right batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from dlrm.device import Recording
from pipeline.schedule import Row, execute, ring_size
from pipeline.stages import FIELDS, SHARED, S

Clock = dict[str, int]
HEADER = "header"  # what ``Flight.accept`` writes and every stage reads


def behind(earlier: Clock, later: Clock) -> bool:
    """Whether everything of ``earlier`` has happened before ``later``."""
    return all(later.get(stream, 0) >= count for stream, count in earlier.items())


def merge(*clocks: Clock) -> Clock:
    merged: Clock = {}
    for clock in clocks:
        for stream, count in clock.items():
            merged[stream] = max(merged.get(stream, 0), count)
    return merged


class ClockedStreams:
    def __init__(self, names: Sequence[str]) -> None:
        self.clocks: dict[str, Clock] = {name: {} for name in names}
        self.host: Clock = {"host": 0}
        self.now: Clock = self.host

    def issue(self, stream: str, work: Callable[[], None], after: Sequence[Clock] = ()) -> Clock:
        clock = merge(self.clocks[stream], self.host, *after)
        clock[stream] = clock.get(stream, 0) + 1
        self.clocks[stream] = self.now = clock
        work()
        self.now = self.host
        return clock

    def repeat(self, issue: Callable[[], Sequence[Clock]], after: Sequence[Clock], recording: object) -> None:
        self.join(issue())

    def join(self, events: Sequence[Clock]) -> None:
        self.host = self.now = merge(self.host, *events)

    def call(self) -> None:
        """What follows is started by the schedule's caller, on a stream that is not the schedule's."""
        self.now = merge(self.host, {"caller": self.host.get("caller", 0) + 1})


class ClockedDevice:
    """Hands out ``ClockedStreams`` and keeps the latest."""

    streams_now: ClockedStreams

    @contextmanager
    def streams(self, names: Sequence[str]) -> Iterator[ClockedStreams]:
        self.streams_now = ClockedStreams(names)
        yield self.streams_now

    def record(self) -> Clock:
        return self.streams_now.now


@dataclass
class Place:
    """The accesses to one field since its last write."""

    batch: int | None = None
    written: Clock = field(default_factory=dict)
    reads: list[tuple[str, Clock]] = field(default_factory=list)


class ClockedFlight:
    """A ring position."""

    def __init__(self, position: int, memory: Memory) -> None:
        self.position, self.memory, self.number = position, memory, -1
        self.whole, self.form = True, 0
        self.recording = Recording()

    def accept(self, number: int) -> None:
        self.number = number
        self.memory.access(f"accept {number}", number, self.position, reads=(), writes=(HEADER, "batch"))


class Memory:
    """All fields of a ring, and what went wrong with them."""

    def __init__(self, device: ClockedDevice, writers: Mapping[str, Sequence[S]]) -> None:
        self.device, self.places, self.faults = device, {}, []
        self.writers = writers  # stages of the schedule that write a field, in order

    def access(self, who: str, batch: int, position: int, *, reads: Sequence[str], writes: Sequence[str]) -> None:
        now = self.device.streams_now.now
        for name in reads:
            place = self._place(name, position)
            if not behind(place.written, now):
                self.faults.append(f"{who} reads {name} while {place.batch} may still write it")
            if place.batch != self._expected(name, batch, who):
                self.faults.append(f"{who} reads {name} of batch {place.batch}")
            place.reads.append((who, now))
        for name in writes:
            place = self._place(name, position)
            for reader, clock in place.reads:
                if not behind(clock, now):
                    self.faults.append(f"{who} overwrites {name} while {reader} may still read it")
            if not behind(place.written, now):
                self.faults.append(f"{who} overwrites {name} while {place.batch} may still write it")
            self.places[self._key(name, position)] = Place(batch, now)

    def _key(self, name: str, position: int) -> tuple[str, int]:
        return name, -1 if name.startswith(SHARED) else position

    def _place(self, name: str, position: int) -> Place:
        return self.places.setdefault(self._key(name, position), Place())

    def _expected(self, name: str, batch: int, who: str) -> int | None:
        """Batch whose value a stage has to meet: its own, or the one before for weights that are updated later."""
        if name in {HEADER, "batch"}:
            return batch
        writers = self.writers.get(name, ())
        if not name.startswith("weights"):
            return batch
        if who.startswith("after"):
            return batch if writers else None
        return batch - 1 if batch and writers else None


class ClockedStages:
    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def run(self, stage: S, flight: ClockedFlight) -> None:
        reads, writes = FIELDS[stage]
        who = f"{stage} {flight.number}"
        self.memory.access(who, flight.number, flight.position, reads=(HEADER, *sorted(reads)), writes=sorted(writes))


OUTPUTS = ("logits", "labels", "loss", "weights.tables", "weights.bottom", "weights.top")


def faults_of(rows: Sequence[Row], batches: int) -> list[str]:
    """Run a schedule over so many batches; every read or write that nothing puts in order."""
    device = ClockedDevice()
    written = {name: [row.stage for row in rows if name in FIELDS[row.stage][1]] for row in rows for name in OUTPUTS}
    memory = Memory(device, written)
    ring = [ClockedFlight(position, memory) for position in range(ring_size(rows))]
    for expected, flight in enumerate(
        execute(rows, stages=ClockedStages(memory), ring=ring, batches=iter(range(batches)), device=device)
    ):
        if flight.number != expected:
            memory.faults.append(f"batch {flight.number} is handed out as {expected}")
        device.streams_now.call()
        outputs = [name for name in OUTPUTS if written[name] or name.startswith("weights")]
        memory.access(f"after {expected}", expected, flight.position, reads=outputs, writes=())
    return memory.faults
