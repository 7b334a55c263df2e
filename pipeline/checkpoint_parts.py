"""What one rank writes of its tensors: whole arrays, pieces, or the rows that were touched since a base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.errors import CheckpointError
from pipeline.checkpoint_pieces import Piece, PieceEntry, extent, number_type
from pipeline.copy_room import CopyRoom
from pipeline.tensor_file import StoredFile, rows_per_piece, tensor_file_name, write_rows

Array = npt.NDArray[Any]
Value = Array | Piece | Sequence[Piece]
Touched = Array | list[Array | None] | tuple[Array | None, ...]

# Rows of a mask that are looked at together.
_SCAN = 1 << 20


class RowSet:
    """Some of an array's rows, ascending and distinct."""

    def __init__(self, name: str, touched: Array, rows: int) -> None:
        """Take a mask or a list of rows.

        Args:
            name: the tensor's name, for messages.
            touched: [rows] bool; or [ceil(rows / 8)] uint8, bit r % 8 of byte r // 8 is row r's
                (``packbits(mask, bitorder="little")``); or int32 or int64 row numbers in any order.
            rows: the array's rows.

        Raises:
            CheckpointError: another type or length, or a number out of range.
        """
        self.source: Array | None = touched  # also keeps its identity from being given to another array
        self._mask: Array | None = None
        self._bits: Array | None = None
        self._numbers: Array | None = None
        wanted = {np.dtype(bool): rows, np.dtype(np.uint8): -(-rows // 8)}
        if touched.ndim != 1 or len(touched) != wanted.get(touched.dtype, len(touched)):
            raise CheckpointError(
                f"touched rows of {name}: {touched.dtype} {list(touched.shape)} does not fit {rows} rows; hand in a "
                "mask of bool [rows], its bits as uint8 [rows / 8], or row numbers"
            )
        if touched.dtype == bool:
            self._mask = touched
            self.count = int(np.count_nonzero(touched))
        elif touched.dtype == np.uint8:
            self._bits = touched
            self.count = sum(len(part) for part in self._scan(rows))
        elif touched.dtype in (np.int32, np.int64):
            self._numbers = np.unique(touched)
            self.count = len(self._numbers)
            if self.count and not 0 <= int(self._numbers[0]) <= int(self._numbers[-1]) < rows:
                outside = self._numbers[0] if self._numbers[0] < 0 else self._numbers[-1]
                raise CheckpointError(f"touched rows of {name}: {outside} is not among its {rows} rows")
        else:
            raise CheckpointError(f"touched rows of {name}: are {touched.dtype}; use bool, uint8, int32 or int64")
        self.rows = rows

    def chunks(self, most: int) -> Iterator[Array]:
        """Row numbers, int64, at most ``most`` at a time."""
        if self._numbers is not None:
            for start in range(0, self.count, most):
                yield self._numbers[start : start + most].astype(np.int64)
            return
        for found in self._scan(self.rows):
            for start in range(0, len(found), most):
                yield found[start : start + most]

    def settled(self) -> RowSet:
        """The same rows, independent of the array they came from."""
        copy = object.__new__(RowSet)
        copy.source = copy._mask = copy._bits = None
        numbers = [*self.chunks(_SCAN), np.empty(0, np.int64)]
        copy._numbers = np.concatenate(numbers, dtype=np.int32 if self.rows <= 2**31 else np.int64, casting="unsafe")
        copy.count, copy.rows = self.count, self.rows
        return copy

    @property
    def nbytes(self) -> int:
        """Memory of a settled copy."""
        return self.count * (4 if self.rows <= 2**31 else 8)

    def _scan(self, rows: int) -> Iterator[Array]:
        for start in range(0, rows, _SCAN):
            if self._mask is not None:
                part = self._mask[start : start + _SCAN]
            else:
                assert self._bits is not None
                part = np.unpackbits(
                    self._bits[start // 8 : (start + _SCAN) // 8], bitorder="little", count=min(_SCAN, rows - start)
                )
            yield np.flatnonzero(part).astype(np.int64) + start


@dataclass(frozen=True, slots=True)
class Part:
    """One file to be written.

    Attributes:
        name: the tensor's.
        array: the rows that this rank holds; [len(rows), len(columns)], [len(rows)], or of a whole tensor any shape.
        shape: of the whole tensor.
        rows: which rows ``array`` holds.
        columns: which columns.
        place: of several parts of a tensor on this rank, the number; ``None`` if it is the only one.
        touched: the rows of ``array`` to write; ``None``: all.
        gathered: ``array`` holds the touched rows and no others.
    """

    name: str
    array: Array
    shape: tuple[int, ...]
    rows: range
    columns: range
    place: int | None = None
    touched: RowSet | None = None
    gathered: bool = False

    @property
    def nbytes(self) -> int:
        """Memory of a snapshot."""
        if self.touched is None or self.gathered:
            return self.array.nbytes
        return self.array.nbytes // max(1, len(self.array)) * self.touched.count + self.touched.nbytes

    @property
    def copied_bytes(self) -> int:
        """Memory of a snapshot's array alone."""
        return self.nbytes - (0 if self.touched is None or self.gathered else self.touched.nbytes)

    def blocks(self) -> Iterator[Array]:
        """The touched rows, block by block."""
        assert self.touched is not None
        start = 0
        for numbers in self.touched.chunks(self._most()):
            yield self.array[start : start + len(numbers)] if self.gathered else self.array[numbers]
            start += len(numbers)

    def numbers(self) -> Iterator[Array]:
        """The touched rows' numbers in the whole tensor, block by block."""
        assert self.touched is not None
        for numbers in self.touched.chunks(self._most()):
            yield (numbers * self.rows.step + self.rows.start).astype(number_type(self.shape))

    def _most(self) -> int:
        return rows_per_piece(self.array.nbytes // max(1, len(self.array)))


def parts_of(name: str, value: Value, touched: Touched | None, known: dict[int, RowSet]) -> list[Part]:
    """What a rank hands in for one tensor, checked.

    Args:
        name: the tensor's name.
        value: the whole tensor, a piece of it, or several pieces.
        touched: rows to write, of ``value``'s array; of several pieces a list in the same order, ``None`` in it
            writes all rows of that piece.
        known: row sets of other tensors by the identity of their ``touched``; gets this one's.

    Raises:
        CheckpointError: a piece does not fit its rows and columns, or ``touched`` does not fit.
    """
    pieces = [value] if isinstance(value, Piece | np.ndarray) else list(value)
    masks = list(touched) if isinstance(touched, list | tuple) else [touched] * len(pieces)
    if len(masks) != len(pieces) or (len(pieces) > 1 and isinstance(touched, np.ndarray)):
        raise CheckpointError(f"touched rows of {name}: one array for each of its {len(pieces)} pieces is needed")
    parts: list[Part] = []
    for place, (piece, mask) in enumerate(zip(pieces, masks, strict=True)):
        part = _part(name, piece)
        part = replace(part, place=place if len(pieces) > 1 else None)
        parts.append(part if mask is None else _restricted(part, mask, known))
    return parts


def _part(name: str, piece: Array | Piece) -> Part:
    if isinstance(piece, np.ndarray):
        return Part(name, piece, piece.shape, *extent(piece.shape))
    shape = tuple(piece.shape)
    if len(shape) not in {1, 2}:
        raise CheckpointError(f"tensor {name!r}: has shape {list(shape)}; pieces are of tensors of one or two axes")
    columns = extent(shape)[1] if piece.columns is None or len(shape) == 1 else piece.columns
    expected = (len(piece.rows), len(columns))[: len(shape)]
    if piece.array.shape != expected or piece.rows.step < 1 or columns.step < 1:
        raise CheckpointError(
            f"tensor {name!r}: a piece of shape {list(piece.array.shape)} does not hold rows {piece.rows} and columns "
            f"{columns} of {list(shape)}"
        )
    return Part(name, piece.array, shape, piece.rows, columns)


def _restricted(part: Part, touched: Array, known: dict[int, RowSet]) -> Part:
    """Only the touched rows, unless with their numbers they take as many bytes as all."""
    if not part.array.ndim or part.array.ndim > 2:
        raise CheckpointError(f"touched rows of {part.name}: it has {part.array.ndim} axes, not one or two")
    rows = known.get(id(touched))
    if rows is None or rows.rows != len(part.array):
        rows = known[id(touched)] = RowSet(part.name, touched, len(part.array))
    smaller = replace(part, touched=rows)
    return smaller if smaller.nbytes < part.nbytes else part


def snapshot(part: Part, settled: dict[int, tuple[RowSet, RowSet]], room: CopyRoom) -> Part:
    """A copy that training may go on without.

    Args:
        part: what is to be written.
        settled: row sets and their copies by identity, so that parts go on sharing them; gets this one's.
        room: of the copy, told of ``copied_bytes``.
    """
    if part.array.dtype.hasobject:
        return part  # the writer refuses it
    if part.touched is None:
        array = room.take(part.array.shape, part.array.dtype)
        np.copyto(array, part.array)
        return replace(part, array=array)
    if id(part.touched) not in settled:
        settled[id(part.touched)] = (part.touched, part.touched.settled())
    array = room.take((part.touched.count, *part.array.shape[1:]), part.array.dtype)
    start = 0
    for block in part.blocks():
        array[start : start + len(block)] = block
        start += len(block)
    return replace(part, array=array, touched=settled[id(part.touched)][1], gathered=True)


def write_part(folder: Path, part: Part, numbered: dict[tuple[int, range], StoredFile]) -> PieceEntry:
    """Write the touched rows of a part and their numbers, and flush them to disk.

    Args:
        folder: of this rank.
        part: with touched rows.
        numbered: files of row numbers that were written before, by row set and rows; gets this one's.

    Raises:
        CheckpointError: the array holds Python objects.
        OSError: a file exists or cannot be written.
    """
    assert part.touched is not None
    count = part.touched.count
    shape = (count, *part.array.shape[1:])
    file = part_file(folder, part)
    stored = StoredFile(f"{folder.name}/{file.name}", *write_rows(file, shape, part.array.dtype, part.blocks()))
    key = (id(part.touched), part.rows)
    if key not in numbered:
        file = part_file(folder, part, "rows")
        written = write_rows(file, (count,), number_type(part.shape), part.numbers())
        numbered[key] = StoredFile(f"{folder.name}/{file.name}", *written)
    return PieceEntry(stored, part.rows, part.columns, numbered[key], count)


def part_file(folder: Path, part: Part, content: str = "") -> Path:
    """Where a part is written: of a single one the tensor's name, of several also their number."""
    place = "" if part.place is None else str(part.place)
    return folder / tensor_file_name(part.name, "@".join(filter(None, (place, content))))
