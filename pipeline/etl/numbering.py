"""From counts on disk to numbered categories: by descending count, equal counts by value, inside a memory budget.

The sorted runs of a column are cut at the same values into windows, each small enough to hold; ranks own windows in
turn and exchange them all-to-all. A window's owner adds the counts up. How many values of each count every window
holds decides where its values stand, so that each can put them there without seeing the others: the result is the same
for any number of windows, ranks and runs.

Letters: W ranks.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DataError
from embedding.comm import Comm, all_gather_bytes
from pipeline.etl import tally_numba as engine
from pipeline.etl.tally import Run, RunReader, splitters

_BYTES_PER_ENTRY = 64
"""What a window takes at most while it is exchanged, sorted and added up: the entry five times, value and count."""
_SAMPLES_PER_WINDOW = 16
_SPREAD_FROM = 1 << 16
"""Columns of fewer entries stay with one rank."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """Categories of one column in the order of their numbers, number 1 first.

    Attributes:
        path: file of the values, uint32; what stands at a missing category's place means nothing.
        size: categories that have a number.
        missing: number of the missing category; 0: it has none of its own.
        counts: every count that occurs, descending.
        sizes: categories of each of these counts.
        rare: look-ups of number 0 in the counted rows.
    """

    path: Path
    size: int
    missing: int
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    rare: int

    def counts_of(self, start: int, stop: int) -> Any:
        """Counts [stop - start] int64 of the categories ``start .. stop`` in the order of their numbers."""
        ends = np.cumsum(self.sizes, dtype=np.int64)
        places = np.searchsorted(ends, np.arange(start, stop), side="right")
        return np.array(self.counts, np.int64)[places]


@dataclass(frozen=True, slots=True)
class _Window:
    """What its owner knows of a window: files of values and counts, and values by count."""

    values: Path
    counts: Path
    size: int


class Numbering:
    """Numbers the categories of all columns; every call is collective."""

    def __init__(
        self,
        comm: Comm,
        folder: Path,
        *,
        threshold: int,
        cap_rows: int | None,
        budget_bytes: int,
        advance: Callable[[int], None],
    ) -> None:
        """Prepare.

        Args:
            comm: of all ranks.
            folder: scratch files and results, the same for all ranks.
            threshold: categories counted less often get no number.
            cap_rows: rows of a table at most, number 0 among them; ``None``: any.
            budget_bytes: of this rank; all ranks take the least.
            advance: called with the entries of each window done.
        """
        self._comm, self._folder = comm, folder
        self._threshold, self._cap_rows = threshold, cap_rows
        least = np.array([budget_bytes // _BYTES_PER_ENTRY], np.int64)
        comm.all_reduce(least, "min").wait()
        self._window_entries = max(1024, int(least[0]))
        self._advance = advance

    def number(self, column: int, runs: Sequence[Run], missing: int, rows: int) -> Numbered:
        """Number one column.

        Args:
            column: its place.
            runs: of this column, those that this rank hands out.
            missing: how often the category was missing in the counted rows, over all ranks.
            rows: counted, over all ranks.

        Raises:
            DataError: more categories than keys of 32 bits can number.
        """
        readers = [RunReader(run) for run in runs]
        entries = np.array([sum(run.entries for run in runs)], np.int64)
        self._comm.all_reduce(entries).wait()
        cuts = self._cuts(readers, runs, int(entries[0]))
        windows = self._exchange(column, readers, cuts)
        steps = self._gather_steps(windows)
        totals: Counter[int] = Counter()
        for of_window in steps:
            totals.update(of_window)
        keeps_missing = missing >= self._threshold
        if keeps_missing:
            totals[missing] += 1
        counts = sorted(totals, reverse=True)
        sizes = [totals[count] for count in counts]
        first = dict(zip(counts, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True)) if counts else {}
        size = sum(sizes)
        if size >= 2**31:
            raise DataError(f"column C{column + 1}: {size} categories, but keys number 2147483647; raise the threshold")
        missing_place = first[missing] if keeps_missing else -1
        if keeps_missing:
            first[missing] += 1
        path = self._folder / f"C{column + 1:02d}.values"
        self._put(path, size, windows, steps, first)
        if self._cap_rows is not None and size > self._cap_rows - 1:
            size = self._cap_rows - 1
            counts, sizes = _cut(counts, sizes, size)
        kept = sum(count * number for count, number in zip(counts, sizes, strict=True))
        return Numbered(
            path, size, missing_place + 1 if missing_place < size else 0, tuple(counts), tuple(sizes), rows - kept
        )

    def _cuts(self, readers: Sequence[RunReader], runs: Sequence[Run], entries: int) -> list[int]:
        """Values between windows, the same on all ranks."""
        windows = -(-entries // self._window_entries)
        if entries > _SPREAD_FROM:
            windows = -(-windows // self._comm.size) * self._comm.size
        if windows <= 1:
            return []
        step = max(1, entries // (windows * _SAMPLES_PER_WINDOW))
        samples = [reader.samples(min(step, run.entries)) for reader, run in zip(readers, runs, strict=True)]
        own = np.concatenate([np.empty(0, np.int64), *samples])
        everyone = np.frombuffer(b"".join(all_gather_bytes(self._comm, own.tobytes())), np.int64)
        return splitters(everyone, windows)

    def _exchange(self, column: int, readers: Sequence[RunReader], cuts: Sequence[int]) -> list[_Window | None]:
        """Every window to its owner, who writes it; ``None`` for windows of others."""
        ranks = self._comm.size
        bounds = [0, *cuts, 2**32]
        places = [[reader.place(value) for value in bounds] for reader in readers]
        windows: list[_Window | None] = []
        for begin in range(0, len(bounds) - 1, ranks):
            turn = range(begin, min(begin + ranks, len(bounds) - 1))
            parts = [
                [reader.read(at[window], at[window + 1]) for reader, at in zip(readers, places, strict=True)]
                for window in turn
            ]
            sizes = [sum(len(part) for part in window) for window in parts] + [0] * (ranks - len(turn))
            flat = [part for window in parts for part in window]
            send = np.concatenate([np.empty(0, np.uint64), *flat]).view(np.int64)
            del parts, flat
            received = self._swap(send, sizes)
            del send
            for owner, window in enumerate(turn):
                mine = owner == self._comm.rank
                windows.append(self._add_up(column, window, received) if mine else None)
            self._advance(len(received))
        return windows

    def _swap(self, send: Any, sizes: Sequence[int]) -> Any:
        if self._comm.size == 1:
            return send.view(np.uint64)
        wanted = np.empty(self._comm.size, np.int64)
        self._comm.all_to_all(np.array(sizes, np.int64), wanted).wait()
        received = np.empty(int(wanted.sum()), np.int64)
        self._comm.all_to_all_v(send, list(sizes), received, wanted.tolist()).wait()
        return received.view(np.uint64)

    def _add_up(self, column: int, window: int, entries: Any) -> _Window:
        entries.sort()
        values, counts = np.empty(len(entries), np.uint32), np.empty(len(entries), np.int64)
        size = engine.add_up(entries, self._threshold, values, counts)
        stem = f"C{column + 1:02d}-{window:05d}"
        made = _Window(self._folder / f"{stem}.window", self._folder / f"{stem}.counts", size)
        values[:size].tofile(made.values)
        counts[:size].tofile(made.counts)
        return made

    def _gather_steps(self, windows: Sequence[_Window | None]) -> list[dict[int, int]]:
        """By window, on every rank: how many of its values have each count."""
        own = {}
        for number, window in enumerate(windows):
            if window is not None:
                found, sizes = np.unique(np.fromfile(window.counts, np.int64), return_counts=True)
                own[number] = (found.tolist(), sizes.tolist())
        gathered: dict[int, dict[int, int]] = {}
        for data in all_gather_bytes(self._comm, json.dumps(own).encode()):
            for number, (found, sizes) in json.loads(data).items():
                gathered[int(number)] = dict(zip(found, sizes, strict=True))
        return [gathered[number] for number in range(len(windows))]

    def _put(
        self,
        path: Path,
        size: int,
        windows: Sequence[_Window | None],
        steps: Sequence[Mapping[int, int]],
        first: Mapping[int, int],
    ) -> None:
        """Write each window's values to their places; ``first`` is where the first value of each count stands."""
        if self._comm.rank == 0:
            with path.open("wb") as file:
                file.truncate(4 * size)
        self._comm.barrier()
        next_place = dict(first)
        with path.open("r+b", buffering=0) as file:
            for window, of_window in zip(windows, steps, strict=True):
                if window is not None:
                    blocks = [(next_place[count], of_window[count]) for count in sorted(of_window, reverse=True)]
                    _put_window(file.fileno(), window, sorted(of_window, reverse=True), blocks)
                    window.values.unlink()
                    window.counts.unlink()
                for count, number in of_window.items():
                    next_place[count] += number
            os.fsync(file.fileno())
        self._comm.barrier()


