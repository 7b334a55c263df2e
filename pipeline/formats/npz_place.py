"""Where a damaged .npz file goes wrong, told from the headers of its members, which the ZIP format puts before each.

Published in PKWARE's APPNOTE, 4.3.7 (local file header) and 4.5.3 (sizes of 64 bits).
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.formats.npy_header import read_npy_header

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_MAGIC = b"PK\x03\x04"
_SIZE_BEHIND, _STORED, _WIDE = 8, 0, 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class _Member:
    """An array by its local header.

    Attributes:
        name: without ``.npy``.
        start: byte of its content.
        size: bytes of its content; ``None`` where they are told behind it.
        stored: whether it is not compressed.
    """

    name: str
    start: int
    size: int | None
    stored: bool


def npz_place(path: Path, name: str) -> str:
    """A clause about where a file cannot be read; nothing where nothing is known.

    Args:
        path: the file.
        name: of the array that was read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return f", which starts at byte {archive.getinfo(f'{name}.npy').header_offset}"
    except zipfile.BadZipFile:
        return _end_of(path)  # what comes last, the directory, is missing or wrong
    except (KeyError, OSError):
        return ""


def _end_of(path: Path) -> str:
    size, at, last = path.stat().st_size, 0, ""
    with path.open("rb") as file:
        while (member := _member_at(file, at)) is not None:
            last = member.name
            if member.size is None:
                return f"; it ends at byte {size}, in array {last!r} or behind it"
            if member.start + member.size > size:
                return f"; it ends at byte {size}, in {_row(file, member, size)}array {last!r}"
            at = member.start + member.size
    if not at:
        return "; bad header at byte 0"
    return f"; behind array {last!r} (byte {at}) something is missing or wrong"


def _member_at(file: BinaryIO, at: int) -> _Member | None:
    """The member whose header starts at a byte; ``None``: there is none."""
    file.seek(at)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or header[:4] != _MAGIC:
        return None
    _, _, flags, method, _, _, _, packed, plain, name_bytes, extra_bytes = _LOCAL.unpack(header)
    name, extra = file.read(name_bytes), file.read(extra_bytes)
    if packed == _WIDE:  # 64-bit sizes: plain and packed, in the field of number 1, which is the only one NumPy writes
        wide = extra[4:] if extra[:2] == b"\x01\0" else b""
        place = 8 if plain == _WIDE else 0
        packed = int.from_bytes(wide[place : place + 8], "little")
    size = None if flags & _SIZE_BEHIND else packed
    start = at + _LOCAL.size + name_bytes + extra_bytes
    return _Member(name.decode("utf-8", "replace").removesuffix(".npy"), start, size, method == _STORED)


def _row(file: BinaryIO, member: _Member, size: int) -> str:
    """The row of an array, not compressed and row after row, in which the file ends."""
    if not member.stored:
        return ""
    file.seek(member.start)
    try:
        shape, by_columns, dtype = read_npy_header(file)
    except ValueError:
        return ""
    values = file.tell()
    row_bytes = dtype.itemsize
    for count in shape[1:]:
        row_bytes *= count
    if by_columns or not row_bytes or size < values:
        return ""
    return f"row {(size - values) // row_bytes} of "
