"""What every embedding keeps of one batch in flight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dlrm.device import Array

Finish = Callable[[], None]
"""Waits for what has been started, and puts what came into its place."""

NO_OFFSETS = np.empty(0, np.int64)
NO_WEIGHTS = np.empty(0, np.float32)


def nothing_left() -> None:
    """The end of an exchange that needed none."""


@dataclass(slots=True)
class BatchBuffers:
    """One batch in flight.

    Attributes:
        capacity: most rows of this rank.
        vectors: [capacity or more, F, D], where ``output_dist`` leaves the pooled vectors.
        grad_vectors: the same, where ``grad_dist`` finds their gradients; ``None``: forward only.
        num_rows: B of the present batch.
        global_rows: G of the present batch.
        sent: bytes that left this rank, by exchange.
        pool: arrays that grow on demand, by name.
    """

    capacity: int
    vectors: Array
    grad_vectors: Array | None
    num_rows: int = 0
    global_rows: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    pool: dict[str, Array] = field(default_factory=dict)

    def begin(self, rows: int, global_rows: int) -> None:
        """Note the sizes of the batch that comes: by whoever brings it, since a replayed stage notes nothing."""
        self.num_rows, self.global_rows = rows, global_rows

    def room(self, name: str, dtype: Any, size: int) -> Array:
        """[size] numbers under ``name``, uninitialised; a quarter is added when it has to grow."""
        array = self.pool.get(name)
        if array is None or len(array) < size or array.dtype != dtype:
            array = self.pool[name] = np.empty(size + size // 4, dtype)
        return array[:size]

    def rows(self, name: str, dtype: Any, count: int, dim: int) -> Array:
        """[count, dim] numbers under ``name``, uninitialised."""
        return self.room(name, dtype, count * dim).reshape(count, dim)
