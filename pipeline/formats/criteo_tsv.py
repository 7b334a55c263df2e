"""Criteo's tab-separated rows: label, 13 integers, 26 categories of 8 hexadecimal digits; empty = missing.

Published with the Kaggle display advertising challenge and the 1 TB click logs. The categories are hashes of 32
bits: as keys they make tables of 2^32 rows, which hold every value but are nothing to train on (``crosslane prepare
criteo`` numbers them).

Shapes: B rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import DataError
from pipeline.etl import criteo_text as layout
from pipeline.etl import criteo_text_numba as parser
from pipeline.etl.text_blocks import check_files, pieces
from pipeline.formats import criteo_tsv_numba
from pipeline.formats.block import (
    MISSING_COUNT,
    Block,
    DenseKind,
    Schema,
    check_block,
    make_block,
    read_sidecar,
    write_sidecar,
)
from pipeline.formats.interchange import Fit, Loss, ReadOptions, WriteOptions, cannot_hold
from pipeline.formats.names import day_order, split_name
from pipeline.manifest import TableInfo
from pipeline.threads import threads_per_rank

NUM_DENSE, NUM_TABLES = layout.NUM_DENSE, layout.NUM_CATEGORICAL
_COLUMNS = ("label", *(f"I{n + 1}" for n in range(NUM_DENSE)), *(f"C{t + 1}" for t in range(NUM_TABLES)))
_TABLE_ROWS = 2**32
_PIECE_BYTES = 4 << 20
_LONGEST_LINE = 2 + NUM_DENSE * 12 + NUM_TABLES * 9  # "-2147483648" and 8 digits, each with what ends it
_SUFFIXES = {".tsv", ".txt", ".gz", ""}
_DETECTED_BYTES = 4096
_SHOWN_BYTES = 40
_TAB, _NEWLINE = ord("\t"), ord("\n")


@dataclass(frozen=True, slots=True)
class _Fault:
    """What is wrong in a piece: ``row`` lines and ``byte`` bytes from its start."""

    row: int
    byte: int
    clause: str


class CriteoSource:
    """TSV files of each split, in order."""

    def __init__(self, files: dict[str, list[Path]], folder: Path, options: ReadOptions) -> None:
        """Count the lines of plain files; compressed ones are not read twice for that."""
        self._files = files
        self.splits = {split: _count_lines(paths) for split, paths in files.items()}
        known = read_sidecar(folder, NUM_DENSE, NUM_TABLES, options.table_rows)
        self.schema = known or Schema(
            name=folder.resolve().name or "criteo",
            dense_names=_COLUMNS[1 : 1 + NUM_DENSE],
            dense="int32",
            tables=tuple(
                TableInfo(name=name, rows=rows)
                for name, rows in zip(_COLUMNS[1 + NUM_DENSE :], _told(options.table_rows), strict=True)
            ),
            missing_keys=True,
            key_dtype="int64",
            source="Criteo rows: label, 13 integers, 26 hexadecimal categories, tab-separated",
            notes=("categories are 32-bit values as they stand, not numbered",),
        )

    def blocks(self, split: str) -> Iterator[Block]:
        """The rows of a split in order."""
        threads = threads_per_rank()
        with ThreadPoolExecutor(threads, thread_name_prefix="tsv") as pool:
            for path in self._files[split]:
                row = byte = 0
                waiting: deque[tuple[Any, Future[Block | _Fault]]] = deque()
                for text in _texts(path):
                    if text is not None:
                        waiting.append((text, pool.submit(_parse, text)))
                    while waiting and (text is None or len(waiting) > threads):
                        done, future = waiting.popleft()
                        yield (block := self._done(_Place(path, done, row, byte), future))
                        row, byte = row + block.rows, byte + len(done)

    def _done(self, place: _Place, future: Future[Block | _Fault]) -> Block:
        result = future.result()
        if isinstance(result, _Fault):
            raise DataError(f"{place.at(result.row, result.byte)}: {result.clause}")
        return check_block(result, self.schema, place.of_value)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a piece of text lies: ``row`` lines and ``byte`` bytes (unpacked) from its file's start."""

    path: Path
    text: Any
    row: int
    byte: int

    def at(self, row: int, byte: int) -> str:
        return f"{self.path}: row {self.row + row} (byte {self.byte + byte})"

    def of_value(self, row: int, kind: str, column: int) -> str:
        """Place of a value of a block, for messages."""
        field = column + {"label": 0, "dense": 1}.get(kind, 1 + NUM_DENSE)
        return self.at(row, _field_start(self.text, row, field))


