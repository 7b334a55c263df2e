"""What every embedding asks of a batch before it sends any of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dlrm.device import Array, Device
from dlrm.errors import CommError, ConfigError, DataError
from embedding.buffers import NO_OFFSETS
from embedding.comm import Comm
from embedding.jagged import Jagged
from embedding.lookup import bad_key
from embedding.plan import TableSpec
from embedding.topology import share_of


def check_arrays(
    vectors: Array, grad_vectors: Array | None, capacity: int, places: tuple[int, int], dtype: Any
) -> None:
    """Refuse output arrays that kernels cannot write straight into.

    Args:
        vectors: [capacity or more, F, D] C-contiguous.
        grad_vectors: the same, or ``None``.
        capacity: most rows of this rank.
        places: (F, D).
        dtype: of the tables.

    Raises:
        ConfigError: an array has another shape, dtype or layout.
    """
    for name, array in (("vectors", vectors), ("grad_vectors", grad_vectors)):
        if array is None:
            continue
        fits = array.ndim == 3 and array.shape[0] >= capacity and array.shape[1:] == places
        if not fits or array.dtype != dtype or not array.flags.c_contiguous:
            raise ConfigError(
                f"{name}: {array.dtype}{list(array.shape)} must be C-contiguous "
                f"{dtype}[{capacity}, {places[0]}, {places[1]}]"
            )


def check_trains(grad_vectors: Array | None) -> None:
    """Refuse to train with buffers that were made for looking up only.

    Raises:
        ConfigError: there are no gradients.
    """
    if grad_vectors is None:
        raise ConfigError("grad_vectors: None, but training needs it; make the buffers with it")


def check_batch(
    keys: Jagged, capacity: int, global_rows: int, specs: Sequence[TableSpec], rows: Array, comm: Comm, device: Device
) -> None:
    """Refuse a batch that does not fit the tables, the buffers or this rank's share.

    Args:
        keys: of all tables for this rank's rows.
        capacity: most rows of this rank.
        global_rows: G.
        specs: the tables.
        rows: [T] int64, their rows.
        comm: the ranks.
        device: where the keys lie.

    Raises:
        DataError: a key lies outside its table, or bags are malformed or hold another number of keys than all have to;
            names this rank where there are several.
        CommError: this rank's share is another one.
    """
    share = share_of(global_rows, comm.size, comm.rank)
    if keys.num_rows != share:
        raise CommError(
            f"batch: rank {comm.rank} was given {keys.num_rows} of {global_rows} rows, but its share is "
            f"{share}; give every rank the same data set and config"
        )
    if keys.num_rows > capacity:
        raise DataError(f"batch: {keys.num_rows} rows, but the buffers hold {capacity}; make larger ones")
    if keys.num_tables != len(specs):
        raise DataError(f"batch: keys of {keys.num_tables} tables, but the model has {len(specs)}")
    bags = keys.num_tables * keys.num_rows
    if keys.offsets is not None and len(keys.offsets) != bags + 1:
        raise DataError(f"batch: {len(keys.offsets)} offsets, but {bags} bags need {bags + 1}")
    if keys.weights is not None and len(keys.weights) != len(keys.keys):
        raise DataError(f"batch: {len(keys.weights)} weights, but {len(keys.keys)} keys")
    offsets = NO_OFFSETS if keys.offsets is None else keys.offsets
    table, position = bad_key(keys.keys, offsets, rows, keys.num_rows, keys.one_hot, device=device)
    here = f"rank {comm.rank}: " if comm.size > 1 else ""
    if table < 0:
        check_bag_keys(keys, specs, here)
        return
    spec = specs[table]
    if position < 0:
        raise DataError(f"{here}table '{spec.name}': the offsets of its bags do not fit {len(keys.keys)} keys")
    raise DataError(
        f"{here}table '{spec.name}': key {int(keys.keys[position])} lies outside its {spec.rows} rows "
        f"(0 to {spec.rows - 1}); check the data set's manifest or the vocabulary"
    )


def check_bag_keys(keys: Jagged, specs: Sequence[TableSpec], here: str = "", first: int = 0) -> None:
    """Refuse bags that hold another number of keys than all bags of their table have to.

    Args:
        keys: of the host, of all tables.
        specs: the tables.
        here: what the message begins with.
        first: number of the first row in this rank's share.

    Raises:
        DataError: with the table and the row.
    """
    for table, spec in enumerate(specs):
        if spec.bag_keys is None or (spec.bag_keys == 1 and keys.offsets is None):
            continue
        lengths = np.ones(keys.num_rows, np.int64)
        if keys.offsets is not None:
            lengths = np.diff(keys.offsets[table * keys.num_rows : (table + 1) * keys.num_rows + 1])
        wrong = np.flatnonzero(lengths != spec.bag_keys)
        if len(wrong):
            raise DataError(
                f"{here}table '{spec.name}': row {first + wrong[0]} of this rank's share of a batch holds "
                f"{lengths[wrong[0]]} keys, but with pooling concat every row holds {spec.bag_keys}; use pooling sum "
                "or mean"
            )


def check_shares(told: Array, shares: Sequence[int], global_rows: int, rank: int) -> None:
    """Refuse a batch that ranks see differently.

    Args:
        told: [W, 2] int64, rows and global rows that each rank has.
        shares: [W] rows that each rank should have.
        global_rows: G here.
        rank: this one.

    Raises:
        CommError: the ranks disagree.
    """
    for other, (rows, total) in enumerate(told.tolist()):
        if total != global_rows or rows != shares[other]:
            raise CommError(
                f"rank {other} has {rows} of {total} rows of this batch, rank {rank} expects "
                f"{shares[other]} of {global_rows}; give every rank the same data set and config"
            )
