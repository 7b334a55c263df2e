"""One data file of HugeCTR's Norm: its header, and what may be wrong with it; ``norm.py`` tells what it looks like.

Shapes: T tables (slots).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DataError
from pipeline.formats import norm_samples_numba
from pipeline.formats.batch import MappedFile
from pipeline.formats.block import SIDECAR
from pipeline.formats.norm_samples import BAD_COUNT, BAD_LABEL, BAD_LENGTH, BAD_SUM, OK, TOO_MANY_KEYS, TRUNCATED

HEADER_BYTES = 64
FRAME_BYTES = 5  # a length before, a sum behind
_SCANNED_ROWS = 1 << 16
_MOST_DIM = 1 << 20  # no header with more columns than that is meant so


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says.

    Attributes:
        framed: whether samples are framed with length and sum.
        records: samples of the file.
        num_dense: dense columns.
        num_tables: slots.
        start: byte of the first sample.
    """

    framed: bool
    records: int
    num_dense: int
    num_tables: int
    start: int


def read_header(path: Path, data: Any) -> Header:
    """Header of a file.

    Args:
        path: for messages.
        data: [bytes] uint8, the file.

    Raises:
        DataError: it is cut short, fails its sum, or does not make sense.
    """
    framed = data.size >= 4 and int(data[:4].view("<i4")[0]) == HEADER_BYTES
    if data.size < HEADER_BYTES + (FRAME_BYTES if framed else 0):
        raise DataError(f"{path}: truncated, {data.size} bytes are no header of {HEADER_BYTES}; copy the file again")
    body = data[4 : 4 + HEADER_BYTES] if framed else data[:HEADER_BYTES]
    if framed and int(body.sum()) % 256 != int(data[4 + HEADER_BYTES]):
        raise DataError(
            f"{path}: header (byte 68): check-sum {int(data[68])}, but its bytes sum to {int(body.sum()) % 256}; copy "
            "the file again"
        )
    check, records, labels, dense, slots = (int(value) for value in body.view("<i8")[:5])
    if check not in (0, 1) or bool(check) != framed or records < 0 or not 0 <= dense < _MOST_DIM > slots >= 0:
        swapped = int(body.view(">i8")[2])
        hint = "; it is big-endian, but must be little-endian" if 0 < swapped < _MOST_DIM and labels != swapped else ""
        raise DataError(
            f"{path}: bad header (byte 0): error_check {check}, number_of_records {records}, label_dim {labels}, "
            f"dense_dim {dense}, slot_num {slots}{hint or '; is it a Norm file?'}"
        )
    if labels != 1:
        raise DataError(f"{path}: header (byte {4 * framed + 16}): label_dim {labels}; Crosslane trains on one label")
    return Header(framed, records, dense, slots, HEADER_BYTES + (FRAME_BYTES if framed else 0))


class NormFile:
    """One data file, mapped."""

    def __init__(self, path: Path, wide: bool) -> None:
        if not path.is_file():
            raise DataError(f"{path}: no such file, but the file list names it; restore it or correct the list")
        self.path = path
        self.wide = wide
        self.file = MappedFile(path, path.stat().st_size)
        self.header = read_header(path, self.file.data)

    def scan(self, longest: Any, largest: Any) -> None:
        """Walk all samples; raises ``longest`` and ``largest`` [T]."""
        header = self.header
        byte = header.start
        for start in range(0, header.records, _SCANNED_ROWS):
            count, begin = min(_SCANNED_ROWS, header.records - start), byte
            outcome, row, byte, number = norm_samples_numba.scan_samples(
                self.file.data, begin, count, header.framed, header.num_dense, self.wide, longest, largest
            )
            self.check(outcome, start + row, byte, number)
            self.file.release(begin, byte)
        self.check_end(byte)

    def check(self, outcome: int, row: int, byte: int, number: int) -> None:
        """Refuse what is not ``OK``.

        Raises:
            DataError: names the row, the byte and the number that was found there.
        """
        if outcome == OK:
            return
        holds = "the sample" if self.header.framed else f"the file, of {self.file.data.size} bytes,"
        wrong_count = "is no number of keys" if number < 0 else f"asks for more keys than {holds} holds"
        what = {
            TRUNCATED: f"truncated: the file ends at byte {self.file.data.size}, inside a sample of "
            f"{self.header.records} that the header tells of",
            BAD_LENGTH: f"length {number} of a sample does not fit what is in it",
            BAD_SUM: f"check-sum {number} is not the sum of the sample's bytes",
            BAD_COUNT: f"nnz {number} of a slot {wrong_count}",
            TOO_MANY_KEYS: f"nnz {number} of a slot is more than the hotness of its table",
            BAD_LABEL: f"label {np.int32(number).view(np.float32)} is neither 0 nor 1",
        }[outcome]
        remedy = {
            BAD_COUNT: "is it truncated or big-endian, or are its keys of another width (--source-key-dtype)?",
            TOO_MANY_KEYS: f"correct {SIDECAR} beside it",
            BAD_LABEL: "correct the row",
        }.get(outcome, "copy the file again")
        raise DataError(f"{self.path}: row {row} (byte {byte}): {what}; {remedy}")

    def check_end(self, byte: int) -> None:
        """Refuse bytes behind the last sample.

        Raises:
            DataError: there are some.
        """
        if byte != self.file.data.size:
            raise DataError(
                f"{self.path}: oversized: {self.header.records} samples end at byte {byte}, but the file has "
                f"{self.file.data.size} bytes; correct number_of_records, or copy the file again"
            )
