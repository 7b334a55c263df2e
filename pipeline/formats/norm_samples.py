"""Samples of HugeCTR's Norm files to and from arrays; ``norm.py`` tells what they look like.

The functions are the references of the compiled ones. Shapes: B rows, N dense columns, T tables, H key columns.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

OK, TRUNCATED, BAD_LENGTH, BAD_SUM, BAD_COUNT, TOO_MANY_KEYS, BAD_LABEL = range(7)
"""Outcomes of reading samples."""

_ONE = 0x3F80_0000  # the word of 1.0


def scan_samples(
    data: Any, start: int, rows: int, framed: bool, num_dense: int, wide: bool, longest: Any, largest: Any
) -> tuple[int, int, int, int]:
    """Walk through samples.

    Args:
        data: [bytes] uint8, the file.
        start: byte of the first sample.
        rows: how many there are.
        framed: whether they have length and sum.
        num_dense: N.
        wide: keys have 8 bytes.
        longest: [T] int64, raised to the most keys of a slot.
        largest: [T] int64, raised to the largest key.

    Returns:
        Outcome, row and byte of the fault (``OK``: rows, and the byte behind the last sample), and the number that
        was found there.
    """
    reader = _Reader(data, framed, wide)
    byte = start
    for row in range(rows):
        outcome, byte, number, (_, _, slots) = reader.sample(byte, num_dense, longest.size)
        if outcome != OK:
            return outcome, row, byte, number
        for t, keys in enumerate(slots):
            longest[t] = max(longest[t], len(keys))
            largest[t] = max([largest[t], *keys])
    return OK, rows, byte, 0


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
    """Read samples into arrays.

    Args:
        data: [bytes] uint8, the file.
        start: byte of the first sample.
        framed: whether they have length and sum.
        wide: keys have 8 bytes.
        columns: [T + 1] int64, the first key column of each table.
        raised: [T] int64, by how much the keys of each table are raised in the file.
        labels: [B] int32, written.
        dense: [B, N] int32, the words of the dense columns, written.
        keys: [B, H] int64, -1 everywhere; the keys that are there are written.
        starts: [B] int64, written: the byte of each row's label.

    Returns:
        Outcome, row and byte of the fault (``OK``: B, and the byte behind the last sample), and the number that was
        found there.
    """
    reader = _Reader(data, framed, wide)
    byte = start
    for row in range(labels.size):
        starts[row] = byte + 4 * framed
        outcome, byte, number, (label, words, slots) = reader.sample(byte, dense.shape[1], raised.size)
        if outcome != OK:
            return outcome, row, byte, number
        if label not in (0, _ONE):
            return BAD_LABEL, row, int(starts[row]), label
        labels[row] = label == _ONE
        dense[row] = words
        place = int(starts[row]) + 4 * (1 + len(words))
        for t, found in enumerate(slots):
            if len(found) > columns[t + 1] - columns[t]:
                return TOO_MANY_KEYS, row, place, len(found)
            keys[row, columns[t] : columns[t] + len(found)] = np.array(found, np.int64) - raised[t]
            place += 4 + len(found) * (8 if wide else 4)
    return OK, labels.size, byte, 0


def key_byte(data: Any, start: int, num_dense: int, wide: bool, columns: Any, column: int) -> int:
    """Byte of the key in a column of the row whose label is at byte ``start``; arguments as of ``read_samples``."""
    place, width = start + 4 * (1 + num_dense), 8 if wide else 4
    for t in range(columns.size - 1):
        if column < columns[t + 1]:
            return int(place + 4 + width * (column - columns[t]))
        (count,) = struct.unpack_from("<i", data, place)
        place += 4 + width * count
    return int(place)


def write_samples(
    labels: Any, dense: Any, keys: Any, columns: Any, raised: Any, wide: bool, framed: bool, out: Any
) -> int:
    """Write arrays as samples.

    Args:
        labels: [B] int32.
        dense: [B, N] int32, the words of the dense columns.
        keys: [B, H] int64; -1 = no key.
        columns: [T + 1] int64, the first key column of each table.
        raised: [T] int64, by how much the keys of each table are raised in the file.
        wide: keys get 8 bytes.
        framed: samples get length and sum.
        out: [bytes] uint8, long enough.

    Returns:
        Bytes written.
    """
    place = 0
    for row in range(labels.size):
        sample = struct.pack("<i", _ONE if labels[row] else 0) + dense[row].astype("<i4").tobytes()
        for t in range(raised.size):
            found = [int(key + raised[t]) for key in keys[row, columns[t] : columns[t + 1]] if key >= 0]
            sample += struct.pack(f"<i{len(found)}{'q' if wide else 'I'}", len(found), *found)
        if framed:
            sample = struct.pack("<i", len(sample)) + sample + bytes([sum(sample) % 256])
        out[place : place + len(sample)] = np.frombuffer(sample, np.uint8)
        place += len(sample)
    return place


class _Reader:
    """Takes one sample after the other out of bytes."""

    def __init__(self, data: Any, framed: bool, wide: bool) -> None:
        self._data = data
        self._framed = framed
        self._wide = wide

    def sample(
        self, byte: int, num_dense: int, num_slots: int
    ) -> tuple[int, int, int, tuple[int, list[int], list[list[int]]]]:
        """Outcome; the byte behind the sample, or of the fault; the number there; (label, dense words, keys)."""
        nothing: tuple[int, list[int], list[list[int]]] = (0, [], [])
        outcome, byte, number, stop = self._open(byte, 4 * (1 + num_dense + num_slots))
        if outcome != OK:
            return outcome, byte, number, nothing
        if byte + 4 * (1 + num_dense) > stop:
            return TRUNCATED, byte, 0, nothing
        words = list(struct.unpack_from(f"<{1 + num_dense}i", self._data, byte))
        byte += 4 * len(words)
        slots = []
        for _ in range(num_slots):
            count, fault = self._count(byte, stop)
            if fault != OK:
                return fault, byte, count, nothing
            slots.append(list(struct.unpack_from(f"<{count}{'q' if self._wide else 'I'}", self._data, byte + 4)))
            byte += 4 + count * (8 if self._wide else 4)
        if self._framed:
            if byte != stop:
                return BAD_LENGTH, byte, byte - stop, nothing
            byte += 1
        return OK, byte, 0, (words[0], words[1:], slots)

    def _open(self, byte: int, least: int) -> tuple[int, int, int, int]:
        """Outcome; first byte of a sample, or of the fault; the number there; the byte behind what it may take."""
        size = int(self._data.size)
        if not self._framed:
            return OK, byte, 0, size
        if byte + 4 > size:
            return TRUNCATED, byte, 0, 0
        (length,) = struct.unpack_from("<i", self._data, byte)
        stop = byte + 4 + length
        if length < least:
            return BAD_LENGTH, byte, length, 0
        if stop + 1 > size:
            return TRUNCATED, byte, length, 0
        if int(self._data[byte + 4 : stop].sum()) % 256 != self._data[stop]:
            return BAD_SUM, stop, int(self._data[stop]), 0
        return OK, byte + 4, 0, stop

    def _count(self, byte: int, stop: int) -> tuple[int, int]:
        """Number of keys of a slot, and the outcome of reading it."""
        if byte + 4 > stop:
            return 0, BAD_LENGTH if self._framed else TRUNCATED
        (count,) = struct.unpack_from("<i", self._data, byte)
        if count < 0:
            return count, BAD_COUNT
        if byte + 4 + count * (8 if self._wide else 4) > stop:
            return count, BAD_COUNT
        return count, OK
