"""Parts of tensors in checkpoints: who holds which rows and columns, and how any other part is put together.

A tensor lies in files, each a block of it: the rows ``start, start + step, ...`` of some columns, or in an
increment only those of its rows that were touched since the base. Reading goes through the files one by one in
blocks, whatever rows and columns are asked for, so that any plan and rank count loads any other's.

Shapes: a tensor of one axis counts as one column, one of several axes as [rows, all others together].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.errors import CheckpointError
from pipeline.tensor_file import StoredFile, read_rows, read_tensor, rows_per_piece

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a tensor that one rank writes.

    Attributes:
        array: [len(rows), len(columns)], or [len(rows)] of a tensor of one axis; any strides.
        shape: of the whole tensor, one or two axes.
        rows: which rows these are, ascending.
        columns: which columns, ascending; ``None``: all. Means nothing where there is one axis.
    """

    array: Array
    shape: tuple[int, ...]
    rows: range
    columns: range | None = None


@dataclass(frozen=True, slots=True)
class PieceEntry:
    """One file of a tensor.

    Attributes:
        stored: the file, an array [count, len(columns)].
        rows: the rows that its writer held.
        columns: their columns.
        numbers: a file [count] with the numbers of the rows that are here, ascending; ``None``: all of ``rows``.
        count: rows in the file.
    """

    stored: StoredFile
    rows: range
    columns: range
    numbers: StoredFile | None
    count: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies, and what it must be."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[PieceEntry, ...]

    @property
    def file(self) -> str:
        """The file below the checkpoint's folder; of several the first.

        Raises:
            CheckpointError: the tensor is empty and written in parts, so that no file was needed.
        """
        if not self.pieces:
            raise CheckpointError(f"tensor of shape {list(self.shape)}: is empty and has no file")
        return self.pieces[0].stored.file

    @property
    def partial(self) -> bool:
        """Whether rows that were not touched have to be read from the base."""
        return any(piece.numbers is not None for piece in self.pieces)

    @property
    def whole(self) -> PieceEntry | None:
        """The one file that holds everything, if there is one."""
        if len(self.pieces) != 1 or self.partial:
            return None
        rows, columns = extent(self.shape)
        piece = self.pieces[0]
        return piece if (piece.rows, piece.columns) == (rows, columns) else None


def extent(shape: Sequence[int]) -> tuple[range, range]:
    """All rows and all columns of a tensor."""
    return range(shape[0] if shape else 1), range(math.prod(shape[1:]))


