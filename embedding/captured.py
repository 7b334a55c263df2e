"""Tables of one GPU, looked up and updated by steps that are captured into CUDA graphs.

Between ``input_dist`` and ``sparse_update`` nothing is allocated and the host waits for nothing; whatever changes from
step to step is read from the two blocks of ``dlrm.scalars``.

To the kernels a table whose vectors are not pooled is H tables of one key a bag that share their rows: *features*.

Shapes: T tables, V features (vectors of a row: T, where all tables are pooled), B rows of the batch, F = first + V
places, D columns, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import DeviceError
from embedding.batch import check_arrays, check_bag_keys
from embedding.buffers import NO_OFFSETS, NO_WEIGHTS, BatchBuffers
from embedding.captured_update import CapturedUpdate
from embedding.concat import concat_parts, offsets_of_vectors
from embedding.jagged import Jagged
from embedding.lookup import gather_pool
from embedding.placement import TableSpec, tables_of_vectors
from embedding.sparse_optim import bytes_per_row
from embedding.store_mirrors import StoreMirrors
from embedding.table import Part, Shard, ShardStore, create_shards


@dataclass(slots=True)
class CapturedBuffers(BatchBuffers):
    """One batch in flight; its keys are written by whoever uploads the batch.

    Attributes:
        keys: [K or more] int32 or int64 of the device, feature-major.
        offsets: [V * B + 1] int64 of the device, part of ``all_offsets``; empty for one key a bag.
        weights: as many float32 of the device as there are keys; empty for none.
        update: of the rows that the keys name; ``None``: forward only.
        all_offsets: room for the offsets of ``capacity`` rows; empty for one key a bag.
        form: counts how often these arrays were made anew.
    """

    keys: Array = None
    offsets: Array = None
    weights: Array = None
    update: CapturedUpdate | None = None
    all_offsets: Array = None
    form: int = 0

    @property
    def one_hot(self) -> bool:
        """Whether every bag holds one key."""
        return len(self.all_offsets) == 0

    def open(self, rows: int) -> None:
        """Have ``offsets`` of a batch of so many rows, to be written."""
        if not self.one_hot:
            self.offsets = self.all_offsets[: (len(self.all_offsets) - 1) // self.capacity * rows + 1]


class CapturedEmbedding:
    """All tables on one GPU.

    Attributes:
        specs: the tables, in manifest order.
        store: their rows on the device.
        row_start: [V] int64 of the device: first row of each feature's table.
        mean: [V] bool of the device: mean pooling, otherwise sum.
        place: [V] int64 of the device: place of each feature in the vectors.
    """

    def __init__(
        self,
        *,
        specs: Sequence[TableSpec],
        device: Device,
        optimizer: OptimizerConfig,
        table_dtype: Any,
        seed: int | None,
        first: int,
        deterministic: bool,
    ) -> None:
        """Allocate and initialise the tables.

        Args:
            specs: all tables, of one dim.
            device: holds them.
            optimizer: of the tables.
            table_dtype: float32, float16 or bfloat16 (uint16).
            seed: of the run; ``None``: tables of zeros, for timing.
            first: place of table 0 in the vectors: 1 behind a bottom MLP's output, else 0.
            deterministic: no sums in an order of their own making.

        Raises:
            DeviceError: the tables do not fit the device's memory.
        """
        self.specs, self.first = tuple(specs), first
        self._device, self._optimizer, self._deterministic = device, optimizer, deterministic
        self._dim = specs[0].dim if specs else 1
        check_memory(self.specs, optimizer, np.dtype(table_dtype).itemsize, device)
        parts = [Part.whole(spec) for spec in specs]
        self.store: ShardStore = create_shards(
            parts, self._dim, device=device, optimizer=optimizer, dtype=table_dtype, seed=seed
        )
        xp = device.xp
        tables = np.array(tables_of_vectors(specs), np.int64)
        self._features = len(tables)
        self._mean = np.array([specs[table].pooling == "mean" for table in tables], np.bool_)
        self.mean, self.place = xp.asarray(self._mean), xp.arange(first, first + len(tables), dtype=np.int64)
        self.row_start = xp.asarray(device.to_host(self.store.row_start)[tables])
        self._nothing = xp.asarray(NO_OFFSETS), xp.asarray(NO_WEIGHTS)
        self._updates: list[CapturedUpdate] = []
        self._touched: Array | None = None
        self._mirrors = StoreMirrors(device, self.store.shards)

    def shards(self) -> list[Shard]:
        """The tables as arrays of the host, in manifest order.

        Call ``settle`` before reading and ``spread`` after writing them; ``touched`` is that of the moment.
        """
        return self._mirrors.all(self._touched)

    def resident(self) -> list[Shard]:
        """As ``shards``, but where the rows lie, and up to date; call ``spread_resident`` after writing them."""
        return self._mirrors.resident(self._touched)

    def settle(self) -> None:
        """Bring the arrays of ``shards`` up to date."""
        self._mirrors.settle()

    def spread(self) -> None:
        """Take over what was written into the arrays of ``shards``."""
        self._mirrors.spread()

    def spread_resident(self) -> None:
        """Nothing: the arrays of ``resident`` are the rows."""

    def track_touched(self) -> None:
        """Note from now on which rows are updated: ``touched`` of the shards says which."""
        if self._touched is None:
            self._touched = self._device.zeros(len(self.store.weight), np.bool_)
            for update in self._updates:
                update.touched = self._touched

    def clear_touched(self) -> None:
        """Forget which rows were updated."""
        if self._touched is not None:
            self._touched.fill(0)

    def buffers(self, capacity: int, vectors: Array, grad_vectors: Array | None = None) -> CapturedBuffers:
        """Room for one batch in flight, of one key a bag.

        Args:
            capacity: most rows.
            vectors: [capacity or more, F, D] C-contiguous; the output.
            grad_vectors: the same shape; its gradients. ``None``: forward only.

        Raises:
            ConfigError: an array has another shape, dtype or layout.
        """
        check_arrays(vectors, grad_vectors, capacity, (self.first + self._features, self._dim), vectors.dtype)
        buffers = CapturedBuffers(capacity, vectors, grad_vectors)
        buffers.keys = self._device.zeros(max(1, self._features * capacity), np.int32)
        buffers.offsets, buffers.weights = self._nothing
        buffers.all_offsets = buffers.offsets
        if grad_vectors is not None:
            buffers.update = self._make_update(self._features * capacity, one_hot=True, weighted=False)
        return buffers

    def take_bags(self, keys: Array, offsets: Array | None, weights: Array | None, buffers: CapturedBuffers) -> None:
        """Copy a batch of bags from the host, outside of any capture.

        How many keys a batch has, kernels read on the device, so that a captured step serves all that there is room
        for. Of a batch that has more, or another form, the arrays are made anew, and ``form`` counts on.

        Args:
            keys: [K] int32 or int64, table-major.
            offsets: [T * B + 1] int64; ``None``: one key a bag.
            weights: [K] float32, or ``None``.
            buffers: the batch's.

        Raises:
            DataError: a bag of a table whose vectors are not pooled holds another number of keys than all.
        """
        device, count, several = self._device, len(keys), self._features > len(self.specs)
        rows = (count if offsets is None else len(offsets) - 1) // max(1, len(self.specs))
        check_bag_keys(Jagged(keys, offsets, weights, len(self.specs), rows), self.specs)
        # Once a batch has had bags, all have: a form that changes to and fro would be captured again and again.
        bags = weights is not None or not buffers.one_hot
        of_vectors = offsets
        if offsets is not None and several:
            of_vectors = offsets_of_vectors(self.specs, offsets, rows)
        if of_vectors is not None:
            bags = bags or not several or not bool((np.diff(of_vectors) == 1).all())
        weighted, dtype = weights is not None, keys.dtype
        form = (buffers.one_hot, len(buffers.weights) > 0, buffers.keys.dtype)
        if form != (not bags, weighted, dtype) or count > len(buffers.keys):
            self.make_bags(buffers, count + count // 4 + 1, dtype=dtype, bags=bags, weighted=weighted)
        device.upload(keys, buffers.keys[:count])
        if weights is not None:
            device.upload(weights, buffers.weights[:count])
        if of_vectors is None:
            of_vectors = np.arange(count + 1)
        elif several:
            for part, bag_keys in concat_parts(self.specs, offsets, rows):
                for array in (buffers.keys, buffers.weights)[: 1 if weights is None else 2]:
                    array[part] = array[part].reshape(rows, bag_keys).T.reshape(-1)
        buffers.open(rows)
        if bags:
            device.upload(of_vectors, buffers.offsets)

    def make_bags(
        self, buffers: CapturedBuffers, num_keys: int, *, bags: bool, weighted: bool, dtype: Any = np.int32
    ) -> None:
        """Make the arrays of batches of up to so many keys anew, and the update that takes them.

        Args:
            buffers: of a batch; keys are written into them by ``take_bags``, or, after ``open``, by anybody.
            num_keys: most keys.
            bags: whether they have offsets.
            weighted: whether they have weights; then they have offsets.
            dtype: of the keys.
        """
        device, update = self._device, buffers.update
        buffers.form += 1
        room = max(len(buffers.keys), num_keys)
        buffers.keys = device.zeros(room, dtype)
        buffers.weights = device.zeros(room, np.float32) if weighted else self._nothing[1]
        if bags and buffers.one_hot:
            buffers.all_offsets = device.zeros(self._features * buffers.capacity + 1, np.int64)
        form = {"one_hot": not bags, "weighted": weighted}
        if update is not None and not update.serves(room, **form):
            self._updates.remove(update)
            buffers.update = self._make_update(room, **form)

    def _make_update(self, num_keys: int, *, one_hot: bool, weighted: bool) -> CapturedUpdate:
        update = CapturedUpdate(
            self._optimizer, self.store, self._mean, self.place, num_keys, one_hot=one_hot, weighted=weighted,
            deterministic=self._deterministic, device=self._device, row_start=self.row_start,
        )  # fmt: skip
        update.touched = self._touched
        self._updates.append(update)
        return update

    def input_dist(self, buffers: CapturedBuffers, rows: int, global_rows: int) -> None:
        """Take over the batch whose keys lie in ``buffers``, and bring its rows into order where an update needs it.

        Args:
            buffers: the batch's.
            rows: B.
            global_rows: the same.
        """
        buffers.begin(rows, global_rows)
        if buffers.update is not None and rows:
            buffers.update.prepare(self._keys(buffers), buffers.offsets, buffers.weights, rows)

    def lookup(self, buffers: CapturedBuffers) -> None:
        """Gather and pool, straight into the vectors."""
        if self.specs and buffers.num_rows:
            store = self.store
            gather_pool(
                store.weight, self.row_start, self._keys(buffers), buffers.offsets, buffers.weights, self.mean,
                self.place, buffers.num_rows, buffers.vectors, device=self._device,
            )  # fmt: skip

    def output_dist(self, buffers: CapturedBuffers) -> None:
        """Nothing: the vectors are where they are needed."""

    def grad_dist(self, buffers: CapturedBuffers) -> None:
        """Nothing: the gradients are where they are needed."""

    def sparse_update(self, buffers: CapturedBuffers, scalars: Array, guard: Array) -> None:
        """Update the rows that the batch looked up, from ``grad_vectors`` times the loss scale.

        Args:
            buffers: the batch's.
            scalars: see ``dlrm.scalars``.
            guard: see ``dlrm.scalars``.
        """
        assert buffers.update is not None, "forward only"
        if buffers.num_rows:
            buffers.update.update(
                self._keys(buffers), buffers.offsets, buffers.weights, buffers.num_rows, buffers.grad_vectors, scalars,
                guard,
            )  # fmt: skip

    def _keys(self, buffers: CapturedBuffers) -> Array:
        return buffers.keys[: self._features * buffers.num_rows] if buffers.one_hot else buffers.keys


def check_memory(specs: Sequence[TableSpec], optimizer: OptimizerConfig, itemsize: int, device: Device) -> None:
    """Refuse tables that are too large before any of them is allocated.

    Raises:
        DeviceError: with the largest table, the need, the limit and the remedy.
    """
    free = device.free_memory()
    state_bytes = bytes_per_row(optimizer, specs[0].dim, 4) - bytes_per_row(OptimizerConfig(), specs[0].dim, 4)
    row_bytes = specs[0].dim * itemsize + state_bytes
    need = sum(spec.rows for spec in specs) * row_bytes
    if free is None or need <= free:
        return
    largest = max(specs, key=lambda spec: spec.rows)
    halved = "; set embedding.table_precision: fp16" if itemsize > 2 else ""
    raise DeviceError(
        f"tables: {need / 2**30:.1f} GiB of rows and optimiser state (the largest, '{largest.name}', "
        f"{largest.rows * row_bytes / 2**30:.1f}) do not fit the {free / 2**30:.1f} GiB that the GPU has free; use "
        f"more GPUs{halved}, or fewer rows"
    )
