"""Launches of the row sort's CUDA kernels; reference in ``row_sort.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DeviceError
from dlrm.nvrtc import Defines, c_type, load
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
    bags, weighted = int(len(offsets) > 0), int(len(key_weights) > 0)
    defines = (("KEY", c_type(keys)), ("BAGS", bags), ("WEIGHTED", weighted), ("BITS", bits))
    tiles = -(-num_keys // TILE)
    named, batch = (row_start, keys, offsets), (np.uint32(num_rows), np.uint32(num_bags))
    shape = (np.uint32(num_keys), np.uint32(num_rows), np.int32(len(row_start)), np.uint32(tiles))
    load(SOURCE, "count_first", defines)(tiles, THREADS, *named, *shape, sort.counts, sort.info)
    add_counts(1 << bits, tiles, sort.counts, sort.totals, defines)
    load(SOURCE, "move_first", defines)(
        tiles, THREADS, *named, *batch, np.uint32(tiles), sort.counts, sort.totals, sort.rows[1], sort.named[1],
        sort.bags, sort.info,
    )  # fmt: skip
    sort_pairs(sort.rows, sort.named, num_keys, digits, sort.counts, sort.totals, sort.info, defines, first=1)


def sort_pairs(
    rows: tuple[Any, Any], named: tuple[Any, Any], num_keys: int, digits: int, counts: Any, totals: Any, info: Any,
    defines: Defines, first: int = 0,
) -> None:  # fmt: skip
    """Bring pairs (row, name) into the order of the rows; pairs of one row keep their order.

    Args:
        rows: two of [num_keys or more] uint32; the one at ``first % 2`` holds the rows, the one at ``digits % 2`` gets
            them sorted.
        named: two of [num_keys or more] uint32, likewise.
        num_keys: most pairs.
        digits: of a row; see ``row_sort.digits_of``.
        counts: see ``row_sort.RowSort``; so is ``totals``.
        totals: room.
        info: holds the number of pairs.
        defines: macros of the source; ``BITS``: of a digit.
        first: digit that is not yet in order.
    """
    bits, tiles = int(dict(defines)["BITS"]), -(-num_keys // TILE)
    for digit in range(first, digits):
        here, there = digit % 2, (digit + 1) % 2
        place = (np.int32(digit * bits), np.uint32(tiles))
        load(SOURCE, "count_digits", defines)(tiles, THREADS, rows[here], *place, counts, info)
        add_counts(1 << bits, tiles, counts, totals, defines)
        load(SOURCE, "move_rows", defines)(
            tiles, THREADS, rows[here], named[here], *place, counts, totals, rows[there], named[there], info
        )


def add_counts(kinds: int, tiles: int, counts: Any, totals: Any, defines: Defines) -> None:
    """Sum over tiles: ``counts`` [kinds, tiles] become the sums over the tiles before, ``totals`` those over all."""
    load(SOURCE, "add_counts", defines)(kinds, THREADS, counts, np.uint32(tiles), totals)


def mark_touched(keys: Any, offsets: Any, row_start: Any, num_rows: int, touched: Any) -> None:
    """See ``sparse_optim.mark_touched``; how many keys the bags hold is read on the device."""
    num_tables = len(row_start)
    num_keys = len(keys) if len(offsets) else num_tables * num_rows
    if num_tables == 0 or num_keys == 0 or num_rows == 0:
        return
    defines = (("KEY", c_type(keys)), ("BAGS", int(len(offsets) > 0)), ("WEIGHTED", 0), ("BITS", 1))
    shape = (np.uint32(num_keys), np.uint32(num_rows), np.int32(num_tables))
    load(SOURCE, "mark_touched", defines)(-(-num_keys // THREADS), THREADS, row_start, keys, offsets, *shape, touched)
