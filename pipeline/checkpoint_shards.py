"""Tables that lie over ranks in shards, in and out of checkpoints.

Names are ``table.<name>`` [rows, dim] and ``table.<name>.<state>`` [rows, dim] or, of one number a row, [rows].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.errors import CheckpointError
from embedding.table import Shard
from pipeline.checkpoint import Checkpoint, Piece

Array = npt.NDArray[Any]


def pieces_of_shards(
    shards: Iterable[Shard], shapes: Mapping[str, tuple[int, int]], rank: int
) -> dict[str, list[Piece]]:
    """What a rank hands to ``save_checkpoint`` of its tables; views, nothing is copied.

    Args:
        shards: what the rank holds.
        shapes: rows and dim of every table.
        rank: this one's; replicated rows are rank 0's to write.

    Returns:
        Pieces by tensor name, weights and states; of one table in the order of ``shards``.
    """
    tensors: dict[str, list[Piece]] = {}
    for shard in shards:
        if shard.replicated and rank:
            continue
        rows, dim = shapes[shard.table]
        for name, array in _arrays(shard, states=True).items():
            shape = (rows, dim)[: array.ndim]
            tensors.setdefault(name, []).append(Piece(array, shape, shard.rows, shard.columns))
    return tensors


def touched_of_shards(shards: Iterable[Shard], rank: int) -> dict[str, list[Array | None]]:
    """Which rows of what ``pieces_of_shards`` returns were updated, in the same order; of tracked shards only."""
    touched: dict[str, list[Array | None]] = {}
    for shard in shards:
        if shard.touched is not None and not (shard.replicated and rank):
            for name in _arrays(shard, states=True):
                touched.setdefault(name, []).append(shard.touched)
    return touched


def read_shards(
    checkpoint: Checkpoint, shards: Iterable[Shard], shapes: Mapping[str, tuple[int, int]], *, states: bool
) -> None:
    """Fill shards out of a checkpoint that any plan on any number of ranks wrote.

    Args:
        checkpoint: an open one.
        shards: what this rank holds, replicated rows too.
        shapes: rows and dim of every table.
        states: whether to read the optimisers' state too.

    Raises:
        CheckpointError: a tensor is missing, of another shape or damaged.
    """
    for shard in shards:
        for name, array in _arrays(shard, states=states).items():
            entry = checkpoint.entry(name)
            expected = shapes[shard.table][: array.ndim]
            if entry.shape != expected:
                raise CheckpointError(
                    f"checkpoint {checkpoint.path}: {name} has shape {list(entry.shape)}, but the model needs "
                    f"{list(expected)}; use a checkpoint of this model"
                )
            columns = shard.columns if array.ndim == 2 else None
            if array.dtype == np.dtype(entry.dtype):
                checkpoint.read(name, array, rows=shard.rows, columns=columns)
            else:  # weights of another precision
                array[...] = checkpoint.read(name, rows=shard.rows, columns=columns)


def _arrays(shard: Shard, *, states: bool) -> dict[str, Array]:
    name = f"table.{shard.table}"
    state = {f"{name}.{key}": array for key, array in shard.state.items()} if states else {}
    return {name: shard.weight, **state}
