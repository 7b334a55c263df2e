"""Criteo's tab-separated rows (label, 13 integers, 26 hexadecimal categories) into a prepared data set.

Two passes over memory-mapped bytes. The first parses every training file, checks each field and counts the
categories; the second parses again and writes rows whose categories are numbered. The rules, which the
manifest repeats:

- A category's number is its place by descending count over the training rows, from 1; equal counts go by
  value, the smaller first. 0 stands for every category seen fewer than ``frequency_threshold`` times in the
  training rows, never included. An empty field is a category like any other, smaller than all values.
- Dense columns become log(1 + max(x, 0)) as float32, 0 where the field is empty (the rule of Naumov et al.,
  "Deep Learning Recommendation Model for Personalization and Recommendation Systems", arXiv 1906.00091).
- Validation and test rows influence no number.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import ConfigError, DataError
from pipeline.etl import criteo_numba as engine
from pipeline.etl.text_blocks import Piece, check_distinct, check_files, pieces
from pipeline.manifest import TableInfo
from pipeline.threads import threads_per_rank
from pipeline.writer import DatasetWriter

PIECE_BYTES = 4 << 20
"""Text parsed at once by one thread: about 17,000 rows, 5 MB of integers and categories."""

DENSE_NAMES = tuple(f"I{number}" for number in range(1, engine.NUM_DENSE + 1))
TABLE_NAMES = tuple(f"C{number}" for number in range(1, engine.NUM_CATEGORICAL + 1))
COLUMN_NAMES = ("label", *DENSE_NAMES, *TABLE_NAMES)

_FIRST_SLOTS = 1 << 10
_SHOWN_CHARACTERS = 40

ProgressCallback = Callable[[str, int, int], None]
"""Called with the phase (``count`` or ``encode``), its bytes done and its bytes in all."""


@dataclass(slots=True)
class ParsedRows:
    """Rows of one piece: labels [rows] int32, integers [rows, 13] and categories [26, rows] int64."""

    labels: Any
    integers: Any
    categories: Any


@dataclass(slots=True)
class Fault:
    """What is wrong in a piece, ``row`` lines from its start."""

    row: int
    clause: str


class Counter:
    """Counts of one column's categories: a growing hash table."""

    def __init__(self) -> None:
        """Start empty."""
        self._keys = np.zeros(_FIRST_SLOTS, np.int64)
        self._counts = np.zeros(_FIRST_SLOTS, np.int64)
        self._used = 0

    def add(self, values: Any) -> None:
        """Count values [n] int64."""
        self._keys, self._counts, self._used = engine.count(values, self._keys, self._counts, self._used)

    def by_frequency(self, threshold: int) -> Any:
        """Values [n] int64 seen at least ``threshold`` times, most frequent first, equal counts by value."""
        kept = self._counts >= threshold
        values, counts = self._keys[kept], self._counts[kept]
        return values[np.lexsort((values, -counts))]


class Vocabulary:
    """Numbers of one column's categories: value i of ``values`` [n] int64 is number i + 1."""

    def __init__(self, values: Any) -> None:
        """Lay the values out in a hash table."""
        slots = max(_FIRST_SLOTS, 1 << math.ceil(math.log2(2 * len(values) + 1)))
        self.rows = len(values) + 1
        self._keys = np.zeros(slots, np.int64)
        self._ids = np.zeros(slots, np.int32)
        engine.fill_ids(values, self._keys, self._ids)

    def encode(self, values: Any, out: Any) -> None:
        """Write the numbers of values [n] int64 into ``out`` [n] int32; 0 for a value without one."""
        engine.encode(values, self._keys, self._ids, out)


