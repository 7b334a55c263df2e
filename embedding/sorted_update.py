"""Update the rows that a batch touched, each once, with float32 arithmetic and tables of float32 or 16 bits.

The form of ``sparse_optim.update_rows`` for captured steps: what changes between them is read from the two blocks of
scalars. 16-bit tables (float16, or bfloat16 as its bits in uint16) are rounded stochastically, by random numbers that
depend on seed, step, table, row and column alone: small steps move a weight as often as their sum asks for.

Shapes: T tables in one weight array of R rows, B bags a table, K keys, D columns, F places of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dlrm.device import Array
from dlrm.philox import philox4x32, tensor_id
from dlrm.scalars import SEED_HIGH, SEED_LOW, SPARSE, STEP_LOW, UNSCALE, is_blocked
from embedding.row_sort import RowSort
from embedding.sparse_optim import KINDS, update, widened
from embedding.table import Shard

_FIRST, _SUM = np.zeros(1, np.int64), np.zeros(1, np.bool_)
_NO_OFFSETS, _NO_WEIGHTS = np.empty(0, np.int64), np.empty(0, np.float32)


def origins_of(shards: Sequence[Shard]) -> Array:
    """Where the rows of a store's shards come from.

    Returns:
        [S, 5] int64: tensor, first row, distance of rows, first column, and the first row in the store.
    """
    starts = np.cumsum([0, *(len(shard.rows) for shard in shards)]).tolist()
    return np.array(
        [
            (tensor_id(f"table.{shard.table}"), shard.rows.start, shard.rows.step, shard.columns.start, start)
            for shard, start in zip(shards, starts, strict=False)
        ],
        np.int64,
    ).reshape(-1, 5)


def update_sorted(
    kind: str,
    weight: Array,
    state: Sequence[Array],
    row_start: Array,
    keys: Array,
    offsets: Array,
    key_weights: Array,
    mean: Array,
    place: Array,
    num_rows: int,
    gradients: Array,
    origins: Array,
    scalars: Array,
    guard: Array,
    sort: RowSort,  # noqa: ARG001 the compiled form's order of the keys
) -> None:
    """Sum each touched row's gradient over its occurrences, then apply the optimiser once.

    Nothing is written when ``guard`` says that a gradient is not finite or an exchange ran over.

    Args:
        kind: of the optimiser, one of ``sparse_optim.KINDS``; its constants are ``scalars[SPARSE:]``.
        weight: [R, D] float32, float16 or bfloat16; changed.
        state: as ``sparse_optim.state_specs`` lists it, [R, D] or [R, 1] float32; changed.
        row_start: [T] int64, first row of each table.
        keys: [K] int32 or int64, table-major.
        offsets: [T * B + 1] int64; empty for one key a bag.
        key_weights: [K] float32; empty for none.
        mean: [T] bool.
        place: [T] int64, where each table's gradient lies.
        num_rows: B.
        gradients: [B or more, F, D] C-contiguous float32, float16 or bfloat16, times the loss scale.
        origins: [S, 5] int64 (``origins_of``); read for 16-bit tables alone.
        scalars: see ``dlrm.scalars``.
        guard: see ``dlrm.scalars``.
        sort: the same keys after ``row_sort.sort_rows``.
    """
    numbers = scalars[SPARSE : SPARSE + 8]
    if is_blocked(guard) or (kind == "ftrl" and numbers[0] == 0):
        return
    wide = weight if weight.dtype.kind == "f" and weight.dtype.itemsize > 2 else widened(weight)
    arrays = [*state, wide[:0], wide[:0]]
    count = len(row_start) * num_rows if len(offsets) == 0 else int(offsets[-1])
    scaled = widened(gradients).astype(wide.dtype) * wide.dtype.type(guard[UNSCALE])
    update(
        KINDS.index(kind), numbers, wide, arrays[0], arrays[1], row_start, keys[:count], offsets, key_weights[:count],
        mean, place, num_rows, scaled,
    )  # fmt: skip
    if wide is weight:
        return
    bags = np.arange(len(row_start) * num_rows)
    table = np.repeat(bags, np.diff(offsets) if len(offsets) else 1) // max(1, num_rows)
    _store_rounded(weight, np.unique(row_start[table] + keys[:count]), wide, origins, scalars)


def update_summed(
    kind: str,
    weight: Array,
    state: Sequence[Array],
    sums: Array,
    touched: Array,
    origins: Array,
    scalars: Array,
    guard: Array,
) -> None:
    """Update rows whose gradients have been summed, each once.

    Args:
        kind: as of ``update_sorted``.
        weight: [R, D] float32, float16 or bfloat16; the first H rows are changed.
        state: as of ``update_sorted``.
        sums: [H, D] float32, times the loss scale.
        touched: [H] uint8: not 0 for rows that are to be updated.
        origins: [S, 5] int64 (``origins_of``); read for 16-bit tables alone.
        scalars: see ``dlrm.scalars``.
        guard: see ``dlrm.scalars``; nothing is written when it says so.
    """
    numbers = scalars[SPARSE : SPARSE + 8]
    if is_blocked(guard) or (kind == "ftrl" and numbers[0] == 0):
        return
    rows = np.flatnonzero(touched)
    wide = weight if weight.dtype == np.float32 else widened(weight)
    arrays = [*state, wide[:0], wide[:0]]
    update(
        KINDS.index(kind), numbers, wide, arrays[0], arrays[1], _FIRST, rows, _NO_OFFSETS, _NO_WEIGHTS, _SUM, _FIRST,
        len(rows), sums[rows][:, None] * np.float32(guard[UNSCALE]),
    )  # fmt: skip
    if wide is not weight:
        _store_rounded(weight, rows, wide, origins, scalars)


def _store_rounded(weight: Array, rows: Array, wide: Array, origins: Array, scalars: Array) -> None:
    """Take ``rows`` of ``wide`` over into 16-bit tables."""
    # The last shard that begins at the row or before: those without rows begin where the next one does.
    shard = np.searchsorted(origins[:, 4], rows, side="right") - 1
    random = random_words(origins[shard], rows - origins[shard, 4], weight.shape[1], scalars)
    weight[rows] = round_stochastically(wide[rows], random, weight.dtype)


def random_words(origins: Array, rows: Array, dim: int, scalars: Array) -> Array:
    """Random numbers for rounding rows: [N, D] uint32.

    Args:
        origins: [N, 5], of each row's shard.
        rows: [N], inside that shard.
        dim: D, a multiple of 4.
        scalars: see ``dlrm.scalars``; step and seed are used.
    """
    integers = scalars.view(np.uint32)
    shape = (len(rows), dim // 4)
    columns = (origins[:, 3, None] // 4 + np.arange(dim // 4)).astype(np.uint64)
    own = ((origins[:, 1] + rows * origins[:, 2]) & 0xFFFFFFFF).astype(np.uint64)[:, None]
    words = philox4x32(
        (
            columns,
            np.broadcast_to(own, shape),
            np.full(shape, integers[STEP_LOW], np.uint64),
            np.broadcast_to(origins[:, 0, None].astype(np.uint64), shape),
        ),
        int(integers[SEED_LOW]) | int(integers[SEED_HIGH]) << 32,
    )
    return np.stack(words, axis=-1).reshape(len(rows), dim).astype(np.uint32)


def round_stochastically(values: Array, random: Array, dtype: Any) -> Array:
    """Round each number to one of its two neighbours, so that the expectation is the number.

    Args:
        values: float32.
        random: uint32 of the same shape, uniform.
        dtype: float16, or uint16 for the bits of bfloat16.
    """
    bits = values.view(np.uint32)
    magnitude, sign = bits & np.uint32(0x7FFFFFFF), bits & np.uint32(0x80000000)
    finite = magnitude < 0x7F800000
    if dtype == np.uint16:
        moved = (bits + (random & np.uint32(0xFFFF))) >> np.uint32(16)
        return np.where(finite, moved, np.where(np.isnan(values), 0x7FFF, bits >> np.uint32(16))).astype(np.uint16)
    up = (magnitude + (random & np.uint32(0x1FFF))) & ~np.uint32(0x1FFF)
    with np.errstate(over="ignore", invalid="ignore"):
        normal = (np.where(finite, up, magnitude) | sign).view(np.float32).astype(np.float16)
    # Below the smallest normal number: multiples of 2^-24.
    exponent = np.maximum(1, magnitude >> np.uint32(23)).astype(np.int64)
    mantissa = np.where(
        magnitude >> np.uint32(23), (magnitude & np.uint32(0x7FFFFF)) | np.uint32(0x800000), magnitude
    ).astype(np.uint64)
    lost = np.clip(126 - exponent, 1, 62).astype(np.uint64)
    few = lost <= 31
    one = np.uint64(1)
    part = np.where(few, random & ((one << np.minimum(lost, np.uint64(31))) - one), random >> np.uint32(1))
    base = np.where(few, mantissa, mantissa >> (np.maximum(lost, np.uint64(31)) - np.uint64(31)))
    kept = ((base + part) >> np.minimum(lost, np.uint64(31))).astype(np.uint16)
    small = (kept | (sign >> np.uint32(16)).astype(np.uint16)).view(np.float16)
    return np.where(magnitude >> np.uint32(23) >= 113, normal, small)
