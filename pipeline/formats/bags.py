"""The two forms that bags of keys come in: ``Jagged``, and key columns filled up with -1.

Shapes: B rows, T tables, H key columns of all tables.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import DataError
from embedding.jagged import Jagged


def bag_offsets(bags: Jagged) -> NDArray[np.int64]:
    """Offsets [T * B + 1], also of bags that hold one key each."""
    if bags.offsets is None:
        return np.arange(bags.num_tables * bags.num_rows + 1, dtype=np.int64)
    return np.asarray(bags.offsets, np.int64)


def to_jagged(keys: NDArray[Any], weights: NDArray[Any] | None, columns: NDArray[np.int64]) -> Jagged:
    """Bags of [B, H] key columns, without those that are -1."""
    blocks = [keys[:, start:stop] for start, stop in pairwise(columns)]
    lengths = [(block >= 0).sum(axis=1) for block in blocks]
    offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
    empty = [np.empty(0, keys.dtype)]
    kept = np.concatenate([block[block >= 0] for block in blocks] or empty)
    kept_weights = None
    if weights is not None:
        parts = [
            weights[:, start:stop][block >= 0]
            for block, start, stop in zip(blocks, columns[:-1], columns[1:], strict=True)
        ]
        kept_weights = np.concatenate(parts or [np.empty(0, np.float32)])
    return Jagged(kept, offsets, kept_weights, len(blocks), keys.shape[0])


def to_columns(bags: Jagged, columns: NDArray[np.int64], split: str) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """[B, H] key columns of bags, filled up with -1, and their weights."""
    if bags.num_tables != columns.size - 1:
        raise DataError(f"split {split!r}: bags of {bags.num_tables} tables, but the set has {columns.size - 1}")
    lengths = np.diff(bag_offsets(bags)).reshape(bags.num_tables, bags.num_rows)
    hotness = np.diff(columns)
    if (lengths > hotness[:, None]).any():
        table = int(np.flatnonzero((lengths > hotness[:, None]).any(axis=1))[0])
        raise DataError(
            f"split {split!r}: a bag of table {table} (from 0) has {lengths[table].max()} keys, but the table's "
            f"hotness is {hotness[table]}; raise it, or use the jagged layout"
        )
    keys = np.full((bags.num_rows, columns[-1]), -1, np.asarray(bags.keys).dtype)
    table_of_key = np.repeat(np.arange(lengths.size) // max(bags.num_rows, 1), lengths.reshape(-1))
    row_of_key = np.repeat(np.arange(lengths.size) % max(bags.num_rows, 1), lengths.reshape(-1))
    place = np.arange(bags.keys.size) - np.repeat(bag_offsets(bags)[:-1], lengths.reshape(-1))
    keys[row_of_key, columns[table_of_key] + place] = bags.keys
    if bags.weights is None:
        return keys, None
    weights = np.zeros(keys.shape, np.float32)
    weights[row_of_key, columns[table_of_key] + place] = bags.weights
    return keys, weights
