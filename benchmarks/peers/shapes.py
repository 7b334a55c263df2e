"""The shapes that are compared, and their batches: NumPy only, so that every peer's interpreter can load it.

Shapes: B rows of a batch, T tables, H keys of a bag, N dense columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_KAGGLE_ROWS = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
_KAGGLE_CAP = 1_000_000
"""Rows above it are left out, so that the run fits an ordinary machine; lookups still miss every cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One model and batch."""

    title: str
    table_rows: tuple[int, ...]
    dim: int
    hotness: int
    bottom: tuple[int, ...]
    """Outputs of the bottom layers; the input is ``num_dense``."""
    top: tuple[int, ...]
    batch: int
    num_dense: int = 13

    def layers(self) -> list[tuple[int, int, bool]]:
        """``(in, out, needs the gradient of its input)`` of every linear layer."""
        num_vectors = 1 + len(self.table_rows)
        top_in = self.dim + num_vectors * (num_vectors - 1) // 2
        found = []
        for first, outputs, inner in ((self.num_dense, self.bottom, False), (top_in, self.top, True)):
            inputs = (first, *outputs[:-1])
            pairs = enumerate(zip(inputs, outputs, strict=True))
            found += [(a, b, inner or i > 0) for i, (a, b) in pairs]
        return found

    def flops(self) -> int:
        """Floating-point operations of a step's products (a multiplication and an addition each).

        Per layer: forward, the weights' gradient and, unless it is the first, the input's gradient.
        """
        return sum(2 * self.batch * a * b * (3 if inner else 2) for a, b, inner in self.layers())


SHAPES = {
    "a": Shape(
        title="MLPerf: 26 x 10,000 x 128, one-hot, 13-512-256-128, 1024-1024-512-256-1, batch 2048",
        table_rows=(10_000,) * 26,
        dim=128,
        hotness=1,
        bottom=(512, 256, 128),
        top=(1024, 1024, 512, 256, 1),
        batch=2048,
    ),
    "b": Shape(
        title="embedding-bound: 26 x 100,000 x 128, 8 keys a bag, 13-128, 256-1, batch 2048",
        table_rows=(100_000,) * 26,
        dim=128,
        hotness=8,
        bottom=(128,),
        top=(256, 1),
        batch=2048,
    ),
    "c": Shape(
        title=f"Kaggle: 26 tables (Kaggle's rows, at most {_KAGGLE_CAP:,}) x 16, one-hot, 13-512-256-64-16, "
        "512-256-1, batch 128",
        table_rows=tuple(min(rows, _KAGGLE_CAP) for rows in _KAGGLE_ROWS),
        dim=16,
        hotness=1,
        bottom=(512, 256, 64, 16),
        top=(512, 256, 1),
        batch=128,
    ),
}


@dataclass(frozen=True, slots=True)
class HostArrays:
    """One batch: labels [B] int32, dense [B, N] float32, keys [T, B, H] int32 drawn evenly over the rows."""

    labels: np.ndarray
    dense: np.ndarray
    keys: np.ndarray


def make_batches(shape: Shape, count: int, seed: int = 1) -> list[HostArrays]:
    """Distinct batches, the same in every process."""
    random = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        keys = np.stack(
            [random.integers(0, rows, size=(shape.batch, shape.hotness), dtype=np.int32) for rows in shape.table_rows]
        )
        labels = random.integers(0, 2, size=shape.batch, dtype=np.int32)
        dense = random.random((shape.batch, shape.num_dense), dtype=np.float32)
        batches.append(HostArrays(labels, dense, keys))
    return batches
