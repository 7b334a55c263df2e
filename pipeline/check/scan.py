"""One split of a prepared data set, read once from end to end: checksums and counts.

Shapes: T tables, N dense columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.check.columns import BagTally, Faults, HeadTally, KeyTally, Place, WeightTally
from pipeline.check.counters import Counters
from pipeline.check.parquet import parquet_words
from pipeline.check.stream import Stream, Work
from pipeline.check.tally import GROUPS
from pipeline.checksums import Checksum, algorithm_of, checksum_fault
from pipeline.formats.batch import size_fault
from pipeline.manifest import FileInfo, Manifest, SplitInfo, TableInfo, row_words, unit_of

_KEY_COST, _DENSE_COST, _LABEL_COST = 4.0, 2.0, 6.0
"""Nanoseconds of a value, by which tables are divided among threads."""


@dataclass(slots=True)
class SplitScan:
    """What was found in one split.

    Attributes:
        rows: samples that were read.
        head: labels and dense columns.
        totals: [T, 4] keys, missing, outside their table, unseen.
        groups: [T, GROUPS] look-ups by the groups in which splits are compared (not of the split that counters learn).
        sizes: files that are missing or of another size, which are not read, or of another number of rows.
        unread: files that were not read.
        checksums: files of another sum.
        unsummed: files that the manifest has no sum for.
        keys: keys outside their table.
        weights: weights that are not finite.
        offsets: jagged offsets that are no bag's.
    """

    rows: int
    head: HeadTally
    totals: NDArray[np.int64]
    groups: NDArray[np.int64]
    sizes: Faults = field(default_factory=Faults)
    unread: int = 0
    checksums: Faults = field(default_factory=Faults)
    unsummed: int = 0
    keys: Faults = field(default_factory=Faults)
    weights: Faults = field(default_factory=Faults)
    offsets: Faults = field(default_factory=Faults)


class Scanner:
    """Reads splits of one data set."""

    def __init__(
        self, directory: Path, manifest: Manifest, counters: Counters, stream: Stream, threads: int, *, hashed: bool
    ) -> None:
        """Take over what all splits share.

        Args:
            directory: relative paths start here.
            manifest: of the set.
            counters: of its tables.
            stream: with as many workers as ``threads``.
            threads: that count at once.
            hashed: compare sums.
        """
        self._directory = directory
        self._manifest = manifest
        self._counters = counters
        self._stream = stream
        self._threads = threads
        self._hashed = hashed

    def scan(self, split: SplitInfo, *, learn: bool) -> SplitScan:
        """Read a split.

        Args:
            split: its files.
            learn: whether it is the one that others are compared with.

        Raises:
            DataError: a file cannot be read to its end.
        """
        manifest = self._manifest
        head = HeadTally(manifest)
        parts = self._table_parts(learn) if manifest.layout == "jagged" else self._row_parts(learn)
        found = SplitScan(0, head, np.empty((0, 4), np.int64), np.empty((0, GROUPS), np.int64))
        for file in split.files:
            path = self._directory / file.path
            if not _right_size(path, file, manifest, found.sizes):
                found.unread += 1
                continue
            if manifest.layout == "parquet":
                self._read_parquet(path, file, [head.take, *(part.take for part in parts)], found)
            elif file.part == "rows":
                works: list[Work] = [_nothing]
                if manifest.layout == "raw":
                    works = [self._words(path, part.take) for part in parts]
                works[0] = _both(self._words(path, head.take), works[0])
                self._read(path, file, 4 * row_words(manifest), works, found)
                found.rows += file.rows
            else:
                self._read_part(path, file, split, parts, found)
        for part in parts:
            found.keys.add(part.faults.count, part.faults.first)
            found.weights.add(part.weight_faults.count, part.weight_faults.first)
        found.totals = np.concatenate([part.totals for part in parts])
        found.groups = np.concatenate([part.groups for part in parts])
        return found

    def _row_parts(self, learn: bool) -> list[KeyTally]:
        """Tables of Raw rows, in runs of about equal work; the first has labels and dense columns on its thread too."""
        manifest = self._manifest
        wide = manifest.key_dtype == "int64" or manifest.layout == "parquet"
        tables = manifest.tables
        costs = np.array([_KEY_COST * table.hotness for table in tables])
        head = _LABEL_COST + _DENSE_COST * len(manifest.dense.names)
        ends = head + np.cumsum(costs)
        share = (head + costs.sum()) / self._threads
        lane = np.minimum(((ends - costs / 2) / share).astype(np.int64), self._threads - 1)
        first_word = 1 + len(manifest.dense.names)
        columns = np.cumsum([0, *(table.hotness for table in tables)])
        weights = first_word + int(columns[-1]) * (2 if wide else 1)
        parts = []
        for number in range(self._threads):
            chosen = np.flatnonzero(lane == number)
            start = int(chosen[0]) if chosen.size else 0
            parts.append(
                KeyTally(
                    tables=tables[start : start + chosen.size],
                    first_table=start,
                    word=first_word + int(columns[start]) * (2 if wide else 1),
                    weight_word=weights + int(columns[start]) if manifest.weighted else None,
                    wide=wide,
                    missing_keys=manifest.missing_keys,
                    counters=self._counters,
                    learn=learn,
                )
            )
        return parts

    def _table_parts(self, learn: bool) -> list[KeyTally]:
        """The key files of a jagged split: rows of one key, among which none is missing."""
        wide = self._manifest.key_dtype == "int64"
        return [
            KeyTally([_one_key(table)], number, 0, None, wide, missing_keys=False, counters=self._counters, learn=learn)
            for number, table in enumerate(self._manifest.tables)
        ] or self._row_parts(learn)

    def _read_parquet(
        self, path: Path, file: FileInfo, takes: Sequence[Callable[[Any, Place], None]], found: SplitScan
    ) -> None:
        """Read a file for its sum, and decode it; a value of a column-wise file has no byte of its own."""
        self._read(path, file, 1, [], found)
        rows = 0
        for words in parquet_words(path, self._manifest):
            for take in takes:
                take(words, Place(path, rows, 0))
            rows += len(words)
        found.rows += rows
        if rows != file.rows:
            found.sizes.add(1, f"{path}: {rows} rows, but {file.rows} are listed; adopt the files again")

    def _read_part(
        self, path: Path, file: FileInfo, split: SplitInfo, parts: Sequence[KeyTally], found: SplitScan
    ) -> None:
        """Read offsets, keys or weights of a table of a jagged split."""
        number = next(t for t, table in enumerate(self._manifest.tables) if table.name == file.table)
        table, width = self._manifest.tables[number], np.dtype(self._manifest.key_dtype).itemsize
        if file.part == "keys":
            self._read(path, file, width, [self._words(path, parts[number].take, width // 4, "key")], found)
        elif file.part == "offsets":
            keys = next(other for other in split.files if other.part == "keys" and other.table == file.table)
            bags = BagTally(table, keys.bytes // width, file.rows)
            self._read(path, file, 8, [_values(path, bags.take, np.int64, "offset")], found)
            found.offsets.add(bags.faults.count, bags.faults.first)
        else:
            weights = WeightTally(table)
            self._read(path, file, 4, [_values(path, weights.take, np.float32, "weight")], found)
            found.weights.add(weights.faults.count, weights.faults.first)

    def _read(self, path: Path, file: FileInfo, unit: int, works: Sequence[Work], found: SplitScan) -> None:
        wanted = file.checksum if self._hashed else None
        checksum = Checksum(algorithm_of(wanted)) if wanted else None
        self._stream.read(path, unit, works, checksum)
        if file.checksum is None:
            found.unsummed += 1
        if checksum and wanted and (digest := checksum.text()) != wanted:
            found.checksums.add(1, checksum_fault(path, digest, wanted))

    def _words(
        self, path: Path, take: Callable[[Any, Place], None], words: int | None = None, unit: str = "row"
    ) -> Work:
        count = words or row_words(self._manifest)

        def work(data: Any, first: int) -> None:
            take(data.view(np.int32).reshape(-1, count), Place(path, first, 4 * count, unit))

        return work


def _values(path: Path, take: Callable[[Any, Place], None], dtype: type[np.generic], unit: str) -> Work:
    size = np.dtype(dtype).itemsize

    def work(data: Any, first: int) -> None:
        take(data.view(dtype), Place(path, first, size, unit))

    return work


def _both(one: Work, other: Work) -> Work:
    def work(data: Any, first: int) -> None:
        one(data, first)
        other(data, first)

    return work


def _nothing(data: Any, first: int) -> None:
    """The other tables' part of a file that has none of theirs."""


def _one_key(table: TableInfo) -> TableInfo:
    return replace(table, hotness=1)


def _right_size(path: Path, file: FileInfo, manifest: Manifest, faults: Faults) -> bool:
    try:
        size = path.stat().st_size
    except OSError as error:
        faults.add(1, f"{path}: {error.strerror or error}; restore the file or prepare the data set again")
        return False
    if size != file.bytes:
        faults.add(1, size_fault(path, size, file.bytes, unit_of(manifest, file.part)))
    return size == file.bytes
