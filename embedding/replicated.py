"""Frequent rows: every rank holds them, and all make the same step with the gradient summed over the ranks.

Two ways to sum:

- compact: which rows the global batch touches is found out first (one byte a row, all-reduced with ``max`` while the
  keys travel); the gradients of those rows are all-reduced;
- dense: the gradients of all rows are all-reduced, with one more number a row that says how many ranks touched it.

The compact way never sends more bytes, but it takes one more collective. So the way is chosen for every batch, with
the start of a collective counted as so many bytes. The choice needs the number of touched rows before it is known: it
is predicted from an earlier batch, whose number every rank knows, so that all choose alike. That is the batch four
before: its update is done, however many batches a schedule runs ahead, so that the choice does not depend on that.

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
from embedding.slots import mark_slots
from embedding.sparse_optim import UpdateScratch, update_rows
from embedding.table import Part, Shard, create_shards, with_touched

_ONE_TABLE = np.zeros(1, np.int64)
_SUM = np.zeros(1, np.bool_)
_NO_ROWS = np.empty(0, np.int32)
_LAG = 4
"""Batches between one and those that its prediction looks at: as many as may be in flight."""


def compact_bytes(rows: int, touched: float, dim: int, itemsize: int) -> float:
    """Bytes that the compact way reduces: marks of all rows, gradients of the touched ones."""
    return rows + touched * dim * itemsize


def dense_bytes(rows: int, dim: int, itemsize: int) -> int:
    """Bytes that the dense way reduces: a gradient and a count for every row."""
    return rows * (dim + 1) * itemsize


def ring_bytes(size: int, ranks: int) -> int:
    """Bytes that one of ``ranks`` sends to all-reduce ``size`` bytes: 2 (W - 1) / W of them."""
    return round(2 * (ranks - 1) / ranks * size)


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
        first_guess: Sequence[float],
        comm: Comm,
        device: Device,
        optimizer: OptimizerConfig,
        dtype: np.dtype[Any],
        seed: int | None,
        start_bytes: float = 0.0,
        all_reduce: AllReduce | None = None,
    ) -> None:
        """Allocate and initialise the rows.

        Args:
            parts: the replicated part of each table, which may be empty.
            dim: D.
            first_guess: keys of each table per row of the batch: bounds the touched rows of the first batch.
            comm: the ranks.
            device: where the rows lie.
            optimizer: of the tables.
            dtype: float32 or float64.
            seed: of the run.
            start_bytes: what an all-reduce could send in the time that it takes to start; 0: always compact.
            all_reduce: what sums gradients over the ranks; ``None``: in one step.
        """
        store = create_shards(parts, dim, device=device, optimizer=optimizer, dtype=dtype, seed=seed)
        self.weight: Array = store.weight
        self.rows = len(store.weight)
        self._store = store
        self._limits = np.array([len(part.rows) for part in parts], np.float64)
        self._hotness = np.array(first_guess, np.float64)
        self._comm = comm
        self._all_reduce = OneLevel(comm) if all_reduce is None else all_reduce
        self._device = device
        self._optimizer = optimizer
        self._dim = dim
        self._dtype = dtype
        self._start_bytes = start_bytes
        self._scratch = UpdateScratch.create(self.rows)
        self._compact = np.empty(self.rows, np.int32)
        self._batches = 0
        self._touched: dict[int, tuple[int, int]] = {}  # of the latest batches: touched rows, global rows
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

    def predicted_touched(self, number: int, global_rows: int) -> float:
        """Rows that batch ``number`` is expected to touch: as an earlier one did, in proportion to their sizes."""
        known = self._touched.get(number - _LAG)
        if known is None:
            return float(np.minimum(self._limits, self._hotness * global_rows).sum())
        touched, rows = known
        return min(float(self.rows), touched * global_rows / rows)

    def _note_touched(self, number: int, touched: int, global_rows: int) -> None:
        self._touched[number] = touched, max(1, global_rows)
        self._touched.pop(number - 2 * _LAG, None)

    def start_touched(self, buffers: BatchBuffers, slots: Array) -> Callable[[], Array | None]:
        """Choose the way for a batch and, for the compact one, start to find the rows that the global batch touches.

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
        itemsize = self._dtype.itemsize
        number = buffers.number = self._batches
        self._batches += 1
        predicted = self.predicted_touched(number, buffers.global_rows)
        compact = compact_bytes(self.rows, predicted, self._dim, itemsize)
        if compact + self._start_bytes >= dense_bytes(self.rows, self._dim, itemsize):
            return lambda: None
        marks = buffers.room("marks", np.uint8, self.rows)
        marks.fill(0)
        mark_slots(slots, self.rows, marks, device=self._device)
        event = self._comm.all_reduce(marks, "max")
        buffers.sent["all_reduce"] = ring_bytes(marks.nbytes, self._comm.size)

        def found() -> Array:
            event.wait()
            touched = np.flatnonzero(marks.view(np.bool_))
            self._note_touched(number, len(touched), buffers.global_rows)
            return touched

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

    def update(self, buffers: BatchBuffers, touched: Array | None, lr: float, step: int) -> None:
        """Update the touched rows with what ``start_reduce`` summed; the same on every rank.

        Args:
            buffers: the batch's.
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
            self._note_touched(buffers.number, len(touched), buffers.global_rows)
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
