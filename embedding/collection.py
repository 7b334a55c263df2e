"""Embedding tables spread over ranks, each table whole on one of them.

One batch takes these steps, every rank in this order::

    buffers = embedding.buffers(capacity, vectors, grad_vectors)   # once per Flight; grad_vectors=None: forward only
    embedding.input_dist(keys, buffers, global_rows)  # keys to the owners
    embedding.lookup(buffers)                         # owners gather and pool for the global batch
    embedding.output_dist(buffers)                    # -> vectors[:B, first : first + T]
    embedding.grad_dist(buffers)                      # grad_vectors[:B, first : first + T] -> owners
    embedding.sparse_update(buffers, lr, step)

``vectors`` and ``grad_vectors`` are bound to the buffers when these are made, so that a single rank looks up
straight into the one and updates straight from the other: then ``output_dist`` and ``grad_dist`` have nothing to do.
With a single rank the keys handed to ``input_dist`` are used where they lie until the batch is done.

Shapes: T tables, B rows of this rank, G rows of the global batch, F = first + T places, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import ConfigError
from embedding.batch import check_arrays, check_batch, check_trains
from embedding.buffers import NO_OFFSETS, NO_WEIGHTS, Finish, nothing_left
from embedding.comm import Comm
from embedding.exchange import EmbeddingBuffers, Exchange
from embedding.jagged import Jagged
from embedding.lookup import gather_pool
from embedding.plan import TableSpec
from embedding.sparse_optim import UpdateScratch, update_rows
from embedding.table import Part, Shard, Table, create_shards, with_touched
from embedding.wire import Precision, Wire


class Ownership(Protocol):
    """Which rank owns which of some tables; a ``Plan`` of whole tables is one."""

    @property
    def specs(self) -> tuple[TableSpec, ...]:
        """The tables."""

    @property
    def ranks(self) -> int:
        """Ranks in all."""

    def tables_of(self, rank: int) -> list[int]:
        """Numbers of the tables that ``rank`` owns, in ascending order."""


class TableWiseEmbedding:
    """Look-up, exchange and update of tables that each lie whole on one rank.

    Attributes:
        specs: all tables, in manifest order.
        tables: the tables that this rank owns, in manifest order.
    """

    def __init__(
        self,
        *,
        specs: Sequence[TableSpec],
        plan: Ownership,
        comm: Comm,
        device: Device,
        optimizer: OptimizerConfig,
        dtype: Any,
        seed: int | None,
        first: int = 0,
        exchange_precision: Precision = "fp32",
        parts: Sequence[Part] | None = None,
        places: Sequence[int] | None = None,
        num_places: int | None = None,
        bags_per_row: int = 1,
    ) -> None:
        """Allocate and initialise this rank's tables.

        Args:
            specs: all tables, in manifest order; one dim.
            plan: owners of ``specs`` on ``comm.size`` ranks.
            comm: the embedding lane's ranks.
            device: where tables and buffers lie.
            optimizer: of the tables.
            dtype: float32 or float64.
            seed: of the run.
            first: place of table 0 in ``vectors``: 1 behind a bottom MLP's output, else 0.
            exchange_precision: how vectors and gradients travel.
            parts: what each of ``specs`` is a column part of; ``None``: whole tables.
            places: place of each table in ``vectors``; ``None``: one after the other from ``first``.
            num_places: F; ``None``: ``first + T``.
            bags_per_row: bags that a row of the batch has in each table.

        Raises:
            ConfigError: the plan is for other tables or ranks, or dims differ.
        """
        if plan.ranks != comm.size or plan.specs != tuple(specs):
            raise ConfigError(
                f"plan: made for {plan.ranks} ranks and {len(plan.specs)} tables, but there are {comm.size} ranks "
                f"and {len(specs)} tables; plan again"
            )
        if len({spec.dim for spec in specs}) > 1:
            raise ConfigError(f"tables: dims {sorted({spec.dim for spec in specs})} differ; give all tables one dim")
        self.specs = tuple(specs)
        self._comm, self._bags_per_row = comm, bags_per_row
        self._device = device
        self._optimizer = optimizer
        self._dtype = np.dtype(dtype)
        self._dim = specs[0].dim if specs else 1
        self._rows = np.array([spec.rows for spec in specs], np.int64)
        where = np.arange(first, first + len(specs)) if places is None else np.array(places, np.int64)
        self._num_places = first + len(specs) if num_places is None else num_places
        own = plan.tables_of(comm.rank)
        whole = [Part.whole(spec) for spec in specs] if parts is None else parts
        self._store = create_shards(
            [whole[table] for table in own], self._dim, device=device, optimizer=optimizer, dtype=dtype, seed=seed
        )
        self._own = own
        self._mean = np.array([self.specs[table].pooling == "mean" for table in own], np.bool_)
        single = comm.size == 1
        self._place = where[own] if single else np.arange(len(own), dtype=np.int64)
        wire = Wire(exchange_precision, self._dtype, device)
        owned_by = [plan.tables_of(rank) for rank in range(comm.size)]
        self._exchange = None if single else Exchange(owned_by, comm, device, where, wire, bags_per_row)
        self._scratch = UpdateScratch.create(len(self._store.weight))

    @property
    def tables(self) -> list[Table]:
        """The tables that this rank owns, in manifest order."""
        return [
            Table(self.specs[table], shard.weight, shard.state)
            for table, shard in zip(self._own, self._store.shards, strict=True)
        ]

    def shards(self) -> list[Shard]:
        """What this rank holds, in manifest order."""
        return with_touched(self._store.shards, self._scratch.touched)

    def settle(self) -> None:
        """Nothing: every row lies in one place."""

    def spread(self) -> None:
        """Nothing: every row lies in one place."""

    def track_touched(self) -> None:
        """Note from now on which rows are updated."""
        self._scratch.track_touched()

    def clear_touched(self) -> None:
        """Forget which rows were updated."""
        self._scratch.clear_touched()

    def buffers(self, capacity: int, vectors: Array, grad_vectors: Array | None = None) -> EmbeddingBuffers:
        """Room for one batch in flight.

        Args:
            capacity: most rows of this rank.
            vectors: [capacity or more, F, D] C-contiguous; the output.
            grad_vectors: the same shape; its gradients. ``None``: forward only.

        Raises:
            ConfigError: an array has another shape, dtype or layout.
        """
        check_arrays(vectors, grad_vectors, capacity, (self._num_places, self._dim), self._dtype)
        buffers = EmbeddingBuffers(capacity, vectors, grad_vectors)
        if self._exchange is not None:
            buffers.rank_rows = self._device.empty((capacity * len(self.specs), self._dim), self._dtype)
        return buffers

    def input_dist(self, keys: Jagged, buffers: EmbeddingBuffers, global_rows: int) -> None:
        """Check this rank's keys and send them to the owners.

        Args:
            keys: all tables' keys of this rank's share of the batch.
            buffers: the batch's.
            global_rows: G.

        Raises:
            DataError: a key lies outside its table, or the bags are malformed.
            CommError: the ranks disagree about the batch.
        """
        check_batch(keys, buffers.capacity, global_rows, self.specs, self._rows, self._comm, self._device)
        self.distribute(keys, buffers, global_rows)

    def distribute(self, keys: Jagged, buffers: EmbeddingBuffers, global_rows: int) -> None:
        """``input_dist`` of keys that have been checked."""
        buffers.num_rows, buffers.global_rows = keys.num_rows, global_rows
        if self._exchange is None:
            buffers.owned = keys
            buffers.sent["input_dist"] = 0
            return
        buffers.owned = self._exchange.input_dist(keys, buffers)
        needed = global_rows * self._bags_per_row * len(self._own)
        if buffers.owner_rows is None or len(buffers.owner_rows) < needed:
            buffers.owner_rows = self._device.empty((needed, self._dim), self._dtype)

    def lookup(self, buffers: EmbeddingBuffers) -> None:
        """Gather and pool this rank's tables for the global batch; one rank: straight into ``vectors``."""
        keys = _given(buffers.owned)
        if not self._own or not keys.num_rows:
            return
        gather_pool(
            self._store.weight,
            self._store.row_start,
            keys.keys,
            NO_OFFSETS if keys.offsets is None else keys.offsets,
            NO_WEIGHTS if keys.weights is None else keys.weights,
            self._mean,
            self._place,
            keys.num_rows,
            self._on_owner(buffers, buffers.vectors),
            device=self._device,
        )

    def output_dist(self, buffers: EmbeddingBuffers) -> None:
        """Send the pooled vectors to the ranks whose rows they are: ``vectors[:B, first + t]`` is table t's."""
        self.start_output_dist(buffers)()

    def start_output_dist(self, buffers: EmbeddingBuffers) -> Finish:
        """Start ``output_dist``; what is returned ends it."""
        if self._exchange is not None:
            return self._exchange.output_dist(buffers)
        buffers.sent["output_dist"] = 0
        return nothing_left

    def grad_dist(self, buffers: EmbeddingBuffers) -> None:
        """Send the gradients ``grad_vectors[:B, first + t]`` to the owners.

        Raises:
            ConfigError: the buffers are forward only.
        """
        self.start_grad_dist(buffers)()

    def start_grad_dist(self, buffers: EmbeddingBuffers) -> Finish:
        """Start ``grad_dist``; what is returned ends it."""
        check_trains(buffers.grad_vectors)
        if self._exchange is not None:
            return self._exchange.grad_dist(buffers)
        buffers.sent["grad_dist"] = 0
        return nothing_left

    def sparse_update(self, buffers: EmbeddingBuffers, lr: float, step: int) -> None:
        """Update the rows that the global batch touched.

        Args:
            buffers: after ``grad_dist``.
            lr: learning rate of this step.
            step: t, from 1.
        """
        keys = _given(buffers.owned)
        if not self._own or not keys.num_rows:
            return
        update_rows(
            self._optimizer,
            self._store.weight,
            self._store.state,
            self._store.row_start,
            keys.keys,
            NO_OFFSETS if keys.offsets is None else keys.offsets,
            NO_WEIGHTS if keys.weights is None else keys.weights,
            self._mean,
            self._place,
            keys.num_rows,
            self._on_owner(buffers, buffers.grad_vectors),
            lr=lr,
            step=step,
            scratch=self._scratch,
            device=self._device,
        )

    def bytes_sent(self, buffers: EmbeddingBuffers) -> dict[str, int]:
        """Bytes that the last batch sent to other ranks, by exchange."""
        return dict(buffers.sent)

    def _on_owner(self, buffers: EmbeddingBuffers, bound: Array) -> Array:
        """[G or more, places, D]: where the owner's vectors or gradients of the global batch lie."""
        if self._exchange is None:
            return bound
        rows = _given(buffers.owner_rows)
        own, bags = len(self._own), buffers.global_rows * self._bags_per_row
        return rows[: bags * own].reshape(bags, own, self._dim)


def _given(value: Any) -> Any:
    if value is None:
        raise ConfigError("batch: input_dist has not been called; call it first")
    return value
