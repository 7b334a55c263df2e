"""What to say about Parquet files that cannot be read: file, row, row group, column and byte.

A file is ``PAR1``, pages, footer, length of the footer (4 bytes, little-endian), ``PAR1`` (the parquet-format
specification, "File format"). Where pyarrow is installed, it tells which column of which row group is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrm.errors import DataError

_MAGIC = b"PAR1"
_LEAST = 12
_TAIL = 8
_SEARCHED = 1 << 16
"""Bytes at the end in which the end of a file that is too long is looked for."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A column of a row group: where it lies, and what reading it raises."""

    group: int
    first: int
    column: str
    byte: int
    error: Exception


def check_ends(path: Path) -> None:
    """Refuse a file that does not begin and end as Parquet files do, which libraries say less clearly or overlook.

    Raises:
        DataError: it cannot be opened, is truncated, oversized, or something else.
    """
    try:
        fault = _fault_of_ends(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; restore it") from None
    if fault:
        raise DataError(f"{path}: {fault}")


def file_fault(path: Path, error: BaseException) -> DataError:
    """What to raise where a library cannot read the footer of a file whose ends are right.

    Args:
        path: the file.
        error: what the library raised.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - _TAIL)
        start = size - _TAIL - _footer_bytes(file.read())
    return DataError(f"{path}: footer (from byte {start}): cannot be read ({first_line(error)}); restore the file")


def rows_fault(path: Path, first: int, stop: int, error: BaseException) -> DataError:
    """What to raise where a library cannot read rows ``first .. stop`` of a file.

    Args:
        path: the file.
        first: row.
        stop: row behind the last.
        error: what the library raised.
    """
    found = next(_damage(path, first, stop), None)
    if found is None:
        place, reason = f"one of rows {first} .. {stop - 1}", first_line(error)
    else:
        place = f"row {found.first} (row group {found.group}, column {found.column!r}, from byte {found.byte})"
        reason = first_line(found.error)
    return DataError(f"{path}: {place}: cannot be read ({reason}); restore the file")


def first_line(error: BaseException) -> str:
    """A library's words on one line, shortened."""
    return " ".join(str(error).split())[:200]


def _fault_of_ends(path: Path) -> str:
    """What is wrong; nothing where nothing is."""
    size = path.stat().st_size
    if size < _LEAST:
        return f"truncated, {size} bytes are no Parquet file, which has at least {_LEAST}; copy it again"
    with path.open("rb") as file:
        head = file.read(len(_MAGIC))
        file.seek(size - _TAIL)
        tail = file.read()
    if head != _MAGIC:
        return f"bad header (byte 0): {head!r}, but a Parquet file starts with {_MAGIC!r}; restore the file"
    if tail[-4:] != _MAGIC:
        if (stop := _earlier_end(path, size)) is not None:
            return f"oversized, {size} bytes where its footer ends at byte {stop}; copy the file again"
        return (
            f"truncated at byte {size}: it ends with {tail[-4:]!r}, but a Parquet file ends with {_MAGIC!r}; copy the "
            "file again"
        )
    footer, room = _footer_bytes(tail), size - _LEAST
    if footer <= room:
        return ""
    hint = ""
    if int.from_bytes(tail[:4], "big") <= room:
        hint = " (with its bytes reversed it would fit: it must be little-endian)"
    return (
        f"bad footer length (byte {size - _TAIL}): {footer} bytes, but only {room} come before it{hint}; restore the "
        "file"
    )


def _earlier_end(path: Path, size: int) -> int | None:
    """Where a file that goes on behind its footer should have ended."""
    start = max(0, size - _SEARCHED)
    with path.open("rb") as file:
        file.seek(start)
        end = file.read()
    behind = end.rfind(_MAGIC) + len(_MAGIC)
    stop = start + behind
    whole = behind >= _TAIL and stop >= _LEAST and _footer_bytes(end[behind - _TAIL : behind]) <= stop - _LEAST
    return stop if whole else None


def _footer_bytes(tail: bytes) -> int:
    """Length of a footer, by the last bytes of a file."""
    return int.from_bytes(tail[:4], "little")


def _damage(path: Path, first: int, stop: int) -> Iterator[_Chunk]:
    """Columns of row groups among rows ``first .. stop`` that cannot be read, as far as pyarrow finds any."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        return
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            start = 0
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                if start < stop and start + group.num_rows > first:
                    yield from _of_group(file, number, start)
                start += group.num_rows
    except (OSError, ValueError):
        return


def _of_group(file: Any, number: int, first: int) -> Iterator[_Chunk]:
    for place in range(len(file.schema)):
        name = file.schema.column(place).path
        try:
            file.read_row_group(number, columns=[name], use_threads=False)
        except (OSError, ValueError) as error:
            if "histogram" in str(error):
                raise  # of sizes in the footer: pyarrow would end the process if it were asked for the column's place
            chunk = file.metadata.row_group(number).column(place)
            byte = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
            yield _Chunk(number, first, name.partition(".")[0], byte, error)
