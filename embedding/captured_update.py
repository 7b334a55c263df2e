"""The sparse update of a captured step: which form it takes, and what it needs for itself.

Two calls a step, so that the first may run beside the forward pass: ``prepare`` needs the keys alone, ``update`` the
gradients. Neither allocates, waits, or takes an argument that changes from step to step.

Shapes: T tables in one weight array of R rows, B bags a table, K keys, D columns, F places of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from embedding.row_sort import RowSort, sort_rows
from embedding.sorted_update import origins_of, update_sorted
from embedding.sparse_optim import mark_touched, sgd_one_hot
from embedding.table import ShardStore


class CapturedUpdate:
    """The update of one store's rows.

    Args:
        optimizer: kind and constants.
        store: the rows; its shards are the tables, in this order.
        mean: [T] bool: mean pooling, otherwise sum.
        place: [T], where each table's gradient lies.
        num_keys: K, most keys of a batch.
        one_hot: whether every bag holds exactly one key.
        weighted: whether keys have weights.
        deterministic: no sums in an order of their own making.
        device: holds the rows.
        row_start: [T] int64 of the device, first row of each table; ``None``: the store's. Features may share a table.

    Attributes:
        atomic: whether gradients are added to the rows as they come: SGD over float32 rows with one key a bag, where
            nobody asks for the same bits again. Bags name rows so often that they are sorted first in any case
            (``benchmarks/gpu_kernels.py`` times both).
        touched: [R] bool, rows that were updated since ``track_touched`` was called or it was cleared; ``None``: nobody
            asks.
    """

    def __init__(
        self,
        optimizer: OptimizerConfig,
        store: ShardStore,
        mean: Array,
        place: Array,
        num_keys: int,
        *,
        one_hot: bool,
        weighted: bool,
        deterministic: bool,
        device: Device,
        row_start: Array | None = None,
    ) -> None:
        self._row_start = store.row_start if row_start is None else row_start
        self._kind, self._store, self._device = optimizer.kind, store, device
        self._form = (one_hot, weighted)
        rows, dim = store.weight.shape
        self.atomic = optimizer.kind == "sgd" and store.weight.dtype == np.float32 and one_hot and not deterministic
        self._sort = None if self.atomic else RowSort.create(device, num_keys, rows, dim, weighted=weighted)
        xp = device.xp
        self._mean, self._place = xp.asarray(mean, np.bool_), xp.asarray(place, np.int64)
        self._origins = xp.asarray(origins_of(store.shards))
        self.touched: Array | None = None

    def serves(self, num_keys: int, *, one_hot: bool, weighted: bool) -> bool:
        """Whether it was made for such a batch."""
        fits = self._sort is None or num_keys <= self._sort.capacity
        return fits and self._form == (one_hot, weighted)

    def track_touched(self) -> None:
        """Note from now on which rows are updated; before anything is captured."""
        if self.touched is None:
            self.touched = self._device.zeros(len(self._store.weight), np.bool_)

    def prepare(self, keys: Array, offsets: Array, key_weights: Array, num_rows: int) -> None:
        """What can be done before the gradients are there.

        Args:
            keys: [K or more] int32 or int64, table-major.
            offsets: [T * B + 1] int64; empty for one key a bag.
            key_weights: [K] float32; empty for none.
            num_rows: B.
        """
        if self._sort is not None:
            rows = len(self._store.weight)
            self._run(sort_rows, self._row_start, keys, offsets, key_weights, num_rows, rows, self._sort)

    def update(
        self,
        keys: Array,
        offsets: Array,
        key_weights: Array,
        num_rows: int,
        gradients: Array,
        scalars: Array,
        guard: Array,
    ) -> None:
        """Update the rows that the keys name.

        Args:
            keys: as ``prepare`` had them.
            offsets: as ``prepare`` had them.
            key_weights: as ``prepare`` had them.
            num_rows: B.
            gradients: [B or more, F, D] C-contiguous, times the loss scale.
            scalars: see ``dlrm.scalars``; the optimiser's constants (``sparse_optim.constants``) at ``SPARSE``.
            guard: see ``dlrm.scalars``; nothing is written when it says so.
        """
        store = self._store
        if self.touched is not None:
            # Also where the guard then keeps the row: saving a row too many is no harm.
            self._run(mark_touched, keys, offsets, self._row_start, num_rows, self.touched)
        if self._sort is None:
            rest = (self._place, num_rows, gradients, scalars, guard)
            self._run(sgd_one_hot, store.weight, self._row_start, keys, *rest)
            return
        self._run(
            update_sorted, self._kind, store.weight, list(store.state.values()), self._row_start, keys, offsets,
            key_weights, self._mean, self._place, num_rows, gradients, self._origins, scalars, guard, self._sort,
        )  # fmt: skip

    def _run(self, reference: Callable[..., Any], *arguments: Any) -> None:
        kernel = self._device.kernel(_MODULES[reference], reference.__name__)
        (kernel or reference)(*arguments)


_MODULES = {
    sort_rows: "embedding.row_sort",
    mark_touched: "embedding.row_sort",
    update_sorted: "embedding.sorted_update",
    sgd_one_hot: "embedding.sparse_optim",
}
"""The modules beside which the launches of these operations lie."""
