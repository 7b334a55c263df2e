"""How gradients of replicated rows are summed over the ranks: all of them, or only those of touched rows.

- touched: which rows the global batch touches is found out first (one byte a row, all-reduced with ``max`` while the
  keys travel); then the gradients of those rows are all-reduced;
- dense: the gradients of all rows are all-reduced, with one more number a row that says how many ranks touched it.

The touched way never sends more bytes, but starts two all-reduces where the dense way starts one. So the plan's
prediction decides, with the start of an all-reduce counted as so many bytes. It depends on nothing but the plan and the
size of the batch: all ranks choose alike, and so does a run that goes on from a checkpoint.

Shapes: H replicated rows, U of them touched by the global batch, D columns, G rows of the global batch, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embedding.placement import Plan


def touched_bytes(rows: int, touched: float, dim: int, itemsize: int) -> float:
    """Bytes that the touched way reduces: marks of all rows, gradients of the touched ones."""
    return rows + touched * dim * itemsize


def dense_bytes(rows: int, dim: int, itemsize: int) -> int:
    """Bytes that the dense way reduces: a gradient and a count for every row."""
    return rows * (dim + 1) * itemsize


def ring_bytes(size: int, ranks: int) -> int:
    """Bytes that one of ``ranks`` sends to all-reduce ``size`` bytes: 2 (W - 1) / W of them."""
    return round(2 * (ranks - 1) / ranks * size)


def dense_is_faster(touched: float, dense: float, start_bytes: float) -> bool:
    """Whether one all-reduce of ``dense`` bytes takes no longer than two of ``touched`` bytes together."""
    return touched + start_bytes >= dense


@dataclass(frozen=True, slots=True)
class ReduceWay:
    """What decides the way of one group of tables.

    Attributes:
        touched: replicated rows that a batch of ``batch_size`` rows is expected to touch.
        batch_size: G of the expectation; 0: nothing is expected, so that the touched way is taken.
        start_bytes: what an all-reduce could send in the time that it takes to start.
    """

    touched: float = 0.0
    batch_size: int = 0
    start_bytes: float = 0.0

    @classmethod
    def of(cls, plan: Plan, tables: Sequence[int]) -> ReduceWay:
        """That of the plan's ``tables``, which share their all-reduces."""
        if not plan.predictions:
            return cls()
        touched = sum(plan.predictions[table].touched_rows for table in tables)
        return cls(touched, plan.batch_size, plan.reduce_start_bytes)

    def is_dense(self, rows: int, global_rows: int, dim: int, itemsize: int) -> bool:
        """Whether a batch's gradients are summed the dense way.

        Args:
            rows: H.
            global_rows: of the batch.
            dim: D.
            itemsize: bytes of a number.
        """
        if not self.batch_size:
            return False
        touched = min(float(rows), self.touched * global_rows / self.batch_size)
        return dense_is_faster(
            touched_bytes(rows, touched, dim, itemsize), dense_bytes(rows, dim, itemsize), self.start_bytes
        )
