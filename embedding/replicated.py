"""Frequent rows: every rank holds them, and all make the same step with the gradient summed over the ranks.

Their gradients are summed in one of the two ways of ``reduce_way``.

Replicas stay equal bit for bit: an all-reduce leaves the same numbers on every rank, and the update of a row depends
on nothing else.

Shapes: H replicated rows, U of them touched by the global batch, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from embedding.all_reduce import AllReduce, OneLevel
from embedding.buffers import NO_OFFSETS, NO_WEIGHTS, BatchBuffers
from embedding.comm import Comm, Event
from embedding.reduce_way import ReduceWay, ring_bytes
from embedding.slots import mark_slots
from embedding.sparse_optim import UpdateScratch, update_rows
from embedding.table import Part, Shard, create_shards, with_touched

_ONE_TABLE = np.zeros(1, np.int64)
_SUM = np.zeros(1, np.bool_)
_NO_ROWS = np.empty(0, np.int32)


class ReplicatedRows:
    """The replicated rows of some tables, one table after the other.

    Between ``start_reduce`` and ``update`` of a batch there is none of another: the gradients' room is shared.

    Attributes:
        weight: [H, D].
        rows: H.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        dim: int,
        *,
        comm: Comm,
        device: Device,
        optimizer: OptimizerConfig,
        dtype: np.dtype[Any],
        seed: int | None,
        way: ReduceWay,
        all_reduce: AllReduce | None = None,
    ) -> None:
        """Allocate and initialise the rows.

        Args:
            parts: the replicated part of each table, which may be empty.
            dim: D.
            comm: the ranks.
            device: where the rows lie.
            optimizer: of the tables.
            dtype: float32 or float64.
            seed: of the run.
            way: decides how gradients are summed.
            all_reduce: what sums gradients over the ranks; ``None``: in one step.
        """
        store = create_shards(parts, dim, device=device, optimizer=optimizer, dtype=dtype, seed=seed)
        self.weight: Array = store.weight
        self.rows = len(store.weight)
        self._store = store
        self._comm = comm
        self._all_reduce = OneLevel(comm) if all_reduce is None else all_reduce
        self._device = device
        self._optimizer = optimizer
        self._dim = dim
        self._dtype = dtype
        self._way = way
        self._scratch = UpdateScratch.create(self.rows)
        self._compact = np.empty(self.rows, np.int32)
        self._gradients = np.empty(0, dtype)

    def shards(self) -> list[Shard]:
        """Views of the rows by table; tables without any are left out."""
        return [shard for shard in with_touched(self._store.shards, self._scratch.touched) if len(shard.rows)]

    def arrays(self) -> list[Array]:
        """Weight and states, [H, D] or [H, 1]; write into them."""
        return [self._store.weight, *self._store.state.values()]

    @property
    def touched(self) -> Array | None:
        """[H] bool, rows that were updated since the last clearing; ``None``: nobody asks."""
        return self._scratch.touched

    def track_touched(self) -> None:
        """Note from now on which rows are updated."""
        self._scratch.track_touched()

    def clear_touched(self) -> None:
        """Forget which rows were updated."""
        self._scratch.clear_touched()

    def start_touched(self, buffers: BatchBuffers, slots: Array) -> Callable[[], Array | None]:
        """Choose the way for a batch and, for the touched one, start to find the rows that the global batch touches.

        Collective, as is what is returned.

        Args:
            buffers: the batch's; ``sent["all_reduce"]`` is set.
            slots: [K], those below H are replicated rows.

        Returns:
            Gives those rows, [U] int32 or int64, ascending; ``None``: the dense way.
        """
        buffers.sent["all_reduce"] = 0
        if not self.rows:
            return lambda: _NO_ROWS
        if self._way.is_dense(self.rows, buffers.global_rows, self._dim, self._dtype.itemsize):
            return lambda: None
        marks = buffers.room("marks", np.uint8, self.rows)
        marks.fill(0)
        mark_slots(slots, self.rows, marks, device=self._device)
        event = self._comm.all_reduce(marks, "max")
        buffers.sent["all_reduce"] = ring_bytes(marks.nbytes, self._comm.size)

        def found() -> Array:
            event.wait()
            return np.flatnonzero(marks.view(np.bool_))

        return found

    def sums(self, touched: Array | None) -> tuple[Array, Array]:
        """Where this rank's gradients are to be summed.

        Args:
            touched: what ``start_touched`` led to.

        Returns:
            The sums, [U, D] or [H, D], and the row in them of each replicated row, [H] int32, empty for its own.
        """
        count = self.rows if touched is None else len(touched)
        size = self._padded(count * (self._dim + (touched is None)))
        if len(self._gradients) < size:
            self._gradients = self._device.empty((size + size // 4,), self._dtype)
        if touched is not None:
            # Rows that no rank touches keep what they had: no slot names them.
            self._compact[touched] = np.arange(len(touched), dtype=np.int32)
        return (
            self._gradients[: count * self._dim].reshape(count, self._dim),
            _NO_ROWS if touched is None else self._compact,
        )

    def start_reduce(self, buffers: BatchBuffers, slots: Array, touched: Array | None) -> Event | None:
        """Start to sum over the ranks what this rank put into ``sums``.

        Args:
            buffers: the batch's; ``sent["all_reduce"]`` grows.
            slots: [K].
            touched: what ``start_touched`` led to.
        """
        used = self.rows * (self._dim + 1) if touched is None else len(touched) * self._dim
        size = self._padded(used)
        if touched is None:
            counts = self._gradients[self.rows * self._dim : used]
            counts.fill(0)
            mark_slots(slots, self.rows, counts, device=self._device)
        if not size:
            return None
        whole = self._gradients[:size]
        whole[used:] = 0
        buffers.sent["all_reduce"] += ring_bytes(whole.nbytes, self._comm.size)
        return self._all_reduce.start(whole)

    def _padded(self, numbers: int) -> int:
        return -(-numbers // self._all_reduce.multiple) * self._all_reduce.multiple

    def update(self, touched: Array | None, lr: float, step: int) -> None:
        """Update the touched rows with what ``start_reduce`` summed; the same on every rank.

        Args:
            touched: what ``start_touched`` led to.
            lr: learning rate of this step.
            step: t, from 1.
        """
        offsets, bags = NO_OFFSETS, self.rows
        if touched is not None:
            bags = len(touched)
        else:
            # Row h is a bag of its own: empty if no rank touched it.
            found = self._gradients[self.rows * self._dim : self.rows * (self._dim + 1)] > 0
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(found, dtype=np.int64)])
            touched = np.flatnonzero(found)
        if not len(touched):
            return
        update_rows(
            self._optimizer,
            self.weight,
            self._store.state,
            _ONE_TABLE,
            touched,
            offsets,
            NO_WEIGHTS,
            _SUM,
            _ONE_TABLE,
            bags,
            self._gradients[: bags * self._dim].reshape(bags, 1, self._dim),
            lr=lr,
            step=step,
            scratch=self._scratch,
            device=self._device,
        )
