"""Keys of many features and rows: one-hot, or bags of keys with offsets.

Shapes: T tables (features), B rows, K keys. Layout is table-major: all bags of table 0, then of table 1, ...,
so that the part that one owner needs is one contiguous piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Jagged:
    """Keys [K] of T x B bags.

    Attributes:
        keys: [K] int32 or int64, table-major.
        offsets: [T * B + 1] int64, the first key of each bag; ``None``: every bag holds exactly one key.
        weights: [K] float32 factors of the keys, or ``None``.
        num_tables: T.
        num_rows: B; may be 0.
    """

    keys: Any
    offsets: Any | None
    weights: Any | None
    num_tables: int
    num_rows: int

    @property
    def one_hot(self) -> bool:
        """Whether every bag holds exactly one key, so that ``keys.reshape(T, B)`` works."""
        return self.offsets is None
