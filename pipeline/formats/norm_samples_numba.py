"""Compiled readers and writer of Norm samples; ``norm_samples.py`` has the reference and the arguments of each.

Shapes: B rows, N dense columns, T tables, H key columns. Words are put together from bytes, as nothing is aligned.
Single-threaded and without the interpreter's lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

OK, TRUNCATED, BAD_LENGTH, BAD_SUM, BAD_COUNT, TOO_MANY_KEYS, BAD_LABEL = range(7)

_ONE = 0x3F80_0000


@njit(nogil=True, inline="always")
def _unsigned(data: Any, byte: int) -> Any:
    return (
        np.int64(data[byte])
        | (np.int64(data[byte + 1]) << 8)
        | (np.int64(data[byte + 2]) << 16)
        | (np.int64(data[byte + 3]) << 24)
    )


@njit(nogil=True, inline="always")
def _signed(data: Any, byte: int) -> Any:
    return np.int64(np.int32(_unsigned(data, byte)))


@njit(nogil=True, inline="always")
def _key(data: Any, byte: int, wide: bool) -> Any:
    low = _unsigned(data, byte)
    return low | (_unsigned(data, byte + 4) << 32) if wide else low


@njit(nogil=True, cache=True)
def _byte_sum(data: Any, start: int, stop: int) -> int:
    total = 0
    for byte in range(start, stop):
        total += data[byte]
    return total % 256


@njit(nogil=True, cache=True)
def _open_frame(data: Any, byte: int, framed: bool, least: int) -> tuple[int, int, int, int]:
    """Outcome; first byte of the sample, or of the fault; the byte behind what the sample may take; the number."""
    if not framed:
        return OK, byte, data.size, 0
    if byte + 4 > data.size:
        return TRUNCATED, byte, 0, 0
    length = _signed(data, byte)
    if length < least:
        return BAD_LENGTH, byte, 0, length
    stop = byte + 4 + length
    if stop + 1 > data.size:
        return TRUNCATED, byte, 0, length
    if _byte_sum(data, byte + 4, stop) != data[stop]:
        return BAD_SUM, stop, 0, int(data[stop])
    return OK, byte + 4, stop, 0


@njit(nogil=True, cache=True)
def _count_keys(data: Any, byte: int, stop: int, framed: bool, width: int) -> tuple[int, int]:
    """Outcome of reading a slot's number of keys, and that."""
    if byte + 4 > stop:
        return (BAD_LENGTH if framed else TRUNCATED), 0
    count = _signed(data, byte)
    if count < 0 or byte + 4 + count * width > stop:
        return BAD_COUNT, count
    return OK, count


@njit(nogil=True, cache=True)
def scan_samples(
    data: Any, start: int, rows: int, framed: bool, num_dense: int, wide: bool, longest: Any, largest: Any
) -> tuple[int, int, int, int]:
    """Walk through samples."""
    width = 8 if wide else 4
    byte = start
    for row in range(rows):
        outcome, byte, stop, number = _open_frame(data, byte, framed, 4 * (1 + num_dense + longest.size))
        if outcome != OK:
            return outcome, row, byte, number
        if byte + 4 * (1 + num_dense) > stop:
            return TRUNCATED, row, byte, 0
        byte += 4 * (1 + num_dense)
        for t in range(longest.size):
            outcome, count = _count_keys(data, byte, stop, framed, width)
            if outcome != OK:
                return outcome, row, byte, count
            byte += 4
            longest[t] = max(longest[t], count)
            for _ in range(count):
                largest[t] = max(largest[t], _key(data, byte, wide))
                byte += width
        if framed:
            if byte != stop:
                return BAD_LENGTH, row, byte, byte - stop
            byte += 1
    return OK, rows, byte, 0


@njit(nogil=True, cache=True)
def _read_slots(
    data: Any, byte: int, stop: int, framed: bool, wide: bool, columns: Any, raised: Any, keys: Any
) -> tuple[int, int, int, int]:
    """Read the slots of one sample into its row ``keys`` [H].

    Returns:
        Outcome; the byte behind the sample, or of the fault; the number there; the byte of a slot that has more keys
        than its table's hotness (the number is then its own), or -1.
    """
    width = 8 if wide else 4
    too_many, too_many_byte = 0, -1
    for t in range(raised.size):
        outcome, count = _count_keys(data, byte, stop, framed, width)
        if outcome != OK:
            return outcome, byte, count, -1
        if count > columns[t + 1] - columns[t]:
            if too_many_byte < 0:
                too_many, too_many_byte = count, byte
        else:
            for h in range(count):
                keys[columns[t] + h] = _key(data, byte + 4 + h * width, wide) - raised[t]
        byte += 4 + count * width
    if framed and byte != stop:
        return BAD_LENGTH, byte, byte - stop, -1
    return OK, byte + (1 if framed else 0), too_many, too_many_byte


@njit(nogil=True, cache=True)
def read_samples(
    data: Any,
    start: int,
    framed: bool,
    wide: bool,
    columns: Any,
    raised: Any,
    labels: Any,
    dense: Any,
    keys: Any,
    starts: Any,
) -> tuple[int, int, int, int]:
    """Read samples into arrays."""
    num_dense = dense.shape[1]
    byte = start
    for row in range(labels.size):
        outcome, byte, stop, number = _open_frame(data, byte, framed, 4 * (1 + num_dense + raised.size))
        if outcome != OK:
            return outcome, row, byte, number
        if byte + 4 * (1 + num_dense) > stop:
            return TRUNCATED, row, byte, 0
        starts[row] = byte
        label = _signed(data, byte)
        for n in range(num_dense):
            dense[row, n] = _signed(data, byte + 4 + 4 * n)
        outcome, byte, number, too_many = _read_slots(
            data, byte + 4 * (1 + num_dense), stop, framed, wide, columns, raised, keys[row]
        )
        if outcome != OK:
            return outcome, row, byte, number
        if label != 0 and label != _ONE:
            return BAD_LABEL, row, starts[row], label
        labels[row] = label == _ONE
        if too_many >= 0:
            return TOO_MANY_KEYS, row, too_many, number
    return OK, labels.size, byte, 0


@njit(nogil=True, inline="always")
def _put(out: Any, place: int, value: Any, width: int) -> int:
    for shift in range(width):
        out[place + shift] = (value >> (8 * shift)) & 255
    return place + width


@njit(nogil=True, cache=True)
def write_samples(
    labels: Any, dense: Any, keys: Any, columns: Any, raised: Any, wide: bool, framed: bool, out: Any
) -> int:
    """Write arrays as samples; returns the bytes written."""
    place = 0
    for row in range(labels.size):
        frame = place
        if framed:
            place += 4
        start = place
        place = _put(out, place, np.int64(_ONE if labels[row] else 0), 4)
        for n in range(dense.shape[1]):
            place = _put(out, place, np.int64(dense[row, n]), 4)
        for t in range(raised.size):
            count_place = place
            place += 4
            count = 0
            for h in range(columns[t], columns[t + 1]):
                if keys[row, h] >= 0:
                    key = keys[row, h] + raised[t]
                    place = _put(out, place, key, 4)
                    if wide:
                        place = _put(out, place, key >> 32, 4)
                    count += 1
            _put(out, count_place, np.int64(count), 4)
        if framed:
            _put(out, frame, np.int64(place - start), 4)
            out[place] = _byte_sum(out, start, place)
            place += 1
    return place