def intersect(left: range, right: range) -> range:
    """The common members of two ascending ranges."""
    nothing = range(0)
    if not left or not right:
        return nothing
    gcd = math.gcd(left.step, right.step)
    distance, remainder = divmod(right.start - left.start, gcd)
    if remainder:
        return nothing
    # Chinese remainder theorem: the first x = left.start + k left.step that is also right.start modulo right.step.
    ratio = right.step // gcd
    step = left.step * ratio
    first = left.start + distance * pow(left.step // gcd, -1, ratio) % ratio * left.step
    low = max(left.start, right.start)
    if first < low:
        first += -(-(low - first) // step) * step
    found = range(first, min(left[-1], right[-1]) + 1, step)
    return found or nothing


def places(part: range, whole: range) -> slice:
    """Where the members of ``part`` stand in ``whole``, which has them all."""
    if not part:
        return slice(0, 0)
    begin = (part.start - whole.start) // whole.step
    step = part.step // whole.step if len(part) > 1 else 1
    return slice(begin, begin + (len(part) - 1) * step + 1, step)


def check_cover(name: str, shape: Sequence[int], pieces: Sequence[PieceEntry]) -> None:
    """Every element of a tensor must have exactly one owner.

    Raises:
        CheckpointError: two pieces overlap, or something is missing.
    """
    rows, columns = extent(shape)
    for left, right in itertools.combinations(pieces, 2):
        if intersect(left.rows, right.rows) and intersect(left.columns, right.columns):
            raise CheckpointError(
                f"tensor {name!r}: {left.stored.file} and {right.stored.file} hold the same rows; one rank must own it"
            )
    for piece in pieces:
        if not _within(piece.rows, rows) or not _within(piece.columns, columns):
            raise CheckpointError(
                f"tensor {name!r}: rows {piece.rows} and columns {piece.columns} are outside of its shape {list(shape)}"
            )
    held = sum(len(piece.rows) * len(piece.columns) for piece in pieces)
    if held != len(rows) * len(columns):
        raise CheckpointError(
            f"tensor {name!r}: its pieces hold {held} of {len(rows) * len(columns)} elements; every rank must hand in "
            "its part"
        )


def _within(part: range, whole: range) -> bool:
    return not part or (part.step > 0 and whole.start <= part[0] and part[-1] < whole.stop)


# --- the manifest's words


def piece_values(piece: PieceEntry) -> dict[str, Any]:
    """A piece as JSON values."""
    values: dict[str, Any] = {**_file_values(piece.stored), "rows": _limits(piece.rows)}
    values["columns"] = _limits(piece.columns)
    if piece.numbers is not None:
        values |= {"count": piece.count, "numbers": _file_values(piece.numbers)}
    return values


def tensor_values(entry: TensorEntry) -> dict[str, Any]:
    """A tensor as JSON values; one that is a single file reads as in format version 1."""
    about = {"shape": list(entry.shape), "dtype": entry.dtype}
    if entry.whole:
        return {**_file_values(entry.whole.stored), **about}
    return {**about, "pieces": [piece_values(piece) for piece in entry.pieces]}


def parse_tensor(values: Mapping[str, Any]) -> TensorEntry:
    """The inverse of ``tensor_values``.

    Raises:
        KeyError, TypeError, ValueError: a key is missing or something else than it should be.
    """
    shape = tuple(values["shape"])
    rows, columns = extent(shape)
    if "pieces" not in values:
        pieces: tuple[PieceEntry, ...] = (PieceEntry(_parse_file(values), rows, columns, None, len(rows)),)
    else:
        pieces = tuple(parse_piece(piece) for piece in values["pieces"])
    return TensorEntry(shape, values["dtype"], pieces)


def parse_piece(values: Mapping[str, Any]) -> PieceEntry:
    """The inverse of ``piece_values``; errors as of ``parse_tensor``."""
    rows, columns = range(*values["rows"]), range(*values["columns"])
    numbers = _parse_file(values["numbers"]) if "numbers" in values else None
    return PieceEntry(_parse_file(values), rows, columns, numbers, values.get("count", len(rows)))


def _limits(part: range) -> list[int]:
    return [part.start, part.stop, part.step]


def _file_values(stored: StoredFile) -> dict[str, Any]:
    return {"file": stored.file, "bytes": stored.bytes, "sha256": stored.sha256}


def _parse_file(values: Mapping[str, Any]) -> StoredFile:
    return StoredFile(values["file"], values["bytes"], values["sha256"])


def join_shards(shards: Sequence[Mapping[str, Any]]) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint from what each rank wrote of them.

    Args:
        shards: by rank and tensor name: shape, dtype and pieces, as JSON values.

    Raises:
        CheckpointError: ranks differ about a tensor, two hold the same elements, or some are missing.
    """
    tensors: dict[str, TensorEntry] = {}
    for rank, shard in enumerate(shards):
        for name, values in shard.items():
            if values["shape"] is None:
                continue
            shape, dtype = tuple(values["shape"]), values["dtype"]
            pieces = tuple(parse_piece(piece) for piece in values["pieces"])
            before = tensors.setdefault(name, TensorEntry(shape, dtype, ()))
            if (before.shape, before.dtype) != (shape, dtype):
                raise CheckpointError(
                    f"tensor {name!r}: is {dtype} {list(shape)} on rank {rank}, but {before.dtype} "
                    f"{list(before.shape)} on another; one rank must own it"
                )
            tensors[name] = TensorEntry(shape, dtype, before.pieces + pieces)
    for name, entry in tensors.items():
        check_cover(name, entry.shape, entry.pieces)
    return tensors


def stored_bytes(shards: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of all files that the ranks wrote, as of ``join_shards``; one that several pieces share counts once."""
    pieces = [piece for shard in shards for values in shard.values() for piece in values["pieces"]]
    files = {file["file"]: file["bytes"] for piece in pieces for file in (piece, piece.get("numbers", piece))}
    return sum(files.values())


# --- reading


def read_part(folder: Path, name: str, entry: TensorEntry, out: Array, rows: range, columns: range) -> None:
    """Read what the files of one checkpoint hold of some rows and columns; extra memory: a few blocks of 16 MiB.

    Every file that is opened is read and verified as a whole. After an error ``out`` is undefined.

    Args:
        folder: of the checkpoint.
        name: the tensor's name.
        entry: where it lies.
        out: [len(rows), len(columns)], any strides; what no file holds is left as it is.
        rows: of the tensor, ascending.
        columns: of the tensor, ascending.

    Raises:
        CheckpointError: a file is missing, cut off or damaged.
    """
    for piece in entry.pieces:
        common = intersect(piece.columns, columns)
        if not common or not (piece.numbers or intersect(piece.rows, rows)) or not piece.count:
            continue
        target = out[:, places(common, columns)]
        source = places(common, piece.columns)
        if piece.numbers is None:
            _read_range(folder, name, entry, piece, target, rows, source)
        else:
            _read_numbered(folder, name, entry, piece, target, rows, source)


def _file_shape(entry: TensorEntry, piece: PieceEntry) -> tuple[int, ...]:
    """Shape in the file, which for a whole tensor is the tensor's own."""
    return (piece.count,) if len(entry.shape) == 1 else (piece.count, len(piece.columns))


def _read_range(
    folder: Path, name: str, entry: TensorEntry, piece: PieceEntry, target: Array, rows: range, source: slice
) -> None:
    """``target`` [len(rows), c] takes the piece's columns ``source`` where the rows are the same."""
    file = folder / piece.stored.file
    shape = entry.shape if entry.whole else _file_shape(entry, piece)
    dtype = np.dtype(entry.dtype)
    common = intersect(piece.rows, rows)
    direct = target[places(common, rows)]
    if common == piece.rows and direct.shape[1] == len(piece.columns) and direct.flags.c_contiguous:
        read_tensor(file, direct, name=name, stored=piece.stored, shape=shape)
        return
    start = 0
    for block in read_rows(file, shape, dtype, name=name, stored=piece.stored):
        part = piece.rows[start : start + len(block)]
        start += len(block)
        if common := intersect(part, rows):
            target[places(common, rows)] = block.reshape(len(block), -1)[places(common, part), source]


def _read_numbered(
    folder: Path, name: str, entry: TensorEntry, piece: PieceEntry, target: Array, rows: range, source: slice
) -> None:
    """As ``_read_range`` for a file that holds only touched rows."""
    assert piece.numbers is not None
    dtype = np.dtype(entry.dtype)
    shape = _file_shape(entry, piece)
    most = rows_per_piece(len(piece.columns) * dtype.itemsize)
    numbers = read_rows(
        folder / piece.numbers.file,
        (piece.count,),
        number_type(entry.shape),
        name=f"{name} (row numbers)",
        stored=piece.numbers,
        most=most,
    )
    values = read_rows(folder / piece.stored.file, shape, dtype, name=name, stored=piece.stored, most=most)
    for number, block in zip(numbers, values, strict=True):
        place, rest = np.divmod(number.astype(np.int64) - rows.start, rows.step)
        # A damaged number must not reach beyond the array: it is noticed only at the file's end.
        wanted = (rest == 0) & (place >= 0) & (place < len(rows))
        target[place[wanted]] = block.reshape(len(block), -1)[wanted, source]


def number_type(shape: Sequence[int]) -> np.dtype[Any]:
    """Type of row numbers of a tensor."""
    return np.dtype("<i4" if shape[0] <= 2**31 else "<i8")
