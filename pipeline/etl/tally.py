"""Counts of every column's categories, in hash tables that spill sorted runs to disk before they outgrow a budget.

An entry is one uint64: the 32-bit value above, a 32-bit count below; a slot that is 0 is empty. Tables are
open-addressed with linear probing, a power of two long and at most 60 % full. A run on disk is the entries of one
table, sorted by value. Beside each table stands a plain number: how often the category was missing.

The references of ``tally_numba`` stand here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from pipeline.etl import tally_numba as engine

_FIRST_SLOTS = 1 << 10
_SMALL_SHARE = 64
"""A table below 1 / 64 of the budget grows whatever the others hold; together they stay below half of it."""


@dataclass(frozen=True, slots=True)
class Run:
    """Sorted counts on disk: ``path`` holds ``entries`` uint64 of one column."""

    column: int
    path: Path
    entries: int


class Tally:
    """Counts of all columns; ``add`` may be called by many threads at once."""

    def __init__(self, columns: int, budget_bytes: int, missing_as: int = -1) -> None:
        """Start empty.

        Args:
            columns: of categories.
            budget_bytes: what the tables may take together, while one of them grows as well.
            missing_as: the value that a missing category is; -1: counted on its own.
        """
        self.missing = [0] * columns
        self.runs: list[Run] = []
        self._budget = budget_bytes
        self._missing_as = missing_as
        self._tables = [np.zeros(_FIRST_SLOTS, np.uint64) for _ in range(columns)]
        self._used = [0] * columns
        self._locks = [Lock() for _ in range(columns)]
        self._room = Lock()
        self._bytes = sum(table.nbytes for table in self._tables)
        self._folder = Path()
        self._prefix = ""

    def begin(self, folder: Path, prefix: str) -> None:
        """Start a batch: runs from here on go to ``folder/prefix-<number>.run``."""
        self._folder, self._prefix = folder, prefix
        self.runs = []
        self.missing = [0] * len(self._tables)

    def add(self, categories: Any, first: int) -> None:
        """Count categories [columns, rows] int64, starting with column ``first`` so that threads spread out."""
        columns = len(self._tables)
        waiting = [(first + step) % columns for step in range(columns)]
        while waiting:
            free = next((column for column in waiting if self._locks[column].acquire(blocking=False)), None)
            if free is None:
                free = waiting[0]
                self._locks[free].acquire()
            try:
                self._add_column(free, categories[free])
            finally:
                self._locks[free].release()
            waiting.remove(free)

    def flush(self) -> None:
        """Write every table as a run and empty it."""
        for column, lock in enumerate(self._locks):
            with lock:
                self._spill(column)

    def _add_column(self, column: int, values: Any) -> None:
        done = 0
        while True:
            counted, self._used[column], missing = engine.count(
                values[done:], self._missing_as, self._tables[column], self._used[column]
            )
            self.missing[column] += missing
            done += counted
            if done == len(values):
                return
            self._make_room(column)

    def _make_room(self, column: int) -> None:
        """Double a table if the budget allows, else spill it; the caller holds its lock."""
        table = self._tables[column]
        with self._room:
            grows = self._bytes + 2 * table.nbytes <= self._budget or table.nbytes < self._budget // _SMALL_SHARE
            if grows:
                self._bytes += 2 * table.nbytes
        if not grows:
            self._spill(column)
            return
        larger = np.zeros(2 * len(table), np.uint64)
        engine.rehash(table, larger)
        self._tables[column] = larger
        with self._room:
            self._bytes -= table.nbytes

    def _spill(self, column: int) -> None:
        table = self._tables[column]
        kept = engine.pack(table)
        if kept == 0:
            return
        entries = table[:kept]
        entries.sort()
        with self._room:
            path = self._folder / f"{self._prefix}-{len(self.runs):04d}.run"
            self.runs.append(Run(column, path, kept))
        write_array(path, entries)
        table.fill(0)
        self._used[column] = 0


def write_array(path: Path, values: Any) -> None:
    """Write an array's bytes and bring them to the disk."""
    with path.open("wb", buffering=0) as file:
        data = values.data.cast("B")
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())


