"""Text files as pieces of whole lines, plain (memory-mapped) or gzip-compressed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DataError

_NEWLINE = ord("\n")
_WINDOW = 1 << 12


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


def pieces(path: Path, piece_bytes: int) -> Iterator[Piece]:
    """Cut a file into pieces of about ``piece_bytes`` uncompressed bytes, in order.

    Raises:
        DataError: the file cannot be read, or is damaged gzip.
    """
    try:
        yield from _packed_pieces(path, piece_bytes) if path.suffix == ".gz" else _plain_pieces(path, piece_bytes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or truncated gzip ({error}); get the file again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _plain_pieces(path: Path, piece_bytes: int) -> Iterator[Piece]:
    text = np.memmap(path, dtype=np.uint8, mode="r")
    start = 0
    while start < len(text):
        end = _line_end(text, min(start + piece_bytes, len(text)))
        yield Piece(np.asarray(text[start:end]), end - start)
        start = end


def _line_end(text: Any, place: int) -> int:
    """The first place after a line end at or behind ``place``, or the end of the text."""
    while place < len(text):
        found = np.flatnonzero(text[place : place + _WINDOW] == _NEWLINE)
        if len(found):
            return place + int(found[0]) + 1
        place += _WINDOW
    return len(text)


def _packed_pieces(path: Path, piece_bytes: int) -> Iterator[Piece]:
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as file:
        read_before = 0
        while block := file.read(piece_bytes):
            text = block + file.readline()
            read = packed.tell()
            yield Piece(np.frombuffer(text, dtype=np.uint8), read - read_before)
            read_before = read
