"""Launches of the row sort's CUDA kernels; reference in ``row_sort.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DeviceError
from dlrm.nvrtc import c_type, load
from embedding.row_sort import TILE, RowSort, digits_of

SOURCE = Path(__file__).with_name("row_sort.cu")
THREADS = 256


def sort_rows(
    row_start: Any, keys: Any, offsets: Any, key_weights: Any, num_rows: int, num_table_rows: int, sort: RowSort
) -> None:
    """See ``row_sort.sort_rows``; how many keys the bags hold is read on the device.

    Raises:
        DeviceError: there are more keys than ``sort`` has room for, or keys with weights come without offsets.
    """
    num_bags = len(row_start) * num_rows
    num_keys = len(keys) if len(offsets) else num_bags
    if num_keys > sort.capacity:
        raise DeviceError(f"embedding: {num_keys} keys do not fit the {sort.capacity} that the row sort was made for")
    if len(key_weights) and not len(offsets):
        raise DeviceError("embedding: weighted keys come without offsets; give the kernel the bags' offsets")
    if num_bags == 0 or num_keys == 0:
        sort.info.fill(0)
        return
    digits, bits = digits_of(num_table_rows)
    defines = (("KEY", c_type(keys)), ("WEIGHTED", int(len(key_weights) > 0)), ("BITS", bits))
    tiles = -(-num_keys // TILE)
    if len(offsets):
        shape = (np.uint32(num_rows), np.uint32(num_bags))
        output = (sort.rows[0], sort.named[0], sort.bags, sort.info)
        load(SOURCE, "name_bags", defines)(tiles, THREADS, row_start, keys, offsets, *shape, *output)
    else:
        shape = (np.uint32(num_keys), np.uint32(num_rows))
        output = (sort.rows[0], sort.named[0], sort.info)
        load(SOURCE, "name_rows", defines)(-(-num_keys // THREADS), THREADS, row_start, keys, *shape, *output)
    for digit in range(digits):
        here, there = digit % 2, (digit + 1) % 2
        place = (np.int32(digit * bits), np.uint32(tiles))
        load(SOURCE, "count_digits", defines)(tiles, THREADS, sort.rows[here], *place, sort.counts, sort.info)
        load(SOURCE, "add_counts", defines)(1 << bits, THREADS, sort.counts, np.uint32(tiles), sort.totals)
        load(SOURCE, "move_rows", defines)(
            tiles, THREADS, sort.rows[here], sort.named[here], *place, sort.counts, sort.totals, sort.rows[there],
            sort.named[there], sort.info,
        )  # fmt: skip