def prepare_criteo(
    train: Sequence[Path],
    test: Sequence[Path],
    out: Path,
    *,
    validation: Sequence[Path] = (),
    validation_fraction: float = 0.0,
    frequency_threshold: int = 2,
    name: str = "criteo",
    overwrite: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Prepare Criteo files, plain or ``.gz``; Windows line ends and a missing last one are fine.

    Args:
        train: files of the training rows, in time order.
        test: files of the split ``test``; may be none.
        out: folder of the prepared data set.
        validation: files of the split ``validation``.
        validation_fraction: instead of ``validation``, this last part of the training rows becomes the split
            ``validation``, and categories are counted over the rows before it.
        frequency_threshold: categories seen less often in the training rows share number 0. With 1 every
            training category has a number of its own, and row 0 of a table is never trained.
        name: name of the data set.
        overwrite: replace a data set that is in ``out``.
        threads: parsing threads; ``None``: this process's share of the cores.
        progress: called after each piece.

    Returns:
        ``out``.

    Raises:
        ConfigError: an argument is out of range.
        DataError: a file is missing or empty, or a row is malformed; the message says file, line and column.
    """
    _check_arguments(train, validation, validation_fraction, frequency_threshold)
    inputs = {"train": list(train), "validation": list(validation), "test": list(test)}
    total_bytes = {split: check_files(paths, split) for split, paths in inputs.items()}
    check_distinct(inputs)
    with ThreadPoolExecutor(threads or threads_per_rank(), thread_name_prefix="prepare") as pool:
        counted_rows = _rows_to_count(pool, inputs["train"], validation_fraction)
        on_count = _meter(progress, "count", total_bytes["train"])
        counters = _count_categories(pool, inputs["train"], counted_rows, on_count)
        vocabularies = list(pool.map(lambda one: Vocabulary(one.by_frequency(frequency_threshold)), counters))
        del counters
        on_encode = _meter(progress, "encode", sum(total_bytes.values()))
        encoder = _Encoder(pool, vocabularies, on_encode)
        tables = [
            TableInfo(name=table, rows=vocabulary.rows, frequency_ordered=True)
            for table, vocabulary in zip(TABLE_NAMES, vocabularies, strict=True)
        ]
        with DatasetWriter(out, name=name, dense_names=DENSE_NAMES, tables=tables, overwrite=overwrite) as writer:
            _write_splits(writer, inputs, counted_rows, encoder)
            return writer.finish(
                source="Criteo rows: label, 13 integers, 26 hexadecimal categories, tab-separated",
                notes=_notes(inputs, validation_fraction, frequency_threshold),
            )


def _check_arguments(
    train: Sequence[Path], validation: Sequence[Path], validation_fraction: float, frequency_threshold: int
) -> None:
    if not train:
        raise ConfigError("train files: none; name at least one")
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"validation fraction: {validation_fraction}, but must be at least 0 and below 1")
    if validation and validation_fraction:
        raise ConfigError("validation: both files and a fraction of the training rows; give one of them")
    if frequency_threshold < 1:
        raise ConfigError(f"frequency threshold: {frequency_threshold}, but must be at least 1")


def _meter(progress: ProgressCallback | None, phase: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(phase, done, total)

    return advance


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Any], Any], path: Path, ahead: int
) -> Iterator[tuple[Piece, Any]]:
    """Each piece of a file with its result, in file order, ``ahead`` pieces under way at once."""
    waiting: deque[tuple[Piece, Future[Any]]] = deque()
    for piece in pieces(path, PIECE_BYTES):
        waiting.append((piece, pool.submit(work, piece.text)))
        if len(waiting) > ahead:
            earlier, result = waiting.popleft()
            yield earlier, result.result()
    for earlier, result in waiting:
        yield earlier, result.result()


def _parse(text: Any) -> ParsedRows | Fault:
    rows = engine.count_lines(text)
    parsed = ParsedRows(
        np.empty(rows, np.int32),
        np.empty((rows, engine.NUM_DENSE), np.int64),
        np.empty((engine.NUM_CATEGORICAL, rows), np.int64),
    )
    outcome, row, column, start, end = engine.parse(text, parsed.labels, parsed.integers, parsed.categories)
    if outcome == engine.OK:
        return parsed
    if outcome == engine.TOO_FEW:
        return Fault(row, f"{column} columns, but a row has {engine.NUM_COLUMNS} (label, 13 integers, 26 categories)")
    if outcome == engine.TOO_MANY:
        return Fault(row, f"more than {engine.NUM_COLUMNS} columns (label, 13 integers, 26 categories)")
    found = bytes(text[start:end][:_SHOWN_CHARACTERS]).decode("utf-8", "backslashreplace")
    wanted = {
        engine.BAD_LABEL: "0 or 1",
        engine.BAD_INTEGER: "an integer of at most 18 digits, or empty",
        engine.BAD_HEX: "8 hexadecimal digits, or empty",
    }[outcome]
    return Fault(row, f"column {column + 1} ({COLUMN_NAMES[column]}): {found!r}, but must be {wanted}")


def _raise_fault(path: Path, rows_before: int, fault: Fault) -> None:
    raise DataError(f"{path}: line {rows_before + fault.row + 1}: {fault.clause}")


def _rows_to_count(pool: ThreadPoolExecutor, train: Sequence[Path], validation_fraction: float) -> int | None:
    """Training rows before the validation part; ``None``: all."""
    if not validation_fraction:
        return None
    total: int = sum(lines for path in train for _, lines in _in_order(pool, engine.count_lines, path, ahead=8))
    counted = total - round(total * validation_fraction)
    if not 0 < counted < total:
        raise ConfigError(
            f"validation fraction: {validation_fraction} of {total} training rows leaves {counted} to train on and "
            f"{total - counted} to validate on; both parts need at least one row"
        )
    return counted


def _count_categories(
    pool: ThreadPoolExecutor, paths: Sequence[Path], limit: int | None, advance: Callable[[int], None]
) -> list[Counter]:
    """Count each column's categories over the first ``limit`` rows; rows behind them are only checked."""
    counters = [Counter() for _ in TABLE_NAMES]
    row = 0
    for path in paths:
        first_row = row
        for piece, parsed in _in_order(pool, _parse, path, ahead=4):
            if isinstance(parsed, Fault):
                _raise_fault(path, row - first_row, parsed)
            end = len(parsed.labels) if limit is None else max(0, limit - row)
            columns = [column[:end] for column in parsed.categories]
            list(pool.map(Counter.add, counters, columns))
            row += len(parsed.labels)
            advance(piece.bytes_on_disk)
    return counters


class _Encoder:
    """Second pass: files to encoded rows."""

    def __init__(
        self, pool: ThreadPoolExecutor, vocabularies: Sequence[Vocabulary], advance: Callable[[int], None]
    ) -> None:
        self._pool = pool
        self._vocabularies = vocabularies
        self._advance = advance

    def rows(self, path: Path) -> Iterator[Any]:
        """Raw rows [rows, 40] int32 of each piece of a file, in order.

        Raises:
            DataError: a row is malformed.
        """
        row = 0
        for piece, words in _in_order(self._pool, self._encode, path, ahead=4):
            if isinstance(words, Fault):
                _raise_fault(path, row, words)
            row += len(words)
            self._advance(piece.bytes_on_disk)
            yield words

    def _encode(self, text: Any) -> Any:
        parsed = _parse(text)
        if isinstance(parsed, Fault):
            return parsed
        words = np.empty((len(parsed.labels), engine.NUM_COLUMNS), np.int32)
        words[:, 0] = parsed.labels
        engine.transform_dense(parsed.integers, words[:, 1 : 1 + engine.NUM_DENSE].view(np.float32))
        for column, vocabulary in enumerate(self._vocabularies):
            vocabulary.encode(parsed.categories[column], words[:, 1 + engine.NUM_DENSE + column])
        return words


def _write_splits(
    writer: DatasetWriter, inputs: dict[str, list[Path]], counted_rows: int | None, encoder: _Encoder
) -> None:
    row = 0
    for path in inputs["train"]:
        for words in encoder.rows(path):
            counted = len(words) if counted_rows is None else min(len(words), max(0, counted_rows - row))
            if counted:
                writer.write_rows("train", words[:counted])
            if counted < len(words):
                writer.write_rows("validation", words[counted:])
            row += len(words)
    for split in ("validation", "test"):
        for path in inputs[split]:
            for words in encoder.rows(path):
                writer.write_rows(split, words)


def _notes(inputs: dict[str, list[Path]], validation_fraction: float, frequency_threshold: int) -> tuple[str, ...]:
    notes = [f"{split}: {', '.join(path.name for path in paths)}" for split, paths in inputs.items() if paths]
    if validation_fraction:
        notes.append(f"validation: the last {validation_fraction:g} of the training rows; the rest is counted")
    rare = f"seen fewer than {frequency_threshold} times" if frequency_threshold > 1 else "never seen"
    notes += [
        "dense: log(1 + max(x, 0)) as float32; 0 where missing",
        "categories: numbered from 1 by descending count over the training rows, equal counts by value",
        f"category 0: {rare} in the training rows",
        "a missing category is a value like any other",
    ]
    return tuple(notes)