def _field_start(text: Any, row: int, field: int) -> int:
    """Byte at which a field of a line starts."""
    start = int(np.flatnonzero(text == _NEWLINE)[row - 1]) + 1 if row else 0
    return start + int(np.flatnonzero(text[start:] == _TAB)[field - 1]) + 1 if field else start


def _texts(path: Path) -> Iterator[Any]:
    """Pieces of a file, and ``None`` when what came so far is to be looked at: at the end, or before an error."""
    try:
        for piece in pieces(path, _PIECE_BYTES):
            yield piece.text
    except DataError:
        yield None
        raise
    yield None


def _told(rows: tuple[int, ...] | None) -> tuple[int, ...]:
    """Rows of each table; every value of 32 bits where none are told."""
    if rows is not None and len(rows) != NUM_TABLES:
        raise DataError(f"--rows: {len(rows)} numbers for {NUM_TABLES} tables; give one each")
    return rows or (_TABLE_ROWS,) * NUM_TABLES


def _parse(text: Any) -> Block | _Fault:
    rows = parser.count_lines(text)
    labels = np.empty(rows, np.int32)
    integers = np.empty((rows, NUM_DENSE), np.int64)
    categories = np.empty((NUM_TABLES, rows), np.int64)
    outcome, row, column, start, end = parser.parse(text, 0, labels, integers, categories)
    if outcome != layout.OK:
        return _Fault(row, start, _clause(outcome, column, bytes(text[start:end][:_SHOWN_BYTES])))
    missing = integers == layout.MISSING_INTEGER
    wide = ~missing & ((integers <= MISSING_COUNT) | (integers >= 2**31))
    if wide.any():
        row, column = (int(place) for place in np.argwhere(wide)[0])
        value = integers[row, column]
        at = _field_start(text, row, 1 + column)
        return _Fault(row, at, f"column {_COLUMNS[1 + column]}: {value} does not fit 32 bits; correct the row")
    integers[missing] = MISSING_COUNT
    return make_block(labels, integers, categories.T)


def _clause(outcome: int, column: int, found: bytes) -> str:
    if outcome in (layout.TOO_FEW, layout.TOO_MANY):
        count = f"{column}" if outcome == layout.TOO_FEW else f"more than {len(_COLUMNS)}"
        return f"{count} columns, but a row has {len(_COLUMNS)} (label, 13 integers, 26 categories)"
    wanted = {
        layout.BAD_LABEL: "0 or 1",
        layout.BAD_INTEGER: "an integer of at most 18 digits, or empty",
        layout.BAD_HEX: "8 hexadecimal digits, or empty",
    }[outcome]
    shown = found.decode("utf-8", "backslashreplace")
    return f"column {column + 1} ({_COLUMNS[column]}): {shown!r}, but must be {wanted}"


def _count_lines(paths: Sequence[Path]) -> int:
    """Lines of plain files; 0 (not known) where one is compressed."""
    if any(path.suffix == ".gz" for path in paths):
        return 0
    return sum(parser.count_lines(piece.text) for path in paths for piece in pieces(path, _PIECE_BYTES))


def format_rows(labels: Any, counts: Any, keys: Any, out: Any) -> int:
    """Write rows as text; reference of the compiled function.

    Args:
        labels: [B] int32.
        counts: [B, 13] int32; the least of all is missing.
        keys: [B, 26] int64, below 2^32; -1 is missing.
        out: [bytes] uint8, long enough.

    Returns:
        Bytes written.
    """
    lines = [
        "\t".join(
            [
                str(label),
                *("" if count == MISSING_COUNT else str(count) for count in row),
                *("" if key < 0 else format(key, "08x") for key in row_keys),
            ]
        )
        + "\n"
        for label, row, row_keys in zip(labels.tolist(), counts.tolist(), keys.tolist(), strict=True)
    ]
    text = np.frombuffer("".join(lines).encode(), np.uint8)
    out[: text.size] = text
    return int(text.size)


