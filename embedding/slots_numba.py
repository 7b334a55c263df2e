"""Compiled work on bags of slots; references in ``slots.py``.

Distinct rows are found with one hash table per table of the batch, sized by its keys: memory follows the batch, not
the rows of the model. Entries are positions of first occurrences, so that a region of 32-bit numbers is enough.
"""

from __future__ import annotations

import numba
import numpy as np

from embedding.lookup_numba import prefetch_row

_AHEAD = 8
"""Keys between asking for a row and using it."""

_BLOCK = 64
"""Bags of one table that make a piece of work."""

_ALL, _HERE = 0, 1
"""As ``slots.ALL`` and ``slots.HERE``."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio: multiplied rows spread over the upper bits (Knuth, volume 3, section 6.4)."""


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def route(  # type: ignore[no-untyped-def]
    keys, ends, threshold, owner, distinct, frequent_start, base, frequent, slots, ids, destination, hash_ends, counts
):
    """See ``slots.route``."""
    num_tables = len(ends)
    ranks = len(counts)
    starts = np.zeros((num_tables, ranks), np.int64)
    hashes = np.empty(hash_ends[num_tables - 1], np.int32)
    for table in numba.prange(num_tables):
        begin = ends[table - 1] if table > 0 else 0
        region = hashes[hash_ends[table - 1] if table > 0 else 0 : hash_ends[table]]
        _number(
            keys[begin : ends[table]], threshold[table], owner[table], distinct[table], frequent_start[table],
            slots[begin : ends[table]], destination[begin : ends[table]], region, starts[table],
        )  # fmt: skip
    total = 0
    for rank in range(ranks):
        for table in range(num_tables):
            count = starts[table, rank]
            starts[table, rank] = total
            total += count
            counts[rank] += count
    for table in numba.prange(num_tables):
        spread = owner[table] < 0
        for k in range(ends[table - 1] if table > 0 else 0, ends[table]):
            to = destination[k]
            if to >= 0:
                row = np.int64(keys[k]) - threshold[table]
                position = starts[table, to] + slots[k]
                ids[position] = base[to, table] + (row // ranks if spread else row)
                slots[k] = frequent + position


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _number(keys, threshold, owner, distinct, frequent_start, slots, destination, region, counts):  # type: ignore[no-untyped-def]
    """Number the rows to ask for by owner: ``slots`` gets the numbers, ``counts`` [W] how many there are."""
    ranks = len(counts)
    region[:] = -1
    mask = len(region) - 1
    shift = np.uint64(64)
    while distinct and mask >> (64 - np.int64(shift)):
        shift -= np.uint64(1)
    for k in range(len(keys)):
        row = np.int64(keys[k]) - threshold
        if row < 0:
            slots[k] = frequent_start + keys[k]
            destination[k] = -1
            continue
        if distinct:
            at = np.int64((np.uint64(row) * _GOLDEN) >> shift)
            while region[at] >= 0 and keys[region[at]] != keys[k]:
                at = (at + 1) & mask
            first = region[at]
            if first >= 0:
                slots[k] = slots[first]
                destination[k] = destination[first]
                continue
            region[at] = k
        to = row % ranks if owner < 0 else owner
        slots[k] = counts[to]
        destination[k] = to
        counts[to] += 1


@numba.njit(nogil=True, forceinline=True, cache=True)
def _key_of(offsets, bag):  # type: ignore[no-untyped-def]
    """First key of a bag."""
    return bag if len(offsets) == 0 else offsets[bag]


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def pool_slots(frequent, received, slots, offsets, key_weights, mean, place, num_rows, out, side):  # type: ignore[no-untyped-def]
    """See ``slots.pool_slots``."""
    blocks = (num_rows + _BLOCK - 1) // _BLOCK
    dim = out.shape[2]
    row_bytes = dim * out.itemsize
    count = len(frequent)
    near = frequent.ctypes.data
    far = received.ctypes.data - count * row_bytes
    for item in numba.prange(len(place) * blocks):
        table = item // blocks
        first = item % blocks * _BLOCK
        bag = table * num_rows
        last = min(first + _BLOCK, num_rows)
        end_key = _key_of(offsets, bag + last)
        asked = _key_of(offsets, bag + first)
        for b in range(first, last):
            begin = _key_of(offsets, bag + b)
            end = _key_of(offsets, bag + b + 1)
            _prefetch(slots, asked, min(end + _AHEAD, end_key), count, near, far, row_bytes, side)
            asked = max(asked, min(end + _AHEAD, end_key))
            if not _on_side(0 if _lies_here(slots, begin, end, count) else 1, 1, side):
                continue
            if begin == end or len(key_weights) > 0:
                for d in range(dim):
                    out[b, place[table], d] = 0
            for k in range(begin, end):
                if slots[k] < count:
                    _add(frequent, slots[k], k, key_weights, k == begin, out, b, place[table])
                else:
                    _add(received, slots[k] - count, k, key_weights, k == begin, out, b, place[table])
            if mean[table] and end - begin > 1:
                divisor = out.dtype.type(end - begin)
                for d in range(dim):
                    out[b, place[table], d] /= divisor


@numba.njit(nogil=True, forceinline=True, cache=True)
def _lies_here(slots, begin, end, count):  # type: ignore[no-untyped-def]
    """Whether all of a bag's rows are replicated."""
    here = 0
    for k in range(begin, end):
        here += slots[k] < count
    return here == end - begin


@numba.njit(nogil=True, forceinline=True, cache=True)
def _prefetch(slots, begin, end, count, near, far, row_bytes, side):  # type: ignore[no-untyped-def]
    for k in range(begin, end):
        if _on_side(slots[k], count, side):
            prefetch_row(near if slots[k] < count else far, slots[k], row_bytes)


@numba.njit(nogil=True, forceinline=True, cache=True)
def _on_side(slot, frequent, side):  # type: ignore[no-untyped-def]
    return side == _ALL or (slot < frequent) == (side == _HERE)


@numba.njit(nogil=True, forceinline=True, cache=True)
def _add(rows, row, k, key_weights, first, out, b, place):  # type: ignore[no-untyped-def]
    dim = rows.shape[1]
    if len(key_weights) > 0:
        factor = out.dtype.type(key_weights[k])
        for d in range(dim):
            out[b, place, d] += factor * rows[row, d]
    elif first:
        for d in range(dim):
            out[b, place, d] = rows[row, d]
    else:
        for d in range(dim):
            out[b, place, d] += rows[row, d]


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def add_slots(  # type: ignore[no-untyped-def]
    gradients, slots, offsets, key_weights, mean, place, num_rows, compact, frequent, frequent_sum, received_sum, side,
    tables, parts, of_parts, worker_end,
):  # fmt: skip
    """See ``slots.add_slots``."""
    number = gradients.dtype.type
    for worker in numba.prange(len(worker_end)):
        for item in range(worker_end[worker - 1] if worker > 0 else 0, worker_end[worker]):
            table = tables[item]
            pieces = of_parts[item]
            for b in range(num_rows):
                begin = _key_of(offsets, table * num_rows + b)
                end = _key_of(offsets, table * num_rows + b + 1)
                share = number(1) / number(end - begin) if mean[table] and end - begin > 1 else number(1)
                for k in range(begin, end):
                    slot = slots[k]
                    if (pieces > 1 and slot % pieces != parts[item]) or not _on_side(slot, frequent, side):
                        continue
                    factor = share
                    if len(key_weights) > 0:
                        factor = number(key_weights[k])
                        if mean[table]:
                            factor /= number(end - begin)
                    if slot >= frequent:
                        _add_gradient(received_sum, slot - frequent, factor, gradients, b, place[table])
                    elif len(compact) == 0:
                        _add_gradient(frequent_sum, slot, factor, gradients, b, place[table])
                    else:
                        _add_gradient(frequent_sum, compact[slot], factor, gradients, b, place[table])


@numba.njit(nogil=True, forceinline=True, cache=True)
def _add_gradient(sums, row, factor, gradients, b, place):  # type: ignore[no-untyped-def]
    for d in range(sums.shape[1]):
        sums[row, d] += factor * gradients[b, place, d]


@numba.njit(nogil=True, cache=True)
def mark_slots(slots, frequent, marks):  # type: ignore[no-untyped-def]
    """See ``slots.mark_slots``."""
    for slot in slots:
        if slot < frequent:
            marks[slot] = 1
