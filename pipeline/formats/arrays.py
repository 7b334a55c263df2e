"""NumPy's .npy and .npz files as arrays on disk: mapped when read, appended to row by row when written.

Published with NumPy (``numpy.lib.format``). Memory stays bounded: members of a compressed .npz are unpacked into a
temporary file, those of a stored one too (their CRC-32 is checked on the way).

Shapes: R rows of an array, C columns.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dlrm.errors import DataError
from pipeline.formats.batch import release_pages
from pipeline.formats.npy_header import read_npy_header
from pipeline.formats.npz_place import npz_place

_COPIED_BYTES = 1 << 20
_END_BYTES, _MOST_COMMENT = 22, 0xFFFF
"""Of the record that ends a .zip file."""


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array on disk.

    Attributes:
        name: of the file, and of the array in it, for messages.
        values: [R] or [R, C], mapped read-only.
        start: byte of the first value in the .npy data.
        mapped: the whole .npy data; ``None`` where there is no value.
    """

    name: str
    values: NDArray[Any]
    start: int
    mapped: mmap.mmap | None = None

    def where(self, row: int, column: int = 0) -> str:
        """File, row and byte of a value."""
        rows, columns = self.values.shape[0], self.values.shape[1] if self.values.ndim > 1 else 1
        place = row * columns + column if self.values.flags.c_contiguous else column * rows + row
        return f"{self.name}: row {row} (byte {self.start + place * self.values.itemsize})"

    def release(self, start: int, stop: int) -> None:
        """Let go of the mapped pages of rows ``start .. stop``."""
        rows, columns = self.values.shape[0], self.values.shape[1] if self.values.ndim > 1 else 1
        lines, line = (1, columns) if self.values.flags.c_contiguous else (columns, 1)
        for number in range(lines):
            first, last = (self.start + (number * rows + row * line) * self.values.itemsize for row in (start, stop))
            release_pages(self.mapped, first, last)

    def expect(self, kinds: str, shape: Sequence[int | None]) -> None:
        """Refuse another type or shape.

        Args:
            kinds: letters of NumPy's kinds of types, such as ``if`` for integers and floats.
            shape: the sizes; ``None``: any.

        Raises:
            DataError: they differ, or the values are big-endian.
        """
        values = self.values
        if values.dtype.byteorder == ">":
            raise DataError(
                f"{self.name}: values of type {values.dtype.str} are big-endian, but must be little-endian; write them "
                f"again as {values.dtype.newbyteorder('<').str}"
            )
        fits = values.ndim == len(shape) and all(
            size in (None, found) for size, found in zip(shape, values.shape, strict=True)
        )
        if values.dtype.kind not in kinds or not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise DataError(
                f"{self.name}: array of {values.dtype} {list(values.shape)}, but must be of kind "
                f"{' or '.join(kinds)} and shape [{wanted}]"
            )


def open_npy(path: Path) -> StoredArray:
    """Map a .npy file.

    Raises:
        DataError: it is missing, no .npy file, truncated or oversized.
    """
    try:
        with path.open("rb") as file:
            return _map(file, str(path), path.stat().st_size)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; restore the file") from None


def _map(file: IO[bytes], name: str, size: int) -> StoredArray:
    try:
        shape, by_columns, dtype = read_npy_header(file)
    except ValueError as error:
        raise DataError(f"{name}: bad header (byte 0): {' '.join(str(error).split())}; is it a .npy file?") from None
    if dtype.hasobject or dtype.names is not None:
        raise DataError(f"{name}: holds values of type {dtype}, but must hold plain numbers")
    start = file.tell()
    wanted = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size != wanted:
        kind = "truncated" if size < wanted else "oversized"
        where = _cut(shape, by_columns, start, size, wanted)
        raise DataError(f"{name}: {kind}, {size} bytes where its header needs {wanted}{where}; copy the file again")
    if size == start:
        return StoredArray(name, np.empty(shape, dtype, order="F" if by_columns else "C"), start)
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    values = np.frombuffer(mapped, dtype, offset=start).reshape(shape, order="F" if by_columns else "C")
    return StoredArray(name, values, start, mapped)


