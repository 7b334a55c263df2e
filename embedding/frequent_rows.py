"""Frequent rows of data that is not numbered by frequency: a list of rows in place of the first ones.

A table of a ``listed`` placement has H frequent rows, wherever they are in it. On their way in, its keys become places:
the frequent row that is i-th in the list (ascending) has place i, and any row r has place H + r, its *home*. So the
places are those of a hybrid table of H more rows: those below H lie on every rank, home r on rank r % W. A frequent
row's home is not looked up; before a save it takes the row's values (``settle``), so that owners write all rows in the
data's own order, and after a load, as at the start, replicas are filled from homes (``spread``).

Shapes: T tables, R rows of a table, H frequent rows, B bags a table, K keys, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dlrm.device import Array, Device
from dlrm.errors import ConfigError
from embedding.buffers import BatchBuffers
from embedding.comm import Comm
from embedding.jagged import Jagged
from embedding.placement import Placement, TableSpec

_WORD_BITS = 64
_NOT_LISTED = -1
_CHUNK_BYTES = 4 << 20


def most_frequent(counts: Array, rows: int, number: int) -> Array:
    """The rows that were counted most, in ascending order; of equal counts the smaller row numbers.

    Args:
        counts: [R or fewer] look-ups by row; rows beyond were never seen.
        rows: R.
        number: H, how many rows to name.

    Returns:
        [H] int64.
    """
    seen = np.flatnonzero(counts)
    chosen = seen[np.argsort(-counts[seen].astype(np.int64), kind="stable")[:number]]
    if len(chosen) < number:
        missing = np.ones(min(rows, number + len(seen)), np.bool_)
        missing[chosen[chosen < len(missing)]] = False
        chosen = np.concatenate([chosen, np.flatnonzero(missing)[: number - len(chosen)]])
    return np.sort(chosen).astype(np.int64)


def check_lists(
    specs: Sequence[TableSpec], placements: Sequence[Placement], lists: Mapping[str, Array]
) -> list[Array | None]:
    """The list of each table; ``None`` where frequent rows are the first ones.

    Raises:
        ConfigError: a listed table has no list, or one that does not fit its threshold and rows.
    """
    found: list[Array | None] = []
    for spec, placement in zip(specs, placements, strict=True):
        if not placement.listed:
            found.append(None)
            continue
        rows = lists.get(spec.name)
        fits = rows is not None and len(rows) == placement.threshold and bool((np.diff(rows) > 0).all())
        if rows is None or not fits or rows[0] < 0 or rows[-1] >= spec.rows:
            raise ConfigError(
                f"table '{spec.name}': its list of frequent rows must hold {placement.threshold} distinct ones of "
                f"{spec.rows} in ascending order; plan again"
            )
        found.append(np.ascontiguousarray(rows, np.int64))
    return found


@dataclass(frozen=True, slots=True)
class FrequentRows:
    """The lists of some tables as bits, so that a key's place takes two look-ups and little memory.

    Attributes:
        word_start: [T] int64, first word of each table; -1: not listed.
        words: uint64, bit r % 64 of a table's word r // 64 is set for its frequent row r.
        before: int64 for each word, frequent rows of the table in the words before it.
        threshold: [T] int64, H of each table.
        wide: places need 64 bits.
    """

    word_start: Array
    words: Array
    before: Array
    threshold: Array
    wide: bool

    @classmethod
    def create(cls, specs: Sequence[TableSpec], lists: Sequence[Array | None]) -> FrequentRows:
        """From what ``check_lists`` returned."""
        starts, words, before = [], [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        total = 0
        for spec, rows in zip(specs, lists, strict=True):
            starts.append(_NOT_LISTED if rows is None else total)
            if rows is None:
                continue
            size = -(-spec.rows // _WORD_BITS)
            own = np.zeros(size, np.uint64)
            np.bitwise_or.at(own, rows // _WORD_BITS, np.uint64(1) << (rows % _WORD_BITS).astype(np.uint64))
            bits = np.bitwise_count(own).astype(np.int64)
            words.append(own)
            before.append(np.cumsum(bits) - bits)
            total += size
        pairs = zip(specs, lists, strict=True)
        return cls(
            word_start=np.array(starts, np.int64),
            words=np.concatenate(words),
            before=np.concatenate(before),
            threshold=np.array([0 if rows is None else len(rows) for rows in lists], np.int64),
            wide=any(rows is not None and spec.rows + len(rows) > 2**31 for spec, rows in pairs),
        )

    def on(self, device: Device, features: Sequence[int]) -> FrequentRows:
        """The same on a device, for features that each have the keys of one of the tables; -1: of another one."""
        xp, of = device.xp, np.asarray(features, np.int64)
        return FrequentRows(
            word_start=xp.asarray(np.append(self.word_start, _NOT_LISTED)[of]),
            words=xp.asarray(self.words),
            before=xp.asarray(self.before),
            threshold=xp.asarray(np.append(self.threshold, 0)[of]),
            wide=self.wide,
        )

    def place(self, keys: Jagged, buffers: BatchBuffers, *, device: Device) -> Jagged:
        """Keys as places; tables that are not listed keep theirs.

        Args:
            keys: of these tables, inside them.
            buffers: what the result belongs to.
            device: where the keys lie.
        """
        rows = keys.num_rows
        ends = np.arange(1, keys.num_tables + 1) * rows
        if keys.offsets is not None and rows:
            ends = keys.offsets[rows::rows]
        dtype = np.int64 if self.wide else keys.keys.dtype
        out = buffers.room("places", dtype, len(keys.keys))
        place_keys(keys.keys, ends, self.word_start, self.words, self.before, self.threshold, out, device=device)
        return replace(keys, keys=out)


def place_keys(
    keys: Array, ends: Array, word_start: Array, words: Array, before: Array, threshold: Array, out: Array,
    *, device: Device,
) -> None:  # fmt: skip
    """Turn keys into places.

    Args:
        keys: [K] int32 or int64, table-major.
        ends: [T] int64, end of each table's keys.
        word_start: [T] as of ``FrequentRows``, as are the next three.
        words: see there.
        before: see there.
        threshold: see there.
        out: [K] int32 or int64, written.
        device: where the arrays lie.
    """
    kernel = device.kernel(__name__, "place")
    operation: Any = kernel if kernel is not None else place
    operation(keys, ends, word_start, words, before, threshold, out)


def place(
    keys: Array, ends: Array, word_start: Array, words: Array, before: Array, threshold: Array, out: Array
) -> None:
    """The plain form of ``place_keys``."""
    begin = 0
    for table, end in enumerate(ends.tolist()):
        own = keys[begin:end].astype(np.int64)
        if word_start[table] == _NOT_LISTED:
            out[begin:end] = own
        else:
            word, bit = word_start[table] + own // _WORD_BITS, (own % _WORD_BITS).astype(np.uint64)
            lower = words[word] & ((np.uint64(1) << bit) - np.uint64(1))
            frequent = words[word] >> bit & np.uint64(1)
            rank = before[word] + np.bitwise_count(lower)
            out[begin:end] = np.where(frequent, rank, own + threshold[table])
        begin = end


def place_features(keys: Array, rows: int, frequent: FrequentRows, out: Array) -> None:
    """Turn keys of captured steps into places, one key a row; a negative key stays what it is.

    Args:
        keys: [T * B or more] int32 or int64, table-major.
        rows: B.
        frequent: of T tables, or features of tables (``FrequentRows.on``).
        out: as many int32 or int64; written as far as there are keys.
    """
    tables = len(frequent.word_start)
    own, there = keys[: tables * rows], out[: tables * rows]
    ends = np.arange(1, tables + 1) * rows
    place(np.maximum(own, 0), ends, frequent.word_start, frequent.words, frequent.before, frequent.threshold, there)
    there[own < 0] = own[own < 0]


def places_of_rows(keys: Array, rows: Array | None) -> Array:
    """The places of one table's keys on the host.

    Args:
        keys: [K] int64.
        rows: its list; ``None``: keys are places.
    """
    if rows is None:
        return keys
    at = np.minimum(np.searchsorted(rows, keys), len(rows) - 1)
    return np.where(rows[at] == keys, at, keys + len(rows))


@dataclass(frozen=True, slots=True)
class Homes:
    """The homes of frequent rows that lie on this rank.

    Attributes:
        replica: [n] int64, rows of the replicated arrays.
        home: [n] int64, rows of this rank's own arrays.
        start: first replicated row of a listed table's, and
        count: how many it has; [tables that are listed] each.
        device: where rows lie; ``None``: on the host.
    """

    replica: Array
    home: Array
    start: list[int]
    count: list[int]
    device: Device | None = None

    @classmethod
    def create(
        cls,
        lists: Sequence[Array | None],
        frequent_start: Array,
        base: Array,
        ranks: int,
        rank: int,
        device: Device | None = None,
    ) -> Homes:
        """Find them.

        Args:
            lists: of the tables.
            frequent_start: [T] int64, replicated row of each table's first place.
            base: [T] int64, first of this rank's own rows of each table.
            ranks: W.
            rank: this one.
            device: where rows lie; ``None``: on the host.
        """
        replica, home = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        listed = [table for table, rows in enumerate(lists) if rows is not None]
        for table in listed:
            rows = lists[table]
            assert rows is not None
            mine = np.flatnonzero(rows % ranks == rank)
            replica.append(frequent_start[table] + mine)
            home.append(base[table] + rows[mine] // ranks)
        start = [int(frequent_start[table]) for table in listed]
        count = [len(rows) for rows in lists if rows is not None]
        return cls(np.concatenate(replica), np.concatenate(home), start, count, device)

    def _index(self, numbers: Array) -> Array:
        """Numbers of the host as what picks rows where these lie."""
        return numbers if self.device is None else self.device.xp.asarray(numbers)

    def settle(self, replicas: Sequence[Array | None], homes: Sequence[Array | None]) -> None:
        """Give the homes what the replicas hold: weights, states, and marks of what was touched."""
        for source, target in zip(replicas, homes, strict=True):
            if source is not None and target is not None:
                target[self._index(self.home)] = source[self._index(self.replica)]

    def spread(self, replicas: Sequence[Array], homes: Sequence[Array], comm: Comm) -> None:
        """Fill every rank's replicas from the homes, bit for bit; collective.

        Every number comes from one rank and the others add 0 to it, as whole numbers: a float's -0.0 would become 0.0.
        """
        order = np.argsort(self.replica)
        replica, home = self.replica[order], self.home[order]
        for target, source in zip(replicas, homes, strict=True):
            word = np.int64 if target.itemsize == 8 else np.int32
            most = max(1, _CHUNK_BYTES // max(1, target.strides[0]))
            for start, count in zip(self.start, self.count, strict=True):
                for begin in range(start, start + count, most):
                    end = min(begin + most, start + count)
                    shape = (end - begin, *target.shape[1:])
                    chunk = (np if self.device is None else self.device).zeros(shape, target.dtype)
                    own = slice(*np.searchsorted(replica, [begin, end]).tolist())
                    chunk[self._index(replica[own] - begin)] = source[self._index(home[own])]
                    comm.all_reduce(chunk.view(word)).wait()
                    target[begin:end] = chunk
