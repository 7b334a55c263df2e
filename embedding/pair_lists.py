"""Which rows travel between each pair of ranks: lists that every rank makes by itself, as it has all ranks' keys.

The owner of a row and the rank that asks for it look at the same keys in the same order, so that the i-th row that one
packs is the i-th that the other expects, and no key is ever exchanged. Lists have a fixed capacity; how long they would
have to be is counted for every pair, so that all ranks see at once when one runs over.

Of each table, rows below its threshold lie on every rank. Of the others, row r lies on rank ``(r - threshold) % W``, or
all on the table's owner. A rank's store holds the replicated rows first, then its own, and one row for padding at last.

What a table is here may be one of several *features* that share a table's rows, or one of several parts of a table's
columns, which share its keys.

Shapes: W ranks, T tables of one key a bag, G rows of the global batch, B of this rank, F places of the vectors, N tiles
of one rank's keys (each of one table), C_o most rows that rank o sends to one other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.device import Array, Device
from embedding.topology import share_of, start_of

TILE = 512
"""Keys of one table that a warp looks at."""
NOWHERE = -1
"""In a list: no row, no place."""
REPLICATED = -1
"""Owner of a key whose row lies on every rank."""
NO_KEY = -2
"""Owner where a negative key says that there is none: such a place is in no list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLayout:
    """Where rows lie; arrays on the device.

    Attributes:
        threshold: [T] int64, replicated rows of each table.
        owner: [T] int32, the rank that has all others; -1: they are spread over the ranks.
        frequent_start: [T] int64, store row of each table's first replicated row.
        own_start: [T] int64, store row of this rank's first own row of each table.
        keys_of: [T] int32, which of the batch's tables it has the keys of.
        place: [T] int64, where each table's vector goes.
        num_places: F.
        ranks: W.
        rank: this one.
        own_pad: what fills up the lists of this rank's own rows.
        frequent_pad: [T] int32, what stands for a row that is not replicated, by table.
        frequent: H, replicated rows of all tables.
        order: the ranks in the order of their chunks, this one last.
        chunk_of: [W] int32, place of each rank in ``order``.
        relay_row_start: [T] int64, for lists of what others exchange: the first number of each table's rows.
        relay_pad: what fills such lists up: a number above all rows'.
        total_rows: rows of the store, without the padding that lies behind them.
    """

    threshold: Array
    owner: Array
    frequent_start: Array
    own_start: Array
    keys_of: Array
    place: Array
    num_places: int
    ranks: int
    rank: int
    own_pad: int
    frequent_pad: Array
    frequent: int
    order: tuple[int, ...]
    chunk_of: Array
    relay_row_start: Array
    relay_pad: int
    total_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLists:
    """One batch's lists; arrays on the device.

    Attributes:
        capacities: C_o of each rank.
        capacity: the same, [W] int32.
        asked_start: [W] int32, where the chunk of each owner begins in ``asked``.
        counts: [W, W, N] uint32: rows of owner o for rank r in r's tiles before this one.
        totals: [W, W] uint32: rows of owner o for rank r, whatever the capacity.
        flag: [1] int32: not 0 if a list ran over.
        asked: [sum C_o] int32: place ``b * F + place[t]`` in the vectors of each row that this rank gets; -1: none.
        given: [W * C_rank] int32: store row of each row that a rank gets from this one; padded. Chunks of this and of
            ``asked`` are in the layout's order.
        local: [B * F] int32: store row of a place whose row lies here; -1: it travels. Empty with ``sources``.
        sources: [T * B] int32: store row of a key whose row lies here; of others ``~i``, the i-th that is asked for.
            May be empty: nobody asks.
        slots: [T * B] int32: the place in ``asked`` of keys whose gradients travel or are this rank's own, unless
            ``own`` lists these; else -1. Empty as ``sources``.
        frequent: [T * B] int32: keys whose rows are replicated, else ``frequent_pad``.
        replicated: [1] uint32: how many these are, and places without a key.
        own: [T * B] int32: row relative to ``own_start`` of keys whose rows this rank owns, else -1; may be empty:
            nobody asks.
        touched: [H] uint8: 1 for the replicated rows that the global batch looks up.
        relay_start: [W, W] int32: where ``relay`` has the rows of owner o for rank r; -1: not there.
        relay: int32: numbers of rows that other ranks exchange, ``relay_row_start`` and on; may be empty.
    """

    capacities: tuple[int, ...]
    capacity: Array
    asked_start: Array
    counts: Array
    totals: Array
    flag: Array
    asked: Array
    given: Array
    local: Array
    sources: Array
    slots: Array
    frequent: Array
    replicated: Array
    own: Array
    touched: Array
    relay_start: Array
    relay: Array

    @classmethod
    def create(
        cls,
        device: Device,
        layout: PairLayout,
        rows: int,
        capacities: Sequence[int],
        *,
        own: bool,
        listed: bool = False,
        relay_start: Array | None = None,
        relay_size: int = 0,
        even: bool = False,
    ) -> PairLists:
        """Allocate for batches of up to ``rows`` rows of each rank.

        Args:
            device: holds them.
            layout: of the tables.
            rows: most rows of one rank.
            capacities: C_o of each rank.
            own: whether ``own`` is asked for.
            listed: whether ``sources`` and ``slots`` are, instead of ``local``.
            relay_start: [W, W] of the host; ``None``: no list of what others exchange.
            relay_size: of these lists.
            even: chunks of ``asked`` are as long as the longest one.
        """
        ranks, rank, tables, order = layout.ranks, layout.rank, len(layout.threshold), layout.order
        lengths = [max(capacities) if even else capacities[o] for o in order]
        begins = dict(zip(order, np.cumsum([0, *lengths]).tolist(), strict=False))
        xp = device.xp

        def words(size: int) -> Any:
            return device.zeros(max(1, size), np.int32)[:size]

        local, asked = words(0 if listed else rows * layout.num_places), words(sum(lengths))
        local.fill(NOWHERE)
        asked.fill(NOWHERE)
        return cls(
            capacities=tuple(capacities),
            capacity=xp.asarray(np.array(capacities, np.int32)),
            asked_start=xp.asarray(np.array([begins[o] for o in range(ranks)], np.int32)),
            counts=device.zeros((ranks, ranks, max(1, tables * tiles_of(rows))), np.uint32),
            totals=device.zeros((ranks, ranks), np.uint32),
            flag=words(1),
            asked=asked,
            given=words(ranks * capacities[rank]),
            local=local,
            sources=words(tables * rows if listed else 0),
            slots=words(tables * rows if listed else 0),
            frequent=words(tables * rows),
            replicated=device.zeros(1, np.uint32),
            own=words(tables * rows if own else 0),
            touched=device.zeros(max(1, layout.frequent), np.uint8)[: layout.frequent],
            relay_start=xp.asarray(np.full((ranks, ranks), -1, np.int32) if relay_start is None else relay_start),
            relay=words(relay_size),
        )


