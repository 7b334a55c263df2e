"""What one split's columns hold: labels, dense columns and keys, counted chunk by chunk.

Each class counts columns of its own and is called from one thread at a time, so that several share the work on a file.

Shapes: B rows of a chunk, V 32-bit words a row, N dense columns, T tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.check import tally_numba
from pipeline.check.counters import Counters
from pipeline.check.tally import GROUPS, OUTSIDE, VALUE_BINS
from pipeline.formats.block import reversed_hint
from pipeline.formats.raw import LABEL_ONE, label_fault
from pipeline.manifest import Manifest, TableInfo

Words = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the units of a chunk lie.

    Attributes:
        path: the file.
        first: number of the chunk's first unit in the file.
        unit_bytes: of one; 0: they do not lie one behind the other.
        unit: what one is.
    """

    path: Path
    first: int
    unit_bytes: int
    unit: str = "row"

    def at(self, unit: int, byte: int) -> str:
        """File, row and byte for a message."""
        row = self.first + unit
        place = f" (byte {row * self.unit_bytes + byte})" if self.unit_bytes else ""
        return f"{self.path}: {self.unit} {row}{place}"


@dataclass(slots=True)
class Faults:
    """How many values are wrong, and a sentence about the first."""

    first: str = ""
    count: int = 0

    def add(self, count: int, sentence: str) -> None:
        """Take some in; the sentence stays if it is the first."""
        if count and not self.count:
            self.first = sentence
        self.count += count


@dataclass(slots=True)
class HeadTally:
    """Labels and dense columns of a split.

    Attributes:
        labels: [3] rows with label 0, 1, another.
        bins: [N, VALUE_BINS] values of each dense column.
        moments: [N, 2] sum and sum of squares.
        extremes: [N, 2] least and largest value.
        label_faults: labels that are neither 0 nor 1.
        dense_faults: values that are NaN or infinite.
    """

    manifest: Manifest
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))
    bins: NDArray[np.int64] = field(init=False)
    moments: NDArray[np.float64] = field(init=False)
    extremes: NDArray[np.float32] = field(init=False)
    label_faults: Faults = field(default_factory=Faults)
    dense_faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        """Start at nothing."""
        count = len(self.manifest.dense.names)
        self.bins = np.zeros((count, VALUE_BINS), np.int64)
        self.moments = np.zeros((count, 2))
        self.extremes = np.tile(np.array([np.inf, -np.inf], np.float32), (count, 1))

    def take(self, words: Words, place: Place) -> None:
        """Count the rows [B, V] of a chunk."""
        dtype = self.manifest.label_dtype
        before = int(self.labels[2])
        row = int(tally_numba.tally_labels(words[:, 0], LABEL_ONE[dtype], self.labels))
        if row >= 0:
            sentence = f"{place.at(row, 0)}: {label_fault(int(words[row, 0]), dtype)}"
            self.label_faults.add(int(self.labels[2]) - before, sentence)
        names = self.manifest.dense.names
        if not names:
            return
        stored = words[:, 1 : 1 + len(names)]
        values = stored.view(np.float32)
        if self.manifest.dense.dtype == "int32":
            values = stored.astype(np.float32)
            stored = values.view(np.int32)
        row, column = tally_numba.tally_dense(values, stored, self.bins, self.moments, self.extremes)
        if row >= 0:
            self.dense_faults.add(
                int(np.count_nonzero(~np.isfinite(values))),
                f"{place.at(row, 4 + 4 * column)}: dense column {names[column]!r} is {values[row, column]}; it must be "
                "finite, so fill or clip it in preparation",
            )


