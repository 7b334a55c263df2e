"""Text files as pieces of whole lines, plain or gzip-compressed."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DataError

_NEWLINE = ord("\n")
_WINDOW = 1 << 12
_DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error)


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole lines of one file.

    Attributes:
        text: [bytes] uint8; the file's last piece may lack its line end.
        bytes_on_disk: how much of the file it takes there.
    """

    text: Any
    bytes_on_disk: int


def check_files(paths: Sequence[Path], role: str) -> int:
    """The bytes of all files together.

    Raises:
        DataError: one is missing, no file or empty.
    """
    total = 0
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{role} file {path}: {'not a file' if path.exists() else 'no such file'}; name an existing one"
            )
        size = path.stat().st_size
        if size == 0:
            raise DataError(f"{role} file {path}: empty; a file needs at least one row")
        total += size
    return total


def check_distinct(inputs: Mapping[str, Iterable[Path]]) -> None:
    """Refuse a file that is named twice: a test row among the training rows would falsify every metric.

    Args:
        inputs: files of each split.

    Raises:
        DataError: two names lead to the same file.
    """
    seen: dict[Path, str] = {}
    for split, paths in inputs.items():
        for path in paths:
            if (earlier := seen.get(path.resolve())) is not None:
                raise DataError(f"{path}: named for {earlier} and again for {split}; name each file once")
            seen[path.resolve()] = split


def line_start(file: int, offset: int) -> int:
    """The first place at or behind ``offset`` where a line of an open plain file starts, or the file's end."""
    if offset == 0:
        return 0
    place = offset - 1
    while block := os.pread(file, _WINDOW, place):
        found = block.find(b"\n")
        if found >= 0:
            return place + found + 1
        place += len(block)
    return place


def pieces(path: Path, piece_bytes: int, start: int = 0, stop: int | None = None) -> Iterator[Piece]:
    """Cut the lines that start in ``start .. stop`` into pieces of about ``piece_bytes`` uncompressed bytes, in order.

    Bytes are read, not mapped: mapped pages would count as this process's memory, and a file that is cut short
    meanwhile would end it.

    Args:
        path: plain, or ``.gz``, which is always cut whole.
        piece_bytes: of a piece.
        start: first byte.
        stop: last byte + 1; ``None``: to the end.

    Raises:
        DataError: the file cannot be read, or is damaged gzip, whose whole lines come first.
    """
    try:
        if path.suffix == ".gz":
            yield from _packed_pieces(path, piece_bytes)
        else:
            yield from _plain_pieces(path, piece_bytes, start, stop)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _plain_pieces(path: Path, piece_bytes: int, start: int, stop: int | None) -> Iterator[Piece]:
    with path.open("rb", buffering=0) as file:
        handle = file.fileno()
        place = line_start(handle, start)
        end = os.fstat(handle).st_size if stop is None else line_start(handle, stop)
        while place < end:
            wanted = min(piece_bytes, end - place)
            text = np.empty(wanted, np.uint8)
            read = os.preadv(handle, [text.data], place)
            if read < wanted and place + read < end:
                if read == 0:
                    raise OSError(0, f"became shorter while it was read, behind byte {place}")
                wanted = read
            keep = wanted if place + wanted == end else _whole_lines(text[:wanted])
            if keep == 0:  # a line longer than a piece
                keep = line_start(handle, place + wanted) - place
                text = np.empty(keep, np.uint8)
                if os.preadv(handle, [text.data], place) < keep:
                    raise OSError(0, f"became shorter while it was read, behind byte {place}")
            yield Piece(text[:keep], keep)
            place += keep


def _whole_lines(text: Any) -> int:
    """Bytes up to behind the last line end; 0 without one."""
    size = len(text)
    while size > 0:
        found = np.flatnonzero(text[max(0, size - _WINDOW) : size] == _NEWLINE)
        if len(found):
            return max(0, size - _WINDOW) + int(found[-1]) + 1
        size -= _WINDOW
    return 0


def _packed_pieces(path: Path, piece_bytes: int) -> Iterator[Piece]:
    text, read_before, lines, length = bytearray(), 0, 0, 0
    damage: Exception | None = None
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as file:
        while True:
            try:
                block = file.read1(piece_bytes)  # hands out all that was unpacked before damage shows
            except _DAMAGE as error:
                block, damage = b"", error
            text += block
            if block and len(text) < piece_bytes:
                continue
            ended = not block and damage is None
            if end := len(text) if ended else text.rfind(b"\n") + 1:
                whole, read = bytes(text[:end]), packed.tell()
                yield Piece(np.frombuffer(whole, dtype=np.uint8), read - read_before)
                del text[:end]
                read_before, lines, length = read, lines + whole.count(b"\n"), length + end
            if not block:
                break
    if damage is not None:
        raise DataError(
            f"{path}: damaged or truncated gzip ({damage}) after {lines} whole lines ({length} bytes of text); get the "
            "file again"
        )
