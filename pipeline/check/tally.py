"""Counts over blocks of stored rows, all that a check needs to know of them; references of the compiled functions.

Nothing here stops at a wrong value: it is counted, and the first one is told.

Shapes: B rows of a block, V 32-bit words a row, N dense columns, T tables, H key columns, K keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np

VALUE_SHIFT = 18
VALUE_BINS = 1 << (32 - VALUE_SHIFT)
"""A float32 falls into the bin of its upper 14 bits: sign, exponent, five bits of the mantissa (3 % of the value)."""

HEAD = 1 << 16
"""The first rows of a table are always counted one by one; of the others every 2^shift-th."""

FULL = 0xFFFF
"""Where a 16-bit counter is full: the next look-up makes it 1, and it is told that ``FULL`` were carried."""

KEYS, MISSING, OUTSIDE, UNSEEN = range(4)
"""Columns of the totals of a table."""

SINGLES = 64
GROUPS = 2 * SINGLES
"""Keys by which splits are compared: the first ones alone, all others in as many groups by a hash."""

_MULTIPLIER = 0x9E37_79B9_7F4A_7C15


def tally_labels(labels: Any, one: int, counts: Any) -> int:
    """Count labels of 0, of 1, and others.

    Args:
        labels: [B] int32, the words of the labels.
        one: the word of a label of 1; a label of 0 is the word 0.
        counts: [3] int64, raised.

    Returns:
        The row of the first label that is neither, or -1.
    """
    other = (labels != 0) & (labels != one)
    counts += [np.count_nonzero(labels == 0), np.count_nonzero(labels == one), np.count_nonzero(other)]
    return int(np.argmax(other)) if other.any() else -1


def tally_dense(values: Any, words: Any, bins: Any, moments: Any, extremes: Any) -> tuple[int, int]:
    """Histograms, moments and extremes of dense columns.

    Args:
        values: [B, N] float32.
        words: [B, N] int32, the same bytes.
        bins: [N, VALUE_BINS] int64, raised; values that are not finite have bins of their own.
        moments: [N, 2] float64, raised by the sum and the sum of squares of what is finite.
        extremes: [N, 2] float32, lowered and raised to the least and the largest finite value.

    Returns:
        Row and column of the first value that is not finite, or (-1, 0).
    """
    finite = np.isfinite(values)
    for n in range(values.shape[1]):
        bins[n] += np.bincount((words[:, n].view(np.uint32) >> VALUE_SHIFT).astype(np.int64), minlength=VALUE_BINS)
        good = values[finite[:, n], n].astype(np.float64)
        moments[n] += [good.sum(), (good * good).sum()]
        if good.size:
            extremes[n] = min(extremes[n, 0], good.min()), max(extremes[n, 1], good.max())
    found = np.argwhere(~finite)
    return (int(found[0, 0]), int(found[0, 1])) if found.size else (-1, 0)


def tally_keys(
    words: Any,
    first: int,
    wide: bool,
    columns: Any,
    table_rows: Any,
    missing_keys: bool,
    starts: Any,
    shifts: Any,
    learn: bool,
    counters: Any,
    totals: Any,
    groups: Any,
    carried: Any,
) -> tuple[int, int, int]:
    """Count the keys of some tables.

    Args:
        words: [B, V] int32.
        first: word of key column 0.
        wide: keys are int64.
        columns: [T + 1] int64, the first key column of each table.
        table_rows: [T] int64.
        missing_keys: -1 may stand in a table of one key column.
        starts: [T] int64, where the counters of a table begin.
        shifts: [T] int64, of rows from ``HEAD`` on every 2^shift-th has a counter.
        learn: raise counters; otherwise count groups, and what the counters have never seen.
        counters: uint16, of all tables.
        totals: [T, 4] int64, raised: keys, missing, outside their table, unseen (as many as the counted stand for).
        groups: [T, GROUPS] int64, raised.
        carried: [B (columns[T] - columns[0])] int64, written: the counters that were full, in any order.

    Returns:
        Row and key column of the first key outside its table, or -1 both, and how many counters were full.
    """
    fault, full = (-1, -1), 0
    for b in range(words.shape[0]):
        for t in range(table_rows.size):
            many = missing_keys or columns[t + 1] - columns[t] > 1
            for h in range(columns[t], columns[t + 1]):
                place = first + h * (2 if wide else 1)
                key = int(words[b, place : place + 2].copy().view(np.int64)[0]) if wide else int(words[b, place])
                if key == -1 and many:
                    totals[t, MISSING] += 1
                    continue
                if not 0 <= key < table_rows[t]:
                    totals[t, OUTSIDE] += 1
                    fault = fault if fault[0] >= 0 else (b, int(h))
                    continue
                totals[t, KEYS] += 1
                if not learn:
                    groups[t, key_groups(np.array([key]))[0]] += 1
                shift = int(shifts[t]) if key >= HEAD else 0
                if key >= HEAD and (key - HEAD) % (1 << shift):
                    continue
                counter = int(starts[t]) + (HEAD + ((key - HEAD) >> shift) if key >= HEAD else key)
                if not learn:
                    totals[t, UNSEEN] += int(counters[counter] == 0) << shift
                elif counters[counter] == FULL:
                    carried[full] = counter
                    full += 1
                    counters[counter] = 1
                else:
                    counters[counter] += 1
    return *fault, full


def key_groups(keys: Any) -> Any:
    """The groups of keys [K] int64 by which splits are compared."""
    hashed = (keys.astype(np.uint64) * np.uint64(_MULTIPLIER)) >> np.uint64(58)
    return np.where(keys < SINGLES, keys, SINGLES + hashed.astype(np.int64))


def tally_weights(words: Any, first: int, wide: bool, columns: Any, weight: int, wrong: Any) -> tuple[int, int]:
    """Count weights that are not finite, of keys that are there.

    Args:
        words: [B, V] int32.
        first: word of key column 0.
        wide: keys are int64.
        columns: [T + 1] int64, the first key column of each table.
        weight: word of the weight of key column 0.
        wrong: [T] int64, raised.

    Returns:
        Row and key column of the first of them, or -1 both.
    """
    fault = (-1, -1)
    for b in range(words.shape[0]):
        for t in range(wrong.size):
            for h in range(columns[t], columns[t + 1]):
                high = words[b, first + h * 2 + 1] if wide else words[b, first + h]  # its sign is the key's
                if high >= 0 and not np.isfinite(words[b, weight + h : weight + h + 1].view(np.float32)[0]):
                    wrong[t] += 1
                    fault = fault if fault[0] >= 0 else (b, int(h))
    return fault
