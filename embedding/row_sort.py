"""The rows that a batch names, in ascending order: what every row's gradient is summed by, in an order of its own.

Shapes: T tables in one weight array of R rows, B bags a table, K keys of which a batch may have fewer, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.device import Array, Device
from dlrm.errors import DeviceError

CHUNK = 64
"""Keys in the order of rows that are summed one after the other; longer runs are sums of these."""
CHUNKS_OF_A_STRETCH = 32
"""Chunks of one row whose sums are summed once more."""
TILE = 4096
"""Keys that a block sorts at a time."""
MOST_BITS = 9
"""Bits of a digit: its counters have to fit a block's shared memory."""
COUNT = 0
"""Place of the number of keys in ``RowSort.info``."""


def digits_of(num_rows: int) -> tuple[int, int]:
    """How many digits the row numbers below ``num_rows`` have, and the bits of a digit."""
    bits = max(1, (num_rows - 1).bit_length())
    digits = -(-bits // MOST_BITS)
    return digits, -(-bits // digits)


@dataclass(frozen=True, slots=True)
class RowSort:
    """A batch's keys in the order of their rows, and the room for bringing them there and for the sums by row.

    Attributes:
        rows: two of [K] uint32; the one at ``order`` holds the sorted rows.
        named: two of [K] uint32, beside ``rows``: the bag that named the row, or with weights the key.
        bags: [K] uint32, the bag of a key; empty without weights.
        order: which of the two.
        info: [4] uint32; at ``COUNT`` the keys of the batch.
        counts: [2^bits * tiles] uint32.
        totals: [2^bits] uint32.
        partials: [(2 * chunks + stretches) * D] float32, sums of parts of rows.
        open_runs: [chunks] uint32.
    """

    rows: tuple[Array, Array]
    named: tuple[Array, Array]
    bags: Array
    order: int
    info: Array
    counts: Array
    totals: Array
    partials: Array
    open_runs: Array

    @classmethod
    def create(cls, device: Device, num_keys: int, num_rows: int, dim: int, *, weighted: bool) -> RowSort:
        """Allocate for batches of up to ``num_keys`` keys.

        Args:
            device: holds it.
            num_keys: K.
            num_rows: R.
            dim: D.
            weighted: whether keys have weights.

        Raises:
            DeviceError: rows or keys do not fit 32 bits.
        """
        for what, number in (("rows", num_rows), ("keys of a batch", num_keys)):
            if number >= 2**32 - TILE:
                raise DeviceError(f"embedding: {number} {what} on one GPU do not fit 32 bits; use more ranks")
        digits, bits = digits_of(num_rows)
        tiles, chunks = -(-num_keys // TILE), -(-num_keys // CHUNK)
        stretches = -(-chunks // CHUNKS_OF_A_STRETCH)

        def words(count: int) -> Any:
            return device.empty(max(1, count), np.uint32)

        return cls(
            (words(num_keys), words(num_keys)),
            (words(num_keys), words(num_keys)),
            words(num_keys if weighted else 0),
            digits % 2,
            device.zeros(4, np.uint32),
            words(tiles << bits),
            words(1 << bits),
            device.empty(max(1, (2 * chunks + stretches) * dim), np.float32),
            words(chunks),
        )

    @property
    def capacity(self) -> int:
        """K."""
        return len(self.rows[0])


def sort_rows(
    row_start: Array, keys: Array, offsets: Array, key_weights: Array, num_rows: int, num_table_rows: int, sort: RowSort
) -> None:
    """Bring the rows that the keys name into ascending order; keys of one row stay in the order of the batch.

    Args:
        row_start: [T] int64, first row of each table.
        keys: [K or more] int32 or int64, table-major.
        offsets: [T * B + 1] int64; empty for one key a bag.
        key_weights: [K] float32; empty for none.
        num_rows: B.
        num_table_rows: R.
        sort: its ``rows`` and ``named`` at ``order`` and its ``info`` are written.
    """
    assert num_table_rows <= 2**32
    bags = np.arange(len(row_start) * num_rows)
    if len(offsets):
        bags = np.repeat(bags, np.diff(offsets))
    rows = row_start[bags // max(1, num_rows)] + keys[: len(bags)]
    order = np.argsort(rows, kind="stable")
    sort.info[COUNT] = len(bags)
    sort.rows[sort.order][: len(bags)] = rows[order]
    sort.named[sort.order][: len(bags)] = order if len(key_weights) else bags[order]
    if len(key_weights):
        sort.bags[: len(bags)] = bags
