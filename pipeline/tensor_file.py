"""Arrays streamed to and from .npy files in pieces, hashed on the way."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from dlrm.errors import CheckpointError

PIECE_BYTES = 16 << 20

Array = npt.NDArray[Any]


def tensor_file_name(name: str, suffix: str = "") -> str:
    """File name of a tensor, or of a part of it; what a file system might refuse is percent-encoded.

    A ``suffix`` follows an ``@``, which no encoded name has.
    """
    return f"{quote(name, safe='')}{'@' if suffix else ''}{suffix}.npy"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a checkpoint, and what it must be.

    Attributes:
        file: path below the checkpoint's folder.
        bytes: its size.
        sha256: hexadecimal digest of all its bytes.
    """

    file: str
    bytes: int
    sha256: str


def npy_header(shape: Sequence[int], dtype: Any) -> bytes:
    """What precedes the C-ordered elements of an array in a .npy file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header,
        {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)},
    )
    return header.getvalue()


def rows_per_piece(row_bytes: int) -> int:
    """Rows that are handled at once; at least 1, and so few that their numbers take little memory too."""
    return max(1, PIECE_BYTES // max(16, row_bytes))


def pieces_of(array: Array) -> Iterator[memoryview]:
    """The elements of ``array`` in C order, as views where it is contiguous, else copied piece by piece."""
    if array.flags.c_contiguous:
        flat: Any = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, PIECE_BYTES):
            yield memoryview(flat[start : start + PIECE_BYTES])
        return
    row_bytes = math.prod(array.shape[1:]) * array.itemsize
    if row_bytes > PIECE_BYTES:
        for row in array:
            yield from pieces_of(row)
        return
    rows = rows_per_piece(row_bytes)
    for start in range(0, array.shape[0], rows):
        part: Any = np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8)
        yield memoryview(part)


def write_tensor(path: Path, array: Array) -> tuple[int, str]:
    """Write an array as .npy and flush it to disk.

    Args:
        path: a file that must not exist yet.
        array: any shape; numbers only.

    Returns:
        Bytes of the file and their SHA-256 in hexadecimal.

    Raises:
        CheckpointError: the array holds Python objects.
        OSError: the file exists or cannot be written.
    """
    return _write(path, array.shape, array.dtype, pieces_of(array))


def write_rows(path: Path, shape: Sequence[int], dtype: Any, blocks: Iterable[Array]) -> tuple[int, str]:
    """As ``write_tensor`` for an array that exists only block by block.

    Args:
        path: a file that must not exist yet.
        shape: of the blocks joined along axis 0.
        dtype: theirs.
        blocks: [any number of rows, *shape[1:]].
    """
    return _write(path, shape, dtype, (piece for block in blocks for piece in pieces_of(block)))


def _write(path: Path, shape: Sequence[int], dtype: Any, pieces: Iterable[memoryview]) -> tuple[int, str]:
    if np.dtype(dtype).hasobject:
        raise CheckpointError(f"{path.name}: holds Python objects ({dtype}); only numbers are saved")
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("xb", buffering=0) as file:
        for piece in itertools.chain((memoryview(npy_header(shape, dtype)),), pieces):
            digest.update(piece)
            num_bytes += len(piece)
            written = 0
            while written < len(piece):  # one write() moves at most 2 GiB, and less on a full disk
                written += file.write(piece[written:]) or 0
        os.fsync(file.fileno())
    return num_bytes, digest.hexdigest()


def read_tensor(path: Path, out: Array, *, name: str, stored: StoredFile, shape: Sequence[int] | None = None) -> None:
    """Read a .npy file into ``out`` and verify it.

    ``out`` holds undefined values after an error.

    Args:
        path: file that ``write_tensor`` wrote.
        out: C-contiguous array of the file's elements.
        name: the tensor's name, for messages.
        stored: size and digest that the file must have.
        shape: shape in the file; ``None``: that of ``out``.

    Raises:
        CheckpointError: the file is missing, has another size, or differs in any byte.
    """
    expected = npy_header(out.shape if shape is None else shape, out.dtype)
    digest = hashlib.sha256()
    with _open_tensor(path, name, stored.bytes, at_least=out.nbytes) as file:
        header = file.read(stored.bytes - out.nbytes)
        digest.update(header)
        for piece in pieces_of(out):
            _read_exactly(file, piece, path, name)
            digest.update(piece)
    _check_digest(path, name, digest.hexdigest() == stored.sha256 and header == expected)


def read_rows(
    path: Path, shape: Sequence[int], dtype: Any, *, name: str, stored: StoredFile, most: int | None = None
) -> Iterator[Array]:
    """Read a .npy file block by block; it is known to be whole only when the iterator is exhausted.

    Args:
        path: file that ``write_tensor`` or ``write_rows`` wrote.
        shape: shape in the file; at least one axis.
        dtype: type in the file.
        name: the tensor's name, for messages.
        stored: size and digest that the file must have.
        most: rows of a block; ``None``: as many as a piece holds.

    Yields:
        [up to ``most``, *shape[1:]], the same memory each time.

    Raises:
        CheckpointError: the file is missing, has another size, or differs in any byte.
    """
    dtype = np.dtype(dtype)
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    rows = most or rows_per_piece(row_bytes)
    buffer = np.empty((min(rows, shape[0]), *shape[1:]), dtype)
    digest = hashlib.sha256()
    payload = shape[0] * row_bytes
    with _open_tensor(path, name, stored.bytes, at_least=payload) as file:
        header = file.read(stored.bytes - payload)
        digest.update(header)
        for start in range(0, shape[0], rows):
            block = buffer[: min(rows, shape[0] - start)]
            for piece in pieces_of(block):
                _read_exactly(file, piece, path, name)
                digest.update(piece)
            yield block
    _check_digest(path, name, digest.hexdigest() == stored.sha256 and header == npy_header(shape, dtype))


def copy_verified(path: Path, target: IO[bytes], *, name: str, stored: StoredFile) -> None:
    """Copy a .npy file to an open file and verify it on the way; arguments as of ``read_tensor``.

    Raises:
        CheckpointError: the file is missing, has another size, or differs in any byte; what was copied is void.
        OSError: ``target`` cannot be written.
    """
    digest = hashlib.sha256()
    with _open_tensor(path, name, stored.bytes) as file:
        while piece := _read_some(file, path, name):
            digest.update(piece)
            target.write(piece)
    _check_digest(path, name, digest.hexdigest() == stored.sha256)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, so that new names survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _open_tensor(path: Path, name: str, num_bytes: int, at_least: int = 0) -> io.FileIO:
    try:
        file = io.FileIO(path)
    except OSError as error:
        raise _unreadable(path, name, error) from None
    found = os.fstat(file.fileno()).st_size
    if found != num_bytes or found < at_least:
        file.close()
        raise CheckpointError(
            f"{path}: tensor {name} has {found} bytes, but {num_bytes} are recorded; the file is cut off or foreign, "
            "use another checkpoint"
        )
    return file


def _read_some(file: io.FileIO, path: Path, name: str) -> bytes:
    try:
        return file.read(PIECE_BYTES)
    except OSError as error:
        raise _unreadable(path, name, error) from None


def _read_exactly(file: io.FileIO, piece: memoryview, path: Path, name: str) -> None:
    done = 0
    while done < len(piece):
        try:
            count = file.readinto(piece[done:])
        except OSError as error:
            raise _unreadable(path, name, error) from None
        if not count:
            raise CheckpointError(f"{path}: tensor {name} ended early; use another checkpoint")
        done += count


def _check_digest(path: Path, name: str, same: bool) -> None:
    if not same:
        raise CheckpointError(f"{path}: tensor {name} is damaged (its SHA-256 differs); use another checkpoint")


def _unreadable(path: Path, name: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: tensor {name} cannot be read ({error.strerror or error}); use another checkpoint")
