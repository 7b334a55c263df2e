"""Input files as chunks: the unit that ranks share out, that marks name, and that a shard holds the rows of.

Chunks depend on the files alone, never on ranks, threads or memory, so neither does anything that is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import numpy as np

from dlrm.errors import DataError
from pipeline.etl import criteo_text_numba as engine
from pipeline.etl.criteo_text import Fault
from pipeline.etl.text_blocks import Piece, pieces

Role = Literal["train", "validation", "test", "last_day"]
"""What a file was given for; the first half of the last day is 'test', the second 'validation'."""

PIECE_BYTES = 2 << 20
"""Text parsed at once by one thread: about 8,000 rows, 2.5 MB of integers and categories."""
SMALLEST_CHUNK = 16 << 20
LARGEST_CHUNK = 1 << 30
_CHUNKS = 64

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The lines of a file that start in ``start .. stop``; a gzip file is one chunk.

    Attributes:
        number: among all chunks of the job.
        role: of its file.
        path: of its file.
        start: first byte.
        stop: last byte + 1.
    """

    number: int
    role: Role
    path: Path
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """How much of the file it takes on disk."""
        return self.stop - self.start


def cut_files(inputs: Mapping[Role, Sequence[Path]]) -> list[Chunk]:
    """All chunks in the order of roles, files and bytes."""
    total = sum(path.stat().st_size for paths in inputs.values() for path in paths)
    size = min(max(total // _CHUNKS, SMALLEST_CHUNK), LARGEST_CHUNK)
    chunks: list[Chunk] = []
    for role, paths in inputs.items():
        for path in paths:
            length = path.stat().st_size
            step = length if path.suffix == ".gz" else size
            for start in range(0, length, step):
                chunks.append(Chunk(len(chunks), role, path, start, min(start + step, length)))
    return chunks


def share_of_rank(chunks: Sequence[Chunk], rank: int, ranks: int) -> list[Chunk]:
    """The chunks of one rank: one range of bytes of all that is to be done."""
    total = sum(chunk.bytes for chunk in chunks)
    own, before = [], 0
    for chunk in chunks:
        middle = before + chunk.bytes // 2
        if middle * ranks // max(total, 1) == rank:
            own.append(chunk)
        before += chunk.bytes
    return own


@dataclass(frozen=True, slots=True)
class ChunkPiece:
    """Whole lines of a chunk; ``last`` marks the chunk's last piece, which may be empty."""

    chunk: Chunk
    piece: Piece
    last: bool


def chunk_pieces(chunks: Iterable[Chunk]) -> Iterator[ChunkPiece]:
    """The pieces of chunks, one after the other; a chunk in which no line starts has one empty piece.

    Raises:
        DataError: a file cannot be read.
    """
    for chunk in chunks:
        waiting: Piece | None = None
        for piece in pieces(chunk.path, PIECE_BYTES, chunk.start, chunk.stop):
            if waiting is not None:
                yield ChunkPiece(chunk, waiting, last=False)
            waiting = piece
        yield ChunkPiece(chunk, waiting or Piece(np.empty(0, np.uint8), 0), last=True)


def in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[tuple[T, R]]:
    """Each item with its result, in order, ``ahead`` items under way at once."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > ahead:
                earlier, result = waiting.popleft()
                yield earlier, result.result()
        while waiting:
            earlier, result = waiting.popleft()
            yield earlier, result.result()
    finally:
        for _, result in waiting:
            result.cancel()


def lines_before(chunk: Chunk) -> int:
    """Lines of the file in front of a chunk."""
    if chunk.start == 0:
        return 0
    return sum(engine.count_lines(piece.text) for piece in pieces(chunk.path, PIECE_BYTES, 0, chunk.start))


def refuse(chunk: Chunk, rows: int, fault: Fault) -> NoReturn:
    """Say where a file is wrong.

    Args:
        chunk: that holds the row.
        rows: of the chunk in front of the faulty piece.
        fault: in the piece.

    Raises:
        DataError: always.
    """
    raise DataError(f"{chunk.path}: line {lines_before(chunk) + rows + fault.row + 1}: {fault.clause}")


def count_chunk_lines(pool: ThreadPoolExecutor, chunks: Sequence[Chunk]) -> dict[int, int]:
    """Lines of each chunk, by its number."""

    def count(item: ChunkPiece) -> int:
        return int(engine.count_lines(item.piece.text))

    lines: dict[int, int] = {chunk.number: 0 for chunk in chunks}
    for item, number in in_order(pool, count, chunk_pieces(chunks), ahead=8):
        lines[item.chunk.number] += number
    return lines