def _cut(shape: tuple[int, ...], by_columns: bool, start: int, size: int, wanted: int) -> str:
    """Row and byte at which an array ends too early or too late; nothing where rows do not follow one another."""
    if not shape or not shape[0] or by_columns or size < start:
        return ""
    row_bytes = (wanted - start) // shape[0]
    end = min(size, wanted)
    return f" (row {(end - start) // row_bytes}, byte {end})" if row_bytes else ""


def open_npz(path: Path, names: Sequence[str]) -> dict[str, StoredArray]:
    """Map members of a .npz file through temporary files.

    Args:
        path: the file.
        names: members, without ``.npy``.

    Raises:
        DataError: it is missing, no .npz file, truncated or oversized, a member is missing, or its CRC-32 is wrong.
    """
    found, name = {}, ""
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_more(path)
            for name in names:
                with archive.open(f"{name}.npy") as packed, tempfile.TemporaryFile() as plain:
                    shutil.copyfileobj(packed, plain, _COPIED_BYTES)
                    size = plain.tell()
                    plain.seek(0)
                    found[name] = _map(plain, f"{path}: {name}", size)
    except KeyError:
        raise DataError(f"{path}: no array {name!r} in it, only {', '.join(npz_names(path)) or 'none'}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(
            f"{path}: damaged or truncated .npz ({error}{npz_place(path, name)}); copy the file again"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    return found


def _refuse_more(path: Path) -> None:
    """Refuse a .npz file that goes on behind its directory, which zipfile would take no notice of."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END_BYTES - _MOST_COMMENT))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    stop = size - len(tail) + end + _END_BYTES + int.from_bytes(tail[end + 20 : end + 22], "little")
    if end >= 0 and stop < size:
        raise DataError(f"{path}: oversized, {size} bytes where its directory ends at byte {stop}; copy the file again")


def npz_names(path: Path) -> list[str]:
    """Names of the arrays of a .npz file; none where it is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (zipfile.BadZipFile, OSError):
        return []


def is_damaged_npz(path: Path) -> bool:
    """Whether a file that is called .npz cannot be opened as one."""
    return path.suffix == ".npz" and not zipfile.is_zipfile(path)


class NpyWriter:
    """Appends rows to a .npy file whose number of rows is known at the end; what ``numpy.save`` would write."""

    def __init__(self, path: Path, dtype: str, columns: int | None) -> None:
        """Make the file.

        Args:
            path: of the file.
            dtype: such as ``<f4``.
            columns: C; ``None``: the array has one dimension.
        """
        self.path = path
        self._dtype = np.dtype(dtype)
        self._columns = columns
        self._rows = 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def write(self, values: NDArray[Any]) -> None:
        """Append rows [B] or [B, C]."""
        self._file.write(np.ascontiguousarray(values, self._dtype).reshape(-1).view(np.uint8).data)
        self._rows += values.shape[0]

    def finish(self) -> None:
        """Put the number of rows into the header, and close."""
        end = self._file.tell()
        self._file.seek(0)
        self._write_header()  # NumPy leaves room for a longer number of rows, so that it is as long as before
        self._file.seek(end)
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write_header(self) -> None:
        shape = (self._rows,) if self._columns is None else (self._rows, self._columns)
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)


def write_npz(path: Path, members: Mapping[str, Path]) -> None:
    """Put .npy files together to a .npz file, stored, and remove them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, file in members.items():
            archive.write(file, f"{name}.npy")
            file.unlink()


def largest_keys(arrays: Sequence[StoredArray], block_rows: int) -> list[int]:
    """Largest value of each column of arrays [R, C] that lie one after the other; -1 where there is no row."""
    largest = np.full(arrays[0].values.shape[1], -1, np.int64)
    for array in arrays:
        for start in range(0, array.values.shape[0], block_rows):
            part = array.values[start : start + block_rows]
            largest = np.maximum(largest, part.max(axis=0).astype(np.int64))
            array.release(start, start + part.shape[0])
    return [int(key) for key in largest]