def tiles_of(rows: int) -> int:
    """Tiles of one table's keys of one rank that has so many rows."""
    return -(-rows // TILE)


def owners_of(keys: Array, layout: PairLayout) -> Array:
    """The rank of each key's row, ``REPLICATED`` or ``NO_KEY``: [T, G] of keys [T, G]."""
    threshold, owner = layout.threshold[:, None], layout.owner[:, None].astype(np.int64)
    beyond = keys.astype(np.int64) - threshold
    replicated = np.where(keys < 0, NO_KEY, REPLICATED)
    return np.where(beyond < 0, replicated, np.where(owner >= 0, owner, beyond % layout.ranks))


def _keys_of(keys: Array, global_rows: int, layout: PairLayout) -> Array:
    """[T, G]."""
    batch = int(layout.keys_of.max(initial=-1)) + 1
    return keys[: batch * global_rows].reshape(batch, global_rows)[layout.keys_of]


def count_pairs(keys: Array, global_rows: int, layout: PairLayout, lists: PairLists) -> None:
    """Count what travels between every pair of ranks.

    Args:
        keys: [tables of the batch * G or more] int32 or int64, table-major, inside their tables; negative: none.
        global_rows: G.
        layout: of the tables.
        lists: ``counts``, ``totals`` and ``flag`` are written.
    """
    tables, ranks = len(layout.threshold), layout.ranks
    owners = owners_of(_keys_of(keys, global_rows, layout), layout)
    chunks = tiles_of(share_of(global_rows, ranks, 0))
    flat = lists.counts.reshape(-1)[: ranks * ranks * tables * chunks].reshape(ranks, ranks, tables * chunks)
    for rank in range(ranks):
        mine = owners[:, start_of(global_rows, ranks, rank) : start_of(global_rows, ranks, rank + 1)]
        padded = np.full((tables, chunks * TILE), REPLICATED, np.int64)
        padded[:, : mine.shape[1]] = mine
        for owner in range(ranks):
            by_tile = (padded == owner).reshape(tables * chunks, TILE).sum(axis=1)
            flat[owner, rank] = np.cumsum(by_tile) - by_tile
            lists.totals[owner, rank] = by_tile.sum()
    lists.flag[0] = (lists.totals > lists.capacity[:, None]).any()


def list_pairs(keys: Array, global_rows: int, layout: PairLayout, lists: PairLists) -> None:
    """Write the lists; what does not fit its list is left out.

    Args:
        keys: as ``count_pairs`` had them.
        global_rows: G.
        layout: of the tables.
        lists: after ``count_pairs``; everything else is written, of ``local``, ``sources``, ``slots``, ``frequent`` and
            ``own`` the places of the batch's rows. ``touched`` has to be 0 before, ``relay`` all ``relay_pad``.
    """
    ranks, rank = layout.ranks, layout.rank
    keys = _keys_of(keys, global_rows, layout).astype(np.int64)
    owners = owners_of(keys, layout)
    threshold = layout.threshold[:, None]
    beyond = np.where(layout.owner[:, None] >= 0, keys - threshold, (keys - threshold) // ranks)
    own_capacity = lists.capacities[rank]
    lists.asked.fill(NOWHERE)
    lists.given.fill(layout.own_pad)
    lists.touched[(layout.frequent_start[:, None] + keys)[owners == REPLICATED]] = 1
    for other in range(ranks):
        share = slice(start_of(global_rows, ranks, other), start_of(global_rows, ranks, other + 1))
        found = np.nonzero(owners[:, share] == rank)
        rows = layout.own_start[found[0]] + beyond[:, share][found]
        begin = int(layout.chunk_of[other]) * own_capacity
        kept = min(len(rows), own_capacity)
        lists.given[begin : begin + kept] = rows[:kept]
        if other == rank:
            _list_own(keys[:, share], owners[:, share], beyond[:, share], layout, lists)
        if len(lists.relay):
            _list_relay(other, owners[:, share], beyond[:, share], layout, lists)


def _list_relay(other: int, owners: Array, beyond: Array, layout: PairLayout, lists: PairLists) -> None:
    """What rank ``other`` gets of owners for whom this rank relays."""
    for owner, start in enumerate(lists.relay_start[:, other].tolist()):
        if start >= 0:
            found = np.nonzero(owners == owner)
            rows = (layout.relay_row_start[found[0]] + beyond[found])[: lists.capacities[owner]]
            lists.relay[start : start + len(rows)] = rows


def _list_own(keys: Array, owners: Array, beyond: Array, layout: PairLayout, lists: PairLists) -> None:
    """What concerns this rank's own rows of the batch: [T, B] keys, owners and rows relative to ``own_start``."""
    slots = np.full(keys.shape, NOWHERE, np.int64)
    for owner in range(layout.ranks):
        table, row = np.nonzero(owners == owner)
        begin, kept = int(lists.asked_start[owner]), min(len(table), lists.capacities[owner])
        lists.asked[begin : begin + kept] = (row * layout.num_places + layout.place[table])[:kept]
        slots[table[:kept], row[:kept]] = begin + np.arange(kept)
    frequent, mine = owners == REPLICATED, owners == layout.rank
    lists.replicated[0] = (owners < 0).sum()
    store = np.where(
        frequent, layout.frequent_start[:, None] + keys, np.where(mine, layout.own_start[:, None] + beyond, NOWHERE)
    )
    rows = keys.shape[1]
    if len(lists.sources):
        # What did not fit its list is any row: the batch is run again.
        lists.sources[: keys.size] = np.where(store >= 0, store, np.where(slots >= 0, ~slots, 0)).reshape(-1)
        lists.slots[: keys.size] = np.where(mine & (len(lists.own) > 0), NOWHERE, slots).reshape(-1)
    else:
        lists.local[: rows * layout.num_places].reshape(rows, layout.num_places)[:, layout.place] = store.T
    lists.frequent[: keys.size] = np.where(frequent, keys, layout.frequent_pad[:, None]).reshape(-1)
    if len(lists.own):
        lists.own[: keys.size] = np.where(mine, beyond, NOWHERE).reshape(-1)
