"""Changed rows on their way from ranks that train a model to ranks that hold it under another plan.

Nobody needs to know a plan: every rank tells once what its shards hold, and rows go where a shard has a place for them.
Shapes: W ranks, K rows of a piece, C columns that two shards share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dlrm.device import Array, Device
from embedding.comm import Comm, all_gather_bytes
from embedding.table import Shard

_PIECE_ROWS = 1 << 16
"""Of a shard that are looked at for one piece, so that its memory is bounded."""

_HEAD = 2
"""64-bit numbers before a piece: which pair of shards, how many rows."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a shard holds of its table."""

    table: str
    rows: range
    columns: range
    replicated: bool

    @classmethod
    def of(cls, shard: Shard) -> Held:
        """A shard's."""
        return cls(shard.table, shard.rows, shard.columns, shard.replicated)

    def places_of(self, rows: Array) -> tuple[Array, Array]:
        """Which of these ``rows`` [K] int64 of the table it holds, [K] bool, and the places of those, int64."""
        offset = rows - self.rows.start
        here = (offset >= 0) & (rows < self.rows.stop) & (offset % self.rows.step == 0)
        return here, offset[here] // self.rows.step


@dataclass(frozen=True, slots=True)
class Pair:
    """A shard that gives and one that takes, by their places among the ranks' shards.

    Attributes:
        columns: of the table, in both.
    """

    giver: int
    taker: int
    columns: range


def pairs_of(giving: Sequence[Held], taking: Sequence[Held]) -> list[Pair]:
    """Which shards may have rows for which, in an order that both ranks share."""
    found = []
    for i, giver in enumerate(giving):
        for j, taker in enumerate(taking):
            columns = range(max(giver.columns.start, taker.columns.start), min(giver.columns.stop, taker.columns.stop))
            if giver.table == taker.table and len(columns):
                found.append(Pair(i, j, columns))
    return found


class ShardCopy:
    """Copies rows from the first ranks of a group to the others (all methods are collective)."""

    def __init__(self, comm: Comm, givers: int, shards: Sequence[Shard], device: Device) -> None:
        """Tell each other what there is.

        Args:
            comm: givers first, then takers.
            givers: how many.
            shards: this rank's; later calls hand in the same, in the same order.
            device: holds their arrays.
        """
        self._comm, self._givers, self._device = comm, givers, device
        own = [[s.table, [s.rows.start, s.rows.stop, s.rows.step], [s.columns.start, s.columns.stop], s.replicated]
               for s in map(Held.of, shards)]  # fmt: skip
        self._held = [
            [Held(table, range(*rows), range(*columns), replicated) for table, rows, columns, replicated in held]
            for held in map(json.loads, all_gather_bytes(comm, json.dumps(own).encode()))
        ]
        # What every giver holds alike comes from the first.
        self._pairs = [
            [[] if rank >= givers or other < givers else self._between(rank, other) for other in range(comm.size)]
            for rank in range(comm.size)
        ]

    def _between(self, giver: int, taker: int) -> list[Pair]:
        pairs = pairs_of(self._held[giver], self._held[taker])
        return [pair for pair in pairs if not (giver and self._held[giver][pair.giver].replicated)]

    def give(self, shards: Sequence[Shard]) -> int:
        """Send the rows that ``touched`` of the shards names; the bytes that this rank sent."""
        return self._exchange(shards, giving=True)

    def take(self, shards: Sequence[Shard]) -> None:
        """Write what the givers send into these shards."""
        self._exchange(shards, giving=False)

    def _exchange(self, shards: Sequence[Shard], *, giving: bool) -> int:
        comm, total = self._comm, 0
        outgoing = [self._pieces(shards, other) if giving else iter(()) for other in range(comm.size)]
        while True:
            pieces = [next(source, _NOTHING) for source in outgoing]
            sizes = np.empty((comm.size, comm.size), np.int64)
            comm.all_gather(np.array([len(piece) for piece in pieces], np.int64), sizes).wait()
            if not sizes.any():
                return total
            sent, come = sizes[comm.rank].tolist(), sizes[:, comm.rank].tolist()
            arrived = np.empty(sum(come), np.uint8)
            comm.all_to_all_v(np.concatenate(pieces), sent, arrived, come).wait()
            total += sum(sent)
            for giver, piece in enumerate(np.split(arrived, np.cumsum(come)[:-1])):
                if len(piece):
                    self._write(shards, self._pairs[giver][comm.rank], piece)

    def _pieces(self, shards: Sequence[Shard], taker: int) -> Iterator[Array]:
        for number, pair in enumerate(self._pairs[self._comm.rank][taker]):
            shard, target = shards[pair.giver], self._held[taker][pair.taker]
            assert shard.touched is not None
            columns = _within(pair.columns, shard.columns)
            for start in range(0, len(shard.rows), _PIECE_ROWS):
                marks = self._device.to_host(shard.touched[start : start + _PIECE_ROWS])
                places = np.flatnonzero(marks) + start
                here, theirs = target.places_of(shard.rows.start + places * shard.rows.step)
                if not len(theirs):
                    continue
                rows = shard.weight[self._device.xp.asarray(places[here]), columns]
                values = np.ascontiguousarray(self._device.to_host(rows))
                head = np.array([number, len(theirs)], np.int64)
                yield np.concatenate([part.reshape(-1).view(np.uint8) for part in (head, theirs, values)])

    def _write(self, shards: Sequence[Shard], pairs: Sequence[Pair], piece: Array) -> None:
        number, count = piece[: 8 * _HEAD].view(np.int64).tolist()
        body = 8 * (_HEAD + count)
        places = piece[8 * _HEAD : body].view(np.int64)
        pair = pairs[number]
        shard = shards[pair.taker]
        values = piece[body:].view(shard.weight.dtype).reshape(count, len(pair.columns))
        xp = self._device.xp
        shard.weight[xp.asarray(places), _within(pair.columns, shard.columns)] = xp.asarray(values)


_NOTHING = np.empty(0, np.uint8)


def _within(columns: range, held: range) -> slice:
    """Columns of a table as those of an array that holds ``held``."""
    return slice(columns.start - held.start, columns.stop - held.start)
