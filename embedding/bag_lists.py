"""Bags of keys over several GPUs: every key finds its place among features of one key a row, on the device.

Of each table the keys of one rank, in the order of the batch, fill its first feature, then its next one, S places each.
So the n-th key lies at place n % S of feature n / S, whose row the exchange brings to ``place * U + feature``.

Shapes: T tables, W ranks, G rows of the global batch, B of this rank, L vectors of a row, F places of a row's vectors,
U features, S places of each feature of a rank, K keys of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlrm.device import Array, Device
from embedding.placement import TableSpec
from embedding.topology import share_of, start_of


@dataclass(slots=True)
class Pooling:
    """Bags of rows that lie side by side; arrays on the device.

    Attributes:
        keys: [n] int32, a row each.
        offsets: [bags + 1] int64.
        weights: [n] float32, or empty.
    """

    keys: Array
    offsets: Array
    weights: Array


@dataclass(slots=True)
class GlobalBags:
    """The keys of a global batch, table-major and row by row; arrays on the device.

    Attributes:
        keys: [K or more] int32 or int64.
        offsets: [T * G + 1] int64.
        weights: [K or more] float32, or empty.
    """

    keys: Array
    offsets: Array
    weights: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class BagLayout:
    """How keys are spread, and where vectors lie; arrays on the device.

    Attributes:
        first_feature: [T + 1] int32: first feature of each table, and U.
        table: [U] int32, of each feature.
        vector: [T + 1] int32: first vector of each table, and L; several where they are not pooled.
        mean: [T] int32: 1 for mean pooling.
        features: U.
        vectors: L.
        first: place of vector 0.
        ranks: W.
        rank: this one.
    """

    first_feature: Array
    table: Array
    vector: Array
    mean: Array
    features: int
    vectors: int
    first: int
    ranks: int
    rank: int

    @classmethod
    def create(
        cls, specs: Sequence[TableSpec], features: Sequence[int], *, first: int, ranks: int, rank: int, device: Device
    ) -> BagLayout:
        """Put it on the device; ``features`` says over how many each table's keys are spread."""
        vectors = [spec.num_vectors for spec in specs]

        def words(numbers: Array) -> Array:
            return device.xp.asarray(np.asarray(numbers, np.int32))

        return cls(
            first_feature=words(np.cumsum([0, *features])),
            table=words(np.repeat(np.arange(len(specs)), features)),
            vector=words(np.cumsum([0, *vectors])),
            mean=words(np.array([spec.pooling == "mean" for spec in specs])),
            features=sum(features),
            vectors=sum(vectors),
            first=first,
            ranks=ranks,
            rank=rank,
        )


def spread_keys(bags: GlobalBags, global_rows: int, layout: BagLayout, spread: Array, over: Array) -> None:
    """Write every key to its place.

    Args:
        bags: of the global batch.
        global_rows: G.
        layout: of the tables.
        spread: [U * W * S] of the keys' type, written; -1 where there is no key.
        over: [1] int32, written: 1 if a rank has more keys of a table than its features have places; these are left
            out.
    """
    places = len(spread) // (layout.features * layout.ranks)
    out = spread.reshape(layout.features, layout.ranks, places)
    out.fill(-1)
    over[0] = places < places_needed(bags.offsets, global_rows, layout)
    for feature, table in enumerate(layout.table.tolist()):
        for rank in range(layout.ranks):
            begin, end = (
                bags.offsets[table * global_rows + start_of(global_rows, layout.ranks, bound)]
                for bound in (rank, rank + 1)
            )
            begin += (feature - layout.first_feature[table]) * places
            own = bags.keys[begin : max(begin, min(end, begin + places))]
            out[feature, rank, : len(own)] = own


def places_needed(offsets: Array, global_rows: int, layout: BagLayout) -> int:
    """The places of each feature that a global batch needs; arrays of the host."""
    tables, bounds = len(layout.mean), range(layout.ranks + 1)
    starts = np.array([start_of(global_rows, layout.ranks, bound) for bound in bounds])
    most = np.diff(offsets[np.arange(tables)[:, None] * global_rows + starts], axis=1).max(axis=1, initial=0)
    return int((-(-most // np.diff(layout.first_feature))).max(initial=1))


def list_bags(
    bags: GlobalBags, global_rows: int, layout: BagLayout, places: int, pooled: Pooling, shares: Pooling | None
) -> None:
    """Write how this rank's vectors come from rows, and gradients of rows from those of vectors.

    Where ``spread_keys`` has left keys out, so that the batch has to be run again, vectors come from any rows.

    Args:
        bags: of the global batch.
        global_rows: G.
        layout: of the tables.
        places: S.
        pooled: of the rows that the exchange brings; ``keys`` and ``weights`` [S * U] and ``offsets``
            [L * B + 1 or more] are written; ``weights`` is empty where keys have none.
        shares: of the vectors' gradients [B * F], one for each row: ``keys`` and ``weights`` [S * U] are written, 0
            where there is no key. ``None``: nobody asks.
    """
    start = start_of(global_rows, layout.ranks, layout.rank)
    rows, at = share_of(global_rows, layout.ranks, layout.rank), 0
    num_places = layout.first + layout.vectors
    if shares is not None:
        shares.keys.fill(0)
        shares.weights.fill(0)
    for table in range(len(layout.mean)):
        own = bags.offsets[table * global_rows + start : table * global_rows + start + rows + 1]
        count, lengths, vector = int(own[-1] - own[0]), np.diff(own), int(layout.vector[table])
        number = np.arange(count)
        feature = layout.first_feature[table] + number // places
        row, there = number % places * layout.features + feature, feature < layout.first_feature[table + 1]
        weights = np.ones(count, np.float32)
        if len(bags.weights):
            weights = bags.weights[own[0] : own[-1]]
        each = layout.vector[table + 1] - layout.vector[table]
        bag = np.repeat(np.arange(rows), lengths)
        place = number if each == 1 else number % each * rows + number // each
        kept = there & (at + place < len(pooled.keys))
        pooled.keys[at + place[kept]] = row[kept]
        if len(pooled.weights):
            pooled.weights[at + place[kept]] = weights[kept]
        ends = at + (own - own[0] if each == 1 else np.arange(each * rows + 1))
        pooled.offsets[vector * rows : (vector + each) * rows + 1] = np.minimum(ends, len(pooled.keys))
        if shares is not None:
            of_bag = layout.first + vector + (number % each if each > 1 else 0)
            divided = lengths[bag].astype(np.float32) if layout.mean[table] else np.float32(1)
            shares.keys[row[there]] = (bag * num_places + of_bag)[there]
            shares.weights[row[there]] = (weights / divided)[there]
        at += count
