"""Bags of keys over several GPUs: every key is exchanged like one of one key a bag, and bags are pooled at home.

The keys of a table's bags are spread over so many *features* of one key a row as its bags hold on average; places
without a key are in no list. ``ExchangedEmbedding`` brings every feature's row to the rank that asks for it, where bags
are pooled from them by the kernel that pools bags from tables. Gradients go the same way back: that of a bag, times the
key's weight, to each of its keys. A table whose vectors are not pooled is H bags of one key a row.

Shapes: T tables, W ranks, G rows of the global batch, B of this rank, V vectors of a row, F = first + V places, U
features, S places of each feature of a rank, K keys of this rank, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import DataError
from embedding.bag_room import BagRoom, offsets_of
from embedding.batch import check_arrays, check_bag_keys, check_trains
from embedding.buffers import NO_WEIGHTS, BatchBuffers
from embedding.captured_exchange import ExchangedEmbedding
from embedding.captured_placement import MOST_ROWS
from embedding.comm import Comm
from embedding.concat import concat_parts, offsets_of_vectors
from embedding.exchange_buffers import ExchangeBuffers
from embedding.jagged import Jagged
from embedding.lookup import gather_pool
from embedding.pair_lists import PairLists
from embedding.placement import Plan, tables_of_vectors
from embedding.table import Shard
from embedding.topology import Topology, start_of
from embedding.wire import Precision


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


@dataclass(slots=True, kw_only=True)
class BagBuffers(BatchBuffers):
    """One batch in flight.

    Attributes:
        inner: of its keys, each a row of the exchange.
        places: S of this batch.
        bags: how vectors are pooled from rows.
        shares: what each row's gradient comes from: for each place of a feature a bag of one vector, or of none.
    """

    inner: ExchangeBuffers
    places: int = 0
    bags: Pooling | None = None
    shares: Pooling | None = None

    @property
    def lists(self) -> PairLists:
        """What travels."""
        return self.inner.lists


class ExchangedBags:
    """All tables, over the GPUs of a run whose rows have bags; see ``ExchangedEmbedding``."""

    def __init__(
        self,
        *,
        plan: Plan,
        comm: Comm,
        topology: Topology | None,
        device: Device,
        optimizer: OptimizerConfig,
        table_dtype: Any,
        seed: int | None,
        first: int,
        deterministic: bool,
        room: BagRoom,
        exchange_precision: Precision = "fp32",
        hierarchical: bool = False,
        lists: Mapping[str, Array] | None = None,
    ) -> None:
        """Allocate and initialise what this rank holds; ``room`` says how long lists are, the rest is as there.

        Raises:
            ConfigError: the plan is for other ranks, or has placements that GPUs do not do.
            DeviceError: there are too many rows.
        """
        self._features = [table for table, count in enumerate(room.features) for _ in range(count)]
        self._exchange = ExchangedEmbedding(
            plan=plan, comm=comm, topology=topology, device=device, optimizer=optimizer, table_dtype=table_dtype,
            seed=seed, first=0, deterministic=deterministic, exchange_precision=exchange_precision,
            hierarchical=hierarchical, distinct=room.distinct, touched=room.touched, features=self._features,
            lists=lists,
        )  # fmt: skip
        self.specs, self.plan, self.comm, self.topology, self.first = plan.specs, plan, comm, topology, first
        self._device, self._room, self._dim = device, room, plan.specs[0].dim
        self._first_feature = np.cumsum([0, *room.features])
        tables = tables_of_vectors(plan.specs)
        xp = device.xp
        self._mean = np.array([plan.specs[table].pooling == "mean" for table in tables], np.bool_)
        self._mean_of_vector = xp.asarray(self._mean)
        self._places = np.arange(first, first + len(tables))
        self._place_of_vector = xp.asarray(self._places)
        self._zeros = xp.asarray(np.zeros(max(1, len(tables)), np.int64))
        self._sum = xp.asarray(np.zeros(1, np.bool_))

    # --- what checkpoints ask for

    def shards(self) -> list[Shard]:
        """See ``ExchangedEmbedding``."""
        return self._exchange.shards()

    def settle(self) -> None:
        """See ``ExchangedEmbedding``."""
        self._exchange.settle()

    def spread(self) -> None:
        """See ``ExchangedEmbedding``."""
        self._exchange.spread()

    def track_touched(self) -> None:
        """See ``ExchangedEmbedding``."""
        self._exchange.track_touched()

    def clear_touched(self) -> None:
        """See ``ExchangedEmbedding``."""
        self._exchange.clear_touched()

    # --- batches

    def buffers(self, capacity: int, vectors: Array, grad_vectors: Array | None = None) -> BagBuffers:
        """Room for one batch in flight; arguments as ``ExchangedEmbedding.buffers`` takes them.

        Raises:
            ConfigError: an array has another shape, dtype or layout.
        """
        places = (self.first + len(self._places), self._dim)
        check_arrays(vectors, grad_vectors, capacity, places, vectors.dtype)
        inner = self._inner(self._room.slots(capacity), capacity, vectors.dtype, trains=grad_vectors is not None)
        return BagBuffers(capacity=capacity, vectors=vectors, grad_vectors=grad_vectors, inner=inner)

    def _inner(self, places: int, capacity: int, dtype: Any, *, trains: bool) -> ExchangeBuffers:
        shape = (places, len(self._features), self._dim)
        rows = self._device.zeros(shape, dtype)
        gradients = self._device.zeros(shape, dtype) if trains else None
        return self._exchange.buffers(
            places, rows, gradients, self._room.capacities(capacity, self._exchange.room)
        )  # fmt: skip

    def take_bags(self, own: Jagged, everyones: Jagged, buffers: BagBuffers) -> None:
        """Copy a batch of bags from the host; what has to grow is allocated, so this is nothing for a capture.

        Args:
            own: this rank's.
            everyones: the keys of the global batch, the same on every rank.
            buffers: the batch's.

        Raises:
            DataError: a bag of a table whose vectors are not pooled holds another number of keys than all, or there
                are more keys than can be numbered.
        """
        check_bag_keys(own, self.specs, f"rank {self.comm.rank}: ")
        ends = self._ends(everyones)
        most = np.diff(ends, axis=1).max(axis=1, initial=0)
        buffers.places = max(1, int((-(-most // np.diff(self._first_feature))).max()))
        total = buffers.places * len(self._features) * self.comm.size
        if total >= MOST_ROWS:
            raise DataError(
                f"batch: {total} places for its keys, but {MOST_ROWS - 1} can be numbered; use a smaller one"
            )
        inner = buffers.inner
        if buffers.places > inner.capacity:
            inner = buffers.inner = self._inner(
                buffers.places + buffers.places // 4, buffers.capacity, buffers.vectors.dtype,
                trains=buffers.grad_vectors is not None,
            )  # fmt: skip
        spread = self._spread(everyones.keys, ends, buffers.places)
        if inner.keys.dtype != spread.dtype:
            inner.keys = self._device.empty(inner.keys.shape, spread.dtype)
        self._device.upload(spread, inner.keys[: len(spread)])
        self._pool(own, buffers)

    def _ends(self, keys: Jagged) -> Array:
        """[T, W + 1]: where each rank's keys of a table begin, and where they end."""
        rows, ranks = keys.num_rows, self.comm.size
        starts = np.array([start_of(rows, ranks, rank) for rank in range(ranks + 1)])
        return offsets_of(keys)[np.arange(keys.num_tables)[:, None] * rows + starts]

    def _spread(self, keys: Array, ends: Array, places: int) -> Array:
        """Keys as those of features: [U * W * S], -1 where there is none."""
        spread = np.full((len(self._features), self.comm.size, places), -1, keys.dtype)
        for feature, own in zip(self._first_feature.tolist(), ends.tolist(), strict=False):
            for rank, (begin, end) in enumerate(pairwise(own)):
                whole, rest = divmod(end - begin, places)
                spread[feature : feature + whole, rank] = keys[begin : end - rest].reshape(whole, places)
                if rest:
                    spread[feature + whole, rank, :rest] = keys[end - rest : end]
        return spread.reshape(-1)

    def _pool(self, own: Jagged, buffers: BagBuffers) -> None:
        """Work out how vectors come from rows, and gradients of rows from those of vectors."""
        rows, places, offsets = own.num_rows, buffers.places, offsets_of(own)
        counts = np.diff(offsets[::rows] if rows else np.zeros(own.num_tables + 1, np.int64))
        number = np.arange(len(own.keys)) - np.repeat(np.cumsum(counts) - counts, counts)
        feature = np.repeat(self._first_feature[:-1], counts) + number // places
        row = (number % places * len(self._features) + feature).astype(np.int32)
        weights = None if own.weights is None else own.weights.copy()
        for part, bag_keys in concat_parts(self.specs, offsets, rows):
            row[part] = row[part].reshape(rows, bag_keys).T.reshape(-1)
            if weights is not None:
                weights[part] = weights[part].reshape(rows, bag_keys).T.reshape(-1)
        offsets = offsets_of_vectors(self.specs, offsets, rows)
        buffers.bags = self._on_device(row, offsets, weights)
        if buffers.grad_vectors is None:
            return
        lengths = np.diff(offsets)
        vector = np.repeat(np.arange(len(lengths)) // max(1, rows), lengths)
        sample = np.repeat(np.arange(len(lengths)) % max(1, rows), lengths)
        source = (sample * (self.first + len(self._places)) + self._places[vector]).astype(np.int32)
        factors = np.ones(len(row), np.float32) if weights is None else weights
        divided = np.repeat(np.where(np.repeat(self._mean, rows), np.maximum(1, lengths), 1), lengths)
        factors = (factors / divided).astype(np.float32)
        key_at = np.full(places * len(self._features), -1, np.int64)
        key_at[row] = np.arange(len(row))
        there = key_at >= 0
        key_at, ends = key_at[there], np.concatenate([[0], np.cumsum(there)])
        buffers.shares = self._on_device(source[key_at], ends, factors[key_at])

    def _on_device(self, keys: Array, offsets: Array, weights: Array | None) -> Pooling:
        device = self._device
        weights = NO_WEIGHTS if weights is None else weights
        return Pooling(
            device.upload(keys, device.empty(len(keys), np.int32)),
            device.upload(offsets, device.empty(len(offsets), np.int64)),
            device.upload(weights, device.empty(len(weights), np.float32)),
        )

    def input_dist(self, buffers: BagBuffers, rows: int, global_rows: int) -> None:
        """See ``ExchangedEmbedding``; after ``take_bags``."""
        buffers.num_rows, buffers.global_rows = rows, global_rows
        self._exchange.input_dist(buffers.inner, buffers.places, buffers.places * self.comm.size)

    def lookup(self, buffers: BagBuffers) -> None:
        """Put the rows that others ask for side by side, and those that lie here where they are pooled."""
        self._exchange.lookup(buffers.inner)

    def output_dist(self, buffers: BagBuffers) -> None:
        """Bring the rows to the ranks that ask for them, and pool them there."""
        self._exchange.output_dist(buffers.inner)
        bags = buffers.bags
        assert bags is not None
        if buffers.num_rows:
            gather_pool(
                buffers.inner.vectors.reshape(-1, self._dim), self._zeros[: len(self._places)], bags.keys,
                bags.offsets, bags.weights, self._mean_of_vector, self._place_of_vector, buffers.num_rows,
                buffers.vectors, device=self._device,
            )  # fmt: skip

    def grad_dist(self, buffers: BagBuffers) -> None:
        """Give every key's row its part of the bag's gradient, and send it to the owner.

        Raises:
            ConfigError: the buffers are forward only.
        """
        check_trains(buffers.grad_vectors)
        shares, inner = buffers.shares, buffers.inner
        assert shares is not None
        assert buffers.grad_vectors is not None
        assert inner.grad_vectors is not None
        count = buffers.places * len(self._features)
        gather_pool(
            buffers.grad_vectors.reshape(-1, self._dim), self._zeros[:1], shares.keys, shares.offsets, shares.weights,
            self._sum, self._zeros[:1], count, inner.grad_vectors.reshape(-1, 1, self._dim), device=self._device,
        )  # fmt: skip
        self._exchange.grad_dist(inner)

    def sparse_update(self, buffers: BagBuffers, scalars: Array, guard: Array) -> None:
        """See ``ExchangedEmbedding``."""
        self._exchange.sparse_update(buffers.inner, scalars, guard)

    def make_room(self, buffers: BagBuffers) -> None:
        """See ``ExchangedEmbedding``."""
        self._exchange.make_room(buffers.inner)

    def exact(self, buffers: BagBuffers, rows: int, global_rows: int) -> BagBuffers:
        """See ``ExchangedEmbedding``."""
        places = buffers.places
        inner = self._exchange.exact(buffers.inner, places, places * self.comm.size)
        made = replace(buffers, inner=inner)
        made.num_rows, made.global_rows = rows, global_rows
        return made

    def raise_overflow(self, buffers: BagBuffers, guard: Array) -> None:
        """See ``ExchangedEmbedding``."""
        self._exchange.raise_overflow(buffers.inner, guard)

    def clear_overflow(self, guard: Array) -> None:
        """See ``ExchangedEmbedding``."""
        self._exchange.clear_overflow(guard)

    def bytes_sent(self, buffers: BagBuffers) -> dict[str, int]:
        """See ``ExchangedEmbedding``."""
        return self._exchange.bytes_sent(buffers.inner)