class CriteoSink:
    """One text file a split."""

    def __init__(self, directory: Path, schema: Schema) -> None:
        """Files are made by the first row of a split."""
        self._directory = directory
        self._schema = schema
        self._files: dict[str, BinaryIO] = {}
        self._text: NDArray[np.uint8] = np.empty(0, np.uint8)

    def write(self, split: str, block: Block) -> None:
        """Append rows."""
        if split not in self._files:
            self._files[split] = (self._directory / f"{split}.tsv").open("wb")
        if self._text.size < block.rows * _LONGEST_LINE:
            self._text = np.empty(block.rows * _LONGEST_LINE, np.uint8)
        size = criteo_tsv_numba.format_rows(block.labels, block.dense, block.keys, self._text)
        self._files[split].write(self._text[:size].data)

    def finish(self) -> None:
        """Write what text has no place for."""
        self.close()
        write_sidecar(self._directory, self._schema)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


class CriteoTsv:
    """The format."""

    name = "criteo-tsv"

    def detect(self, path: Path) -> bool:
        """Text files whose first line has 40 columns."""
        try:
            return all(_first_line(file).count(b"\t") == len(_COLUMNS) - 1 for file in _files(path)) and bool(
                _files(path)
            )
        except (OSError, DataError):
            return False

    def read(self, path: Path, options: ReadOptions) -> CriteoSource:
        """Open a file, or a folder of ``day_0`` ... (all of them ``train``) or ``<split>.tsv``."""
        files: dict[str, list[Path]] = {}
        for file in _files(path):
            split = (
                "train" if path.is_file() or day_order(file.name) is not None else split_name(file.name.split(".")[0])
            )
            files.setdefault(split, []).append(file)
        if not files:
            raise DataError(f"{path}: no file day_*, *.tsv or *.txt (also .gz) in it; name one")
        for split, paths in files.items():
            check_files(paths, split)
        return CriteoSource(files, path if path.is_dir() else path.parent, options)

    def fit(self, schema: Schema, options: WriteOptions) -> Fit:  # noqa: ARG002 - has no options
        """Counts in 13 columns, one key below 2^32 in each of 26."""
        if not schema.counts:
            cannot_hold(self.name, "float dense columns, only integers", "choose another format")
        if (len(schema.dense_names), len(schema.tables)) != (NUM_DENSE, NUM_TABLES):
            cannot_hold(
                self.name,
                f"{len(schema.dense_names)} dense columns and {len(schema.tables)} tables, only 13 and 26",
                "choose another format",
            )
        for table in schema.tables:
            if table.hotness > 1 or table.rows > _TABLE_ROWS:
                cannot_hold(
                    self.name,
                    f"table {table.name!r} of {table.rows} rows and {table.hotness} keys, only one of 32 bits",
                    "choose another format",
                )
        lost: frozenset[Loss] = frozenset({"weights"} if schema.weighted else ())
        dense: DenseKind = "int32"
        return Fit(replace(schema, dense=dense, weighted=False, missing_keys=True, offset_keys=False), lost)

    def write(self, directory: Path, schema: Schema, options: WriteOptions) -> CriteoSink:  # noqa: ARG002
        """Start writing."""
        return CriteoSink(directory, schema)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
    named = [file for file in found if file.suffix in _SUFFIXES and (file.suffix or day_order(file.name) is not None)]
    return sorted(named, key=lambda file: (day_order(file.name) or 0, file.name))


def _first_line(path: Path) -> bytes:
    for piece in pieces(path, _DETECTED_BYTES):
        return bytes(piece.text[:_DETECTED_BYTES]).split(b"\n")[0]
    return b""


CRITEO_TSV = CriteoTsv()
