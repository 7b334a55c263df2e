"""Compiled packing for the exchanges; references in ``exchange.py``."""

from __future__ import annotations

import numba


@numba.njit(parallel=True, nogil=True, cache=True)
def copy_pieces(source, source_starts, out, out_starts, lengths):  # type: ignore[no-untyped-def]
    """See ``exchange.copy_pieces``."""
    for piece in numba.prange(len(lengths)):
        begin = source_starts[piece]
        target = out_starts[piece]
        length = lengths[piece]
        out[target : target + length] = source[begin : begin + length]


@numba.njit(parallel=True, nogil=True, cache=True)
def scatter_vectors(rows, before, count, place, num_rows, vectors):  # type: ignore[no-untyped-def]
    """See ``exchange.scatter_vectors``."""
    dim = rows.shape[1]
    for b in numba.prange(num_rows):
        for table in range(len(place)):
            source = rows[before[table] * num_rows + b * count[table] + table - before[table]]
            target = vectors[b, place[table]]
            for d in range(dim):
                target[d] = source[d]


@numba.njit(parallel=True, nogil=True, cache=True)
def gather_vectors(vectors, before, count, place, num_rows, rows):  # type: ignore[no-untyped-def]
    """See ``exchange.gather_vectors``."""
    dim = rows.shape[1]
    for b in numba.prange(num_rows):
        for table in range(len(place)):
            source = vectors[b, place[table]]
            target = rows[before[table] * num_rows + b * count[table] + table - before[table]]
            for d in range(dim):
                target[d] = source[d]
