"""Compiled look-up: parallel, without the interpreter's lock; references in ``lookup.py``.

Rows of embedding tables lie at random addresses, so that a core spends most of its time waiting for them. The keys
to come are known, and asking for their rows a little ahead overlaps the waits.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_NONE = -2

_AHEAD = 8
"""Keys between asking for a row and using it: as many lines as a core can wait for at a time."""

_BLOCK = 64
"""Rows of the batch that one piece of work pools of one table."""

_LINE_BYTES = 64


@intrinsic
def _prefetch_line(typing_context, address):  # type: ignore[no-untyped-def]  # noqa: ARG001 numba passes it
    """Ask for the cache line at ``address``; a hint, never a fault."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]  # noqa: ARG001
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], function_type)
        # For reading, into all levels, data: writing follows soon enough where there is any.
        builder.call(function, [pointer, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@numba.njit(nogil=True, forceinline=True, cache=True)
def prefetch_row(address, row, row_bytes):  # type: ignore[no-untyped-def]
    """Ask for all lines of a row.

    Args:
        address: of row 0.
        row: number of the row.
        row_bytes: its length.
    """
    begin = address + row * row_bytes
    for offset in range(0, row_bytes, _LINE_BYTES):
        _prefetch_line(begin + offset)  # type: ignore[call-arg]


@numba.njit(parallel=True, nogil=True, cache=True)
def bad_key(keys, offsets, rows, num_rows, one_hot):  # type: ignore[no-untyped-def]
    """See ``lookup.bad_key``."""
    num_tables = len(rows)
    if one_hot and len(keys) != num_tables * num_rows:
        return 0, -1
    found = np.full(num_tables, _NONE, np.int64)
    for table in numba.prange(num_tables):
        begin = table * num_rows
        end = begin + num_rows
        if not one_hot:
            if not _describe_bags(offsets[begin : end + 1], len(keys), table == 0):
                found[table] = -1
                continue
            begin = offsets[begin]
            end = offsets[end]
        position = _first_outside(keys[begin:end], rows[table])
        if position >= 0:
            found[table] = begin + position
    for table in range(num_tables):
        if found[table] != _NONE:
            return table, found[table]
    return -1, -1


@numba.njit(nogil=True, cache=True)
def _describe_bags(bags, num_keys, is_first):  # type: ignore[no-untyped-def]
    broken = bags[0] < 0 or bags[-1] > num_keys or (is_first and bags[0] != 0)
    for bag in range(len(bags) - 1):
        broken |= bags[bag + 1] < bags[bag]
    return not broken


@numba.njit(nogil=True, cache=True)
def _first_outside(keys, limit):  # type: ignore[no-untyped-def]
    # The first loop has no exit, so that it runs in vector registers.
    wrong = False
    for key in keys:
        wrong |= (key < 0) | (key >= limit)
    if wrong:
        for position in range(len(keys)):
            if keys[position] < 0 or keys[position] >= limit:
                return position
    return -1


@numba.njit(nogil=True, cache=True)
def gather_pool(weight, row_start, keys, offsets, key_weights, mean, place, num_rows, out):  # type: ignore[no-untyped-def]
    """See ``lookup.gather_pool``."""
    if len(offsets) == 0 and len(key_weights) == 0:
        _copy_rows(weight, row_start, keys, place, num_rows, out)
    else:
        _pool_bags(weight, row_start, keys, offsets, key_weights, mean, place, num_rows, out)


# One key a bag goes by rows of the batch: the output is written from end to end. Bags of more keys go by tables, so
# that the rows to come are asked for one by one, however the bags are cut (8 keys a bag: 17 ms instead of 28).


@numba.njit(parallel=True, nogil=True, cache=True)
def _copy_rows(weight, row_start, keys, place, num_rows, out):  # type: ignore[no-untyped-def]
    address = weight.ctypes.data
    row_bytes = weight.shape[1] * weight.itemsize
    for b in numba.prange(num_rows):
        for table in range(len(row_start)):
            if b + 1 < num_rows:
                prefetch_row(address, row_start[table] + keys[table * num_rows + b + 1], row_bytes)
            source = weight[row_start[table] + keys[table * num_rows + b]]
            target = out[b, place[table]]
            for d in range(len(source)):
                target[d] = source[d]


@numba.njit(parallel=True, nogil=True, cache=True)
def _pool_bags(weight, row_start, keys, offsets, key_weights, mean, place, num_rows, out):  # type: ignore[no-untyped-def]
    blocks = (num_rows + _BLOCK - 1) // _BLOCK
    address = weight.ctypes.data
    row_bytes = weight.shape[1] * weight.itemsize
    for item in numba.prange(len(row_start) * blocks):
        table = item // blocks
        first = item % blocks * _BLOCK
        bag = table * num_rows
        last_key = _key_of(offsets, bag + num_rows) - 1
        asked = _key_of(offsets, bag + first)
        for b in range(first, min(first + _BLOCK, num_rows)):
            begin = _key_of(offsets, bag + b)
            end = _key_of(offsets, bag + b + 1)
            for k in range(asked, min(end + _AHEAD, last_key + 1)):
                prefetch_row(address, row_start[table] + keys[k], row_bytes)
            asked = max(asked, min(end + _AHEAD, last_key + 1))
            if len(key_weights) == 0:
                _pool(weight, row_start[table], keys, begin, end, out, b, place[table])
            else:
                _pool_weighted(weight, row_start[table], keys, key_weights, begin, end, out, b, place[table])
            if mean[table] and end - begin > 1:
                _divide(out, b, place[table], end - begin)


@numba.njit(nogil=True, forceinline=True, cache=True)
def _key_of(offsets, bag):  # type: ignore[no-untyped-def]
    """First key of a bag."""
    return bag if len(offsets) == 0 else offsets[bag]


# These take whole arrays and places: views would count references atomically, on one counter for all threads.


@numba.njit(nogil=True, forceinline=True, cache=True)
def _pool(weight, row_start, keys, begin, end, out, b, place):  # type: ignore[no-untyped-def]
    dim = weight.shape[1]
    if begin == end:
        for d in range(dim):
            out[b, place, d] = 0
        return
    row = row_start + keys[begin]
    for d in range(dim):
        out[b, place, d] = weight[row, d]
    for k in range(begin + 1, end):
        row = row_start + keys[k]
        for d in range(dim):
            out[b, place, d] += weight[row, d]


@numba.njit(nogil=True, forceinline=True, cache=True)
def _pool_weighted(weight, row_start, keys, key_weights, begin, end, out, b, place):  # type: ignore[no-untyped-def]
    dim = weight.shape[1]
    for d in range(dim):
        out[b, place, d] = 0
    for k in range(begin, end):
        row = row_start + keys[k]
        factor = out.dtype.type(key_weights[k])
        for d in range(dim):
            out[b, place, d] += factor * weight[row, d]


@numba.njit(nogil=True, forceinline=True, cache=True, error_model="numpy")
def _divide(out, b, place, count):  # type: ignore[no-untyped-def]
    divisor = out.dtype.type(count)
    for d in range(out.shape[2]):
        out[b, place, d] /= divisor