class RunReader:
    """Slices of one sorted run by value, without holding the run."""

    def __init__(self, run: Run) -> None:
        """Map it."""
        self._entries = np.memmap(run.path, np.uint64, mode="r", shape=(run.entries,))
        self._path = run.path

    def samples(self, step: int) -> Any:
        """Every ``step``-th value [n] int64."""
        return (self._entries[step - 1 :: step] >> np.uint64(32)).astype(np.int64)

    def place(self, value: int) -> int:
        """The first entry whose value is at least ``value``."""
        if value >= 2**32:
            return len(self._entries)
        return int(np.searchsorted(self._entries, np.uint64(value << 32)))

    def read(self, start: int, stop: int) -> Any:
        """Entries [stop - start] uint64, read rather than mapped so that they do not stay in memory."""
        return np.fromfile(self._path, np.uint64, stop - start, offset=8 * start)


def splitters(samples: Any, windows: int) -> list[int]:
    """Values at which to cut so that windows hold about as many entries; ascending, without repeats.

    Args:
        samples: [n] int64 values, any order.
        windows: 1 or more.
    """
    if windows == 1 or not len(samples):
        return []
    ordered = np.sort(samples)
    picked: Sequence[int] = np.unique(ordered[np.arange(1, windows) * len(ordered) // windows]).tolist()
    return [value for value in picked if value > 0]


def count(values: Any, missing_as: int, entries: Any, used: int) -> tuple[int, int, int]:
    """Count values into a hash table until it is full.

    Args:
        values: [n] int64; negative ones are missing.
        missing_as: what a missing value counts as; -1: only counted.
        entries: [slots] uint64, changed in place.
        used: filled slots.

    Returns:
        Values done (fewer than n where a new one finds the table 60 % full), filled slots, missing values.
    """
    most = len(entries) * 3 // 5
    shift = 33 - len(entries).bit_length()
    missing = 0
    for place, given in enumerate(values.tolist()):
        if given < 0 and missing_as < 0:
            missing += 1
            continue
        value = missing_as if given < 0 else given
        slot = (value * 0x9E3779B1 & 0xFFFFFFFF) >> shift
        while entries[slot] and int(entries[slot]) >> 32 != value:
            slot = (slot + 1) % len(entries)
        if not entries[slot]:
            if used >= most:
                return place, used, missing
            entries[slot] = value << 32
            used += 1
        entries[slot] += np.uint64(1)
    return len(values), used, missing


def rehash(old: Any, new: Any) -> None:
    """Put the entries of one table into a larger empty one.

    Args:
        old: [slots] uint64.
        new: [slots] uint64, all 0, filled.
    """
    shift = 33 - len(new).bit_length()
    for entry in old[old != 0].tolist():
        slot = ((entry >> 32) * 0x9E3779B1 & 0xFFFFFFFF) >> shift
        while new[slot]:
            slot = (slot + 1) % len(new)
        new[slot] = entry


def pack(entries: Any) -> int:
    """Move the filled slots of a table to its front, in order; returns how many there are.

    Args:
        entries: [slots] uint64, changed in place; what lies behind the filled ones is left.
    """
    filled = entries[entries != 0]
    entries[: len(filled)] = filled
    return len(filled)


def add_up(entries: Any, least: int, values: Any, counts: Any) -> int:
    """Add the counts of equal values up, and keep values counted often enough.

    Args:
        entries: [n] uint64, sorted.
        least: smaller sums are left out.
        values: [n] uint32, its front filled, ascending.
        counts: [n] int64, its front filled.

    Returns:
        Values kept.
    """
    found, starts = np.unique(entries >> np.uint64(32), return_index=True)
    if not len(found):
        return 0
    sums = np.add.reduceat((entries & np.uint64(0xFFFFFFFF)).astype(np.int64), starts)
    kept = sums >= least
    number = int(kept.sum())
    values[:number] = found[kept]
    counts[:number] = sums[kept]
    return number


def order_by_count(values: Any, counts: Any, steps: Any, starts: Any, out: Any) -> None:
    """Put values where values of their count stand, in their own order.

    Args:
        values: [n] uint32.
        counts: [n] int64.
        steps: [s] int64, every count that occurs, descending.
        starts: [s] int64, where the next value of each count goes; moved on.
        out: [n] uint32, filled.
    """
    places = np.searchsorted(-steps, -counts)
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        out[starts[place]] = value
        starts[place] += 1
