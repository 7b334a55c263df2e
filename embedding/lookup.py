"""Gather the rows of bags of keys and pool them.

Shapes: T tables in one weight array of R rows, B bags a table, K keys, D columns, F places of the output.
"""

from __future__ import annotations

import numpy as np

from dlrm.device import Array, Device


def bad_key(
    keys: Array, offsets: Array, rows: Array, num_rows: int, one_hot: bool, *, device: Device
) -> tuple[int, int]:
    """Find the first table with a key outside it, or with offsets that do not describe bags.

    Args:
        keys: [K] int32 or int64, table-major.
        offsets: [T * B + 1] int64; empty for one key a bag.
        rows: [T] int64, rows of each table.
        num_rows: B.
        one_hot: one key a bag.
        device: where the arrays lie.

    Returns:
        (table, position of the key in ``keys``); position -1: the table's offsets are wrong;
        (-1, -1): all is well.
    """
    kernel = device.kernel(__name__, "bad_key")
    operation = kernel if kernel is not None else bad_key_reference
    table, position = operation(keys, offsets, rows, num_rows, one_hot)
    return int(table), int(position)


def bad_key_reference(keys: Array, offsets: Array, rows: Array, num_rows: int, one_hot: bool) -> tuple[int, int]:
    """The plain form of ``bad_key``."""
    num_tables = len(rows)
    if one_hot:
        if len(keys) != num_tables * num_rows:
            return 0, -1
        offsets = np.arange(num_tables * num_rows + 1)
    for table in range(num_tables):
        bags = offsets[table * num_rows : (table + 1) * num_rows + 1]
        if np.any(np.diff(bags) < 0) or bags[0] < 0 or bags[-1] > len(keys) or (table == 0 and bags[0] != 0):
            return table, -1
        mine = keys[bags[0] : bags[-1]]
        wrong = np.flatnonzero((mine < 0) | (mine >= rows[table]))
        if len(wrong):
            return table, int(bags[0] + wrong[0])
    return -1, -1


def gather_pool(
    weight: Array,
    row_start: Array,
    keys: Array,
    offsets: Array,
    key_weights: Array,
    mean: Array,
    place: Array,
    num_rows: int,
    out: Array,
    *,
    device: Device,
) -> None:
    """Pool each bag: ``out[b, place[t]] = sum over the bag of key_weight * weight[row_start[t] + key]``.

    Mean pooling divides that by the number of keys in the bag, whatever their weights; an empty bag gives zeros.
    Keys must lie inside their tables (``bad_key``).

    Args:
        weight: [R, D] float32 or float64, the tables one after the other.
        row_start: [T] int64, first row of each table.
        keys: [K or more] int32 or int64, table-major.
        offsets: [T * B + 1] int64; empty for one key a bag.
        key_weights: [K or more] float32; empty for none.
        mean: [T] bool: mean pooling, otherwise sum.
        place: [T] int64, where each table's vector goes.
        num_rows: B.
        out: [B or more, F, D] C-contiguous, dtype of ``weight``; other places are left alone.
        device: where the arrays lie.
    """
    kernel = device.kernel(__name__, "gather_pool")
    operation = kernel if kernel is not None else gather_pool_reference
    operation(weight, row_start, keys, offsets, key_weights, mean, place, num_rows, out)


def gather_pool_reference(
    weight: Array,
    row_start: Array,
    keys: Array,
    offsets: Array,
    key_weights: Array,
    mean: Array,
    place: Array,
    num_rows: int,
    out: Array,
) -> None:
    """The plain form of ``gather_pool``."""
    num_tables = len(row_start)
    if len(offsets) == 0:
        offsets = np.arange(num_tables * num_rows + 1)
    lengths = np.diff(offsets)
    bag_of_key = np.repeat(np.arange(num_tables * num_rows), lengths)
    rows = weight[row_start[bag_of_key // max(1, num_rows)] + keys[: len(bag_of_key)]]
    if len(key_weights):
        rows = rows * key_weights[: len(bag_of_key), None].astype(weight.dtype)
    pooled = np.zeros((num_tables * num_rows, weight.shape[1]), weight.dtype)
    np.add.at(pooled, bag_of_key, rows)
    pooled = pooled.reshape(num_tables, num_rows, -1)
    divisors = np.where(mean[:, None], np.maximum(1, lengths.reshape(num_tables, num_rows)), 1)
    pooled = pooled / divisors[:, :, None].astype(weight.dtype)
    for table in range(num_tables):
        out[:num_rows, place[table]] = pooled[table]
