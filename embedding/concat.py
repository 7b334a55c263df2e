"""Tables whose vectors are not pooled: every key of a bag is a feature of its own.

All bags of such a table hold the same number of keys, H, so that B bags of H keys are B * H bags of one key: the group
that looks these up, exchanges and updates them is one of the others, with H bags a row of the batch. What it makes of
them, [B * H, T], goes to the places of a row's T * H vectors, and their gradients come from there.

Shapes: B rows of this rank, H keys of a bag, T tables of this group (or their column parts), F places, D columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.device import Array, Device
from embedding.buffers import BatchBuffers, Finish
from embedding.exchange import gather_vectors, scatter_vectors
from embedding.groups import Group
from embedding.jagged import Jagged
from embedding.placement import TableSpec
from embedding.table import Shard


def concat_parts(specs: Sequence[TableSpec], offsets: Array, rows: int) -> Iterator[tuple[slice, int]]:
    """Where the keys of each table lie whose vectors are not pooled, and how many of them its bags hold.

    Args:
        specs: the tables.
        offsets: [tables * B + 1] int64 of the host; all bags of such a table hold H keys.
        rows: B.
    """
    for table, spec in enumerate(specs):
        if spec.num_vectors > 1:
            begin = int(offsets[table * rows])
            yield slice(begin, begin + rows * spec.num_vectors), spec.num_vectors


def offsets_of_vectors(specs: Sequence[TableSpec], offsets: Array, rows: int) -> Array:
    """Offsets of a bag for each of a row's vectors: where they are not pooled one key, H bags of them a row.

    Args:
        specs: the tables.
        offsets: [tables * B + 1] int64 of the host, as ``concat_parts``.
        rows: B.

    Returns:
        [V * B + 1] int64, V vectors of a row; the keys of a table that is not pooled have been turned from row by row
        ([B, H]) to vector by vector ([H, B]).
    """
    parts = []
    for table, spec in enumerate(specs):
        own = offsets[table * rows : (table + 1) * rows]
        if spec.num_vectors > 1 and rows:
            own = own[0] + np.arange(rows * spec.num_vectors)
        parts.append(own)
    return np.concatenate([*parts, offsets[-1:]])


@dataclass(slots=True)
class ConcatBuffers(BatchBuffers):
    """One batch in flight.

    Attributes:
        inner: the group's own buffers, bound to its own arrays of vectors.
    """

    inner: Any = None


class ConcatGroup:
    """A group of tables whose bags are looked up key by key; as ``groups.Group``."""

    def __init__(
        self, group: Group, *, bag_keys: int, places: Sequence[int], dim: int, dtype: Any, device: Device
    ) -> None:
        """Wrap a group.

        Args:
            group: of T tables, made for ``bag_keys`` bags a row; table t has place t of its vectors.
            bag_keys: H.
            places: [H * T] where the vector of key h of table t goes, h first.
            dim: D of the group.
            dtype: of the vectors.
            device: where they lie.
        """
        self._group, self._bag_keys, self._dim, self._dtype, self._device = group, bag_keys, dim, dtype, device
        self._place = np.array(places, np.int64)
        # To ``scatter_vectors`` these are the H * T tables of one owner.
        self._before = np.zeros(len(places), np.int64)
        self._count = np.full(len(places), len(places), np.int64)

    def shards(self) -> list[Shard]:
        """What this rank holds."""
        return self._group.shards()

    def settle(self) -> None:
        """See ``HybridEmbedding``."""
        self._group.settle()

    def spread(self) -> None:
        """See ``HybridEmbedding``."""
        self._group.spread()

    def track_touched(self) -> None:
        """See ``HybridEmbedding``."""
        self._group.track_touched()

    def clear_touched(self) -> None:
        """See ``HybridEmbedding``."""
        self._group.clear_touched()

    def buffers(self, capacity: int, vectors: Array, grad_vectors: Array | None = None) -> ConcatBuffers:
        """Room for one batch in flight; arguments as for ``HybridEmbedding.buffers``."""
        shape = (capacity * self._bag_keys, len(self._place) // self._bag_keys, self._dim)
        own = self._device.empty(shape, self._dtype)
        grads = None if grad_vectors is None else self._device.empty(shape, self._dtype)
        return ConcatBuffers(capacity, vectors, grad_vectors, inner=self._group.buffers(shape[0], own, grads))

    def distribute(self, keys: Jagged, buffers: ConcatBuffers, global_rows: int) -> None:
        """``input_dist`` of keys that have been checked: every bag holds H."""
        buffers.num_rows, buffers.global_rows = keys.num_rows, global_rows
        one_hot = Jagged(keys.keys, None, keys.weights, keys.num_tables, keys.num_rows * self._bag_keys)
        self._group.distribute(one_hot, buffers.inner, global_rows)
        buffers.sent = buffers.inner.sent

    def lookup(self, buffers: ConcatBuffers) -> None:
        """See ``HybridEmbedding``."""
        self._group.lookup(buffers.inner)

    def start_output_dist(self, buffers: ConcatBuffers) -> Finish:
        """Start ``output_dist``; what is returned ends it."""
        finish = self._group.start_output_dist(buffers.inner)

        def scatter() -> None:
            finish()
            rows, vectors = buffers.inner.vectors.reshape(-1, self._dim), buffers.vectors
            scatter_vectors(
                rows, self._before, self._count, self._place, buffers.num_rows, vectors, device=self._device
            )

        return scatter

    def start_grad_dist(self, buffers: ConcatBuffers) -> Finish:
        """Start ``grad_dist``; what is returned ends it."""
        rows, vectors = buffers.inner.grad_vectors.reshape(-1, self._dim), buffers.grad_vectors
        gather_vectors(vectors, self._before, self._count, self._place, buffers.num_rows, rows, device=self._device)
        return self._group.start_grad_dist(buffers.inner)

    def sparse_update(self, buffers: ConcatBuffers, lr: float, step: int) -> None:
        """See ``HybridEmbedding``."""
        self._group.sparse_update(buffers.inner, lr, step)