def _put_window(file: int, window: _Window, steps: Sequence[int], blocks: Sequence[tuple[int, int]]) -> None:
    """Write the values of a window, a block for each count; neighbouring blocks go together."""
    values, counts = np.fromfile(window.values, np.uint32), np.fromfile(window.counts, np.int64)
    ordered = np.empty(window.size, np.uint32)
    starts = np.cumsum([0, *(size for _, size in blocks)], dtype=np.int64)[:-1].copy()
    if window.size:
        engine.order_by_count(values, counts, np.array(steps, np.int64), starts, ordered)
    done, block = 0, 0
    while block < len(blocks):
        place, size = blocks[block]
        block += 1
        while block < len(blocks) and blocks[block][0] == place + size:
            size += blocks[block][1]
            block += 1
        data = ordered[done : done + size].data.cast("B")
        at = 4 * place
        while data:
            written = os.pwrite(file, data, at)
            data, at = data[written:], at + written
        done += size


def _cut(counts: Sequence[int], sizes: Sequence[int], size: int) -> tuple[list[int], list[int]]:
    """The first ``size`` categories of these counts."""
    kept_counts, kept_sizes = [], []
    for count, number in zip(counts, sizes, strict=True):
        if size <= 0:
            break
        kept_counts.append(count)
        kept_sizes.append(min(number, size))
        size -= number
    return kept_counts, kept_sizes
