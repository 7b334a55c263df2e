"""Bags of keys over several GPUs: every key is exchanged like one of one key a bag, and bags are pooled at home.

The keys of a table's bags are spread over so many *features* of one key a row as its bags hold on average; places
without a key are in no list. ``ExchangedEmbedding`` brings every feature's row to the rank that asks for it, where bags
are pooled from them by the kernel that pools bags from tables. Gradients go the same way back: that of a bag, times the
key's weight, to each of its keys. A table whose vectors are not pooled is H bags of one key a row. What lies where is
found out on the device (``bag_lists``), for as many places as there is room for, so that a captured step serves any
batch that fits.

Shapes: T tables, W ranks, G rows of the global batch, B of this rank, V vectors of a row, F = first + V places, U
features, S places of each feature of a rank, D columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import DataError
from embedding.bag_lists import BagLayout, GlobalBags, Pooling, list_bags, places_needed, spread_keys
from embedding.bag_room import BagRoom, offsets_of
from embedding.batch import check_arrays, check_bag_keys, check_trains
from embedding.buffers import NO_WEIGHTS, BatchBuffers
from embedding.captured_exchange import ExchangedEmbedding
from embedding.captured_placement import MORE, MOST_ROWS
from embedding.comm import Comm
from embedding.exchange_buffers import ExchangeBuffers
from embedding.exchange_route import call
from embedding.jagged import Jagged
from embedding.lookup import gather_pool
from embedding.pair_lists import PairLists
from embedding.placement import Plan, tables_of_vectors
from embedding.table import Shard
from embedding.topology import Topology
from embedding.wire import Precision


@dataclass(slots=True, kw_only=True)
class BagBuffers(BatchBuffers):
    """One batch in flight; its keys are written by whoever uploads the batch.

    Attributes:
        inner: of its keys, each a row of the exchange.
        everyones: the bags of all ranks; ``offsets`` is part of ``all_offsets``.
        all_offsets: [T * G + 1] int64 of the device, for as many rows as there may be.
        over: [1] int32 of the device: whether a feature has too few places.
        pooled: how vectors are pooled from rows.
        shares: what each row's gradient comes from; ``None``: forward only.
        tables: T.
        form: counts how often these arrays were made anew.
    """

    inner: ExchangeBuffers
    everyones: GlobalBags
    all_offsets: Array
    over: Array
    pooled: Pooling
    shares: Pooling | None
    tables: int
    form: int = 0

    def open(self, rows: int) -> None:
        """Have ``offsets`` of a global batch of so many rows, to be written."""
        self.everyones.offsets = self.all_offsets[: self.tables * rows + 1]

    @property
    def places(self) -> int:
        """S."""
        return self.inner.capacity

    @property
    def keys(self) -> Array:
        """Of ``everyones``."""
        return self.everyones.keys

    @property
    def offsets(self) -> Array:
        """Of ``everyones``."""
        return self.everyones.offsets

    @property
    def weights(self) -> Array:
        """Of ``everyones``."""
        return self.everyones.weights

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
        features = [table for table, count in enumerate(room.features) for _ in range(count)]
        self._exchange = ExchangedEmbedding(
            plan=plan, comm=comm, topology=topology, device=device, optimizer=optimizer, table_dtype=table_dtype,
            seed=seed, first=0, deterministic=deterministic, exchange_precision=exchange_precision,
            hierarchical=hierarchical, most=room.most, features=features, lists=lists,
        )  # fmt: skip
        self.specs, self.plan, self.comm, self.topology, self.first = plan.specs, plan, comm, topology, first
        self._device, self._room, self._dim = device, room, plan.specs[0].dim
        self._layout = BagLayout.create(
            plan.specs, room.features, first=first, ranks=comm.size, rank=comm.rank, device=device
        )
        vectors, xp = self._layout.vectors, device.xp
        self._mean_of_vector = xp.asarray(
            np.array([plan.specs[table].pooling == "mean" for table in tables_of_vectors(plan.specs)], np.bool_)
        )
        self._place_of_vector = xp.arange(first, first + vectors, dtype=np.int64)
        self._zeros = xp.asarray(np.zeros(max(1, vectors), np.int64))
        self._sum = xp.asarray(np.zeros(1, np.bool_))
        self._no_weights = xp.asarray(NO_WEIGHTS)
        self._more = 1.0  # times as many places as were expected to be enough

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
        places = (self.first + self._layout.vectors, self._dim)
        check_arrays(vectors, grad_vectors, capacity, places, vectors.dtype)
        device, ranks = self._device, self.comm.size
        offsets = device.zeros(len(self.specs) * capacity * ranks + 1, np.int64)
        return BagBuffers(
            capacity=capacity, vectors=vectors, grad_vectors=grad_vectors, all_offsets=offsets,
            over=device.zeros(1, np.int32), tables=len(self.specs),
            **self._of_places(
                math.ceil(self._more * self._room.slots(capacity)), capacity, vectors.dtype,
                trains=grad_vectors is not None,
            ),
            everyones=GlobalBags(device.zeros(1, np.int32), offsets[:1], self._no_weights),
        )  # fmt: skip

    def _of_places(self, places: int, capacity: int, dtype: Any, *, trains: bool) -> dict[str, Any]:
        """What a batch has for each place of a feature.

        Raises:
            DataError: there are more places than can be numbered.
        """
        device, layout = self._device, self._layout
        rows = places * layout.features
        if rows * self.comm.size >= MOST_ROWS:
            raise DataError(
                f"batch: {rows * self.comm.size} places for its keys, but {MOST_ROWS - 1} can be numbered; use a "
                "smaller one"
            )
        shape = (places, layout.features, self._dim)
        vectors = device.zeros(shape, dtype)
        gradients = device.zeros(shape, dtype) if trains else None
        capacities = [min(rows, most) for most in self._room.capacities(capacity, self._exchange.room)]
        pooled = Pooling(
            device.zeros(rows, np.int32), device.zeros(layout.vectors * capacity + 1, np.int64), self._no_weights
        )
        shares = None
        if trains:
            each = device.xp.arange(rows + 1, dtype=np.int64)
            shares = Pooling(device.zeros(rows, np.int32), each, device.zeros(rows, np.float32))
        return {
            "inner": self._exchange.buffers(places, vectors, gradients, tuple(capacities)),
            "pooled": pooled,
            "shares": shares,
        }

    def make_bags(self, buffers: BagBuffers, num_keys: int, *, weighted: bool, dtype: Any = np.int32) -> None:
        """Make the arrays of global batches of up to so many keys anew.

        Args:
            buffers: of a batch; keys are written into them by ``take_bags``, or, after ``open``, by anybody.
            num_keys: most keys.
            weighted: whether they have weights.
            dtype: of the keys.
        """
        device, room = self._device, max(len(buffers.keys), num_keys)
        buffers.form += 1
        buffers.everyones.keys = device.zeros(room, dtype)
        buffers.everyones.weights = device.zeros(room, np.float32) if weighted else self._no_weights
        self._fit(buffers)

    def _fit(self, buffers: BagBuffers) -> None:
        """Have what a batch has by place of the types of its keys."""
        device, inner, pooled = self._device, buffers.inner, buffers.pooled
        weighted = len(buffers.weights) > 0
        pooled.weights = device.zeros(len(pooled.keys), np.float32) if weighted else self._no_weights
        if inner.keys.dtype != buffers.keys.dtype:
            inner.keys = device.zeros(inner.keys.shape, buffers.keys.dtype)

    def take_bags(self, own: Jagged, everyones: Jagged, buffers: BagBuffers) -> None:
        """Copy a batch of bags from the host, outside of any capture.

        For a batch of more keys than there is room for, arrays are made anew, on all ranks alike, and ``form`` counts
        on. A batch whose features have too few places has to be run again, as one whose lists are too short.

        Args:
            own: this rank's.
            everyones: the bags of the global batch, the same on every rank.
            buffers: the batch's.

        Raises:
            DataError: a bag of a table whose vectors are not pooled holds another number of keys than all.
        """
        check_bag_keys(own, self.specs, f"rank {self.comm.rank}: ")
        device, count, weighted = self._device, len(everyones.keys), everyones.weights is not None
        offsets = offsets_of(everyones)
        form = (len(buffers.weights) > 0, buffers.keys.dtype)
        if form != (weighted, everyones.keys.dtype) or count > len(buffers.keys):
            self.make_bags(buffers, count + count // 4 + 1, weighted=weighted, dtype=everyones.keys.dtype)
        buffers.open(everyones.num_rows)
        device.upload(everyones.keys, buffers.keys[:count])
        device.upload(offsets, buffers.offsets)
        if weighted:
            device.upload(everyones.weights, buffers.weights[:count])

    def input_dist(self, buffers: BagBuffers, rows: int, global_rows: int) -> None:
        """See ``ExchangedEmbedding``; the bags lie in ``buffers``."""
        buffers.begin(rows, global_rows)
        bags, layout, inner = buffers.everyones, self._layout, buffers.inner
        spread = inner.keys[: buffers.places * layout.features * layout.ranks]
        call(self._device, spread_keys, bags, global_rows, layout, spread, buffers.over)
        call(self._device, list_bags, bags, global_rows, layout, buffers.places, buffers.pooled, buffers.shares)
        self._exchange.input_dist(inner, buffers.places, buffers.places * self.comm.size)
        self._device.xp.bitwise_or(inner.lists.flag, buffers.over, out=inner.lists.flag)

    def lookup(self, buffers: BagBuffers) -> None:
        """Put the rows that others ask for side by side, and those that lie here where they are pooled."""
        self._exchange.lookup(buffers.inner)

    def output_dist(self, buffers: BagBuffers) -> None:
        """Bring the rows to the ranks that ask for them, and pool them there."""
        self._exchange.output_dist(buffers.inner)
        if rows := buffers.num_rows:
            bags, vectors = buffers.pooled, self._layout.vectors
            gather_pool(
                buffers.inner.vectors.reshape(-1, self._dim), self._zeros[:vectors], bags.keys,
                bags.offsets[: vectors * rows + 1], bags.weights, self._mean_of_vector, self._place_of_vector, rows,
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
        count = buffers.places * self._layout.features
        gather_pool(
            buffers.grad_vectors.reshape(-1, self._dim), self._zeros[:1], shares.keys, shares.offsets, shares.weights,
            self._sum, self._zeros[:1], count, inner.grad_vectors.reshape(-1, 1, self._dim), device=self._device,
        )  # fmt: skip
        self._exchange.grad_dist(inner)

    def sum_replicated(self, buffers: BagBuffers) -> None:
        """Nothing: the rows' parts are not there before ``grad_dist``."""

    def reduce_replicated(self, buffers: BagBuffers) -> None:
        """Sum the gradients of replicated rows here and over the ranks."""
        self._exchange.sum_replicated(buffers.inner)
        self._exchange.reduce_replicated(buffers.inner)

    def sparse_update(self, buffers: BagBuffers, scalars: Array, guard: Array) -> None:
        """See ``ExchangedEmbedding``."""
        self._exchange.sparse_update(buffers.inner, scalars, guard)

    def make_room(self, buffers: BagBuffers) -> None:
        """See ``ExchangedEmbedding``; also of places."""
        self._exchange.make_room(buffers.inner)
        if (needed := self._places_needed(buffers)) > buffers.places:
            self._more = max(self._more, MORE * needed / self._room.slots(buffers.capacity))

    def exact(self, buffers: BagBuffers, rows: int, global_rows: int) -> BagBuffers:
        """See ``ExchangedEmbedding``; also of places."""
        made = replace(buffers)
        if (needed := self._places_needed(buffers)) > buffers.places:
            trains = buffers.grad_vectors is not None
            made = replace(
                buffers, **self._of_places(needed, buffers.capacity, buffers.vectors.dtype, trains=trains)
            )  # fmt: skip
            self._fit(made)
            self.input_dist(made, rows, global_rows)
        places = made.places
        made.inner = self._exchange.exact(made.inner, places, places * self.comm.size)
        made.begin(rows, global_rows)
        return made

    def _places_needed(self, buffers: BagBuffers) -> int:
        host = self._device.to_host
        layout = replace(self._layout, first_feature=host(self._layout.first_feature))
        return places_needed(host(buffers.offsets), buffers.global_rows, layout)

    def raise_overflow(self, buffers: BagBuffers, guard: Array) -> None:
        """See ``ExchangedEmbedding``."""
        self._exchange.raise_overflow(buffers.inner, guard)

    def clear_overflow(self, guard: Array) -> None:
        """See ``ExchangedEmbedding``."""
        self._exchange.clear_overflow(guard)

    def bytes_sent(self, buffers: BagBuffers) -> dict[str, int]:
        """See ``ExchangedEmbedding``."""
        return self._exchange.bytes_sent(buffers.inner)