@dataclass(slots=True)
class KeyTally:
    """Keys (and weights) of some tables that lie in the same rows.

    Attributes:
        tables: which.
        first_table: number of the first of them.
        word: word of the first key column of the first of them.
        weight_word: word of its weight; ``None``: there are none.
        wide: keys are int64.
        missing_keys: whether -1 may stand in a table of one key column.
        counters: of all tables.
        learn: whether these are the rows that the others are compared with.
        totals: [T, 4] keys, missing, outside their table, unseen.
        groups: [T, GROUPS].
        faults: keys outside their table.
        weight_faults: weights that are not finite.
    """

    tables: Sequence[TableInfo]
    first_table: int
    word: int
    weight_word: int | None
    wide: bool
    missing_keys: bool
    counters: Counters
    learn: bool
    totals: NDArray[np.int64] = field(init=False)
    groups: NDArray[np.int64] = field(init=False)
    faults: Faults = field(default_factory=Faults)
    weight_faults: Faults = field(default_factory=Faults)
    _columns: NDArray[np.int64] = field(init=False)
    _carried: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        """Start at nothing."""
        self._columns = np.cumsum([0, *(table.hotness for table in self.tables)], dtype=np.int64)
        self.totals = np.zeros((len(self.tables), 4), np.int64)
        self.groups = np.zeros((len(self.tables), GROUPS), np.int64)

    def take(self, words: Words, place: Place) -> None:
        """Count the rows [B, V] of a chunk."""
        part = slice(self.first_table, self.first_table + len(self.tables))
        if self._carried.size < words.shape[0] * int(self._columns[-1]):
            self._carried = np.empty(words.shape[0] * int(self._columns[-1]), np.int64)
        before = int(self.totals[:, OUTSIDE].sum())
        row, column, full = tally_numba.tally_keys(
            words,
            self.word,
            self.wide,
            self._columns,
            self.counters.table_rows[part],
            self.missing_keys,
            self.counters.starts[part],
            self.counters.shifts[part],
            self.learn,
            self.counters.values,
            self.totals,
            self.groups,
            self._carried,
        )
        self.counters.carry(self._carried[:full])
        if row >= 0:
            self.faults.add(int(self.totals[:, OUTSIDE].sum()) - before, self._sentence(words, row, column, place))
        if self.weight_word is not None:
            self._take_weights(words, place, self.weight_word)

    def _take_weights(self, words: Words, place: Place, weight: int) -> None:
        wrong = np.zeros(len(self.tables), np.int64)
        row, column = tally_numba.tally_weights(words, self.word, self.wide, self._columns, weight, wrong)
        if row >= 0:
            self.weight_faults.add(
                int(wrong.sum()),
                f"{place.at(row, 4 * (weight + column))}: a weight of table {self._table(column).name!r} is "
                f"{words[row, weight + column : weight + column + 1].view(np.float32)[0]}; it must be finite",
            )

    def _table(self, column: int) -> TableInfo:
        return self.tables[int(np.searchsorted(self._columns, column, side="right")) - 1]

    def _sentence(self, words: Words, row: int, column: int, place: Place) -> str:
        table, word = self._table(column), self.word + column * (2 if self.wide else 1)
        stored: Any = words[row, word : word + 2].copy().view(np.int64) if self.wide else words[row, word : word + 1]
        key, width = int(stored[0]), 8 if self.wide else 4
        if key == -1:
            return (
                f"{place.at(row, 4 * word)}: table {table.name!r} has no key (-1), but the data set says that no key "
                "is missing; set missing_keys to true in dataset.json"
            )
        hint = reversed_hint(key, width, table.rows - 1)
        return (
            f"{place.at(row, 4 * word)}: key {key} of table {table.name!r} lies outside its rows 0 .. "
            f"{table.rows - 1}; correct the row or the table's rows in dataset.json{hint}"
        )


@dataclass(slots=True)
class BagTally:
    """Offsets of one table of a jagged split.

    Attributes:
        table: whose.
        keys: how many keys there are.
        rows: of the split.
        faults: offsets that are no bag's.
    """

    table: TableInfo
    keys: int
    rows: int
    faults: Faults = field(default_factory=Faults)
    _last: int = 0

    def take(self, offsets: NDArray[np.int64], place: Place) -> None:
        """Check the offsets [B] of a chunk."""
        before = np.concatenate([[self._last], offsets[:-1]])
        if place.first == 0:
            before[0] = offsets[0]
        lengths = offsets - before
        wrong = (lengths < 0) | (lengths > self.table.hotness) | (offsets < 0) | (offsets > self.keys)
        if place.first == 0:
            wrong[0] = offsets[0] != 0
        if place.first + offsets.size == self.rows + 1:
            wrong[-1] |= offsets[-1] != self.keys
        if wrong.any():
            at = int(np.argmax(wrong))
            self.faults.add(
                int(np.count_nonzero(wrong)),
                f"{place.at(at, 0)}: offset {offsets[at]} of table {self.table.name!r} after {before[at]} ends no bag "
                f"of at most {self.table.hotness} among {self.keys} keys (the first is 0, none falls, the last is "
                f"{self.keys}); prepare the data set again{reversed_hint(int(offsets[at]), 8, self.keys)}",
            )
        self._last = int(offsets[-1])


@dataclass(slots=True)
class WeightTally:
    """Weights of one table of a jagged split.

    Attributes:
        table: whose.
        faults: weights that are not finite.
    """

    table: TableInfo
    faults: Faults = field(default_factory=Faults)

    def take(self, weights: NDArray[np.float32], place: Place) -> None:
        """Check the weights [B] of a chunk."""
        wrong = ~np.isfinite(weights)
        if wrong.any():
            at = int(np.argmax(wrong))
            sentence = f"a weight of table {self.table.name!r} is {weights[at]}; it must be finite"
            self.faults.add(int(np.count_nonzero(wrong)), f"{place.at(at, 0)}: {sentence}")
