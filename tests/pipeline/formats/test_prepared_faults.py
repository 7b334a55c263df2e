"""Damaged prepared sets, Raw and jagged, are refused with one sentence that names file, row and byte."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
import pytest
from format_cases import MULTI_HOT, poke, refused, swap

from pipeline.formats.interchange import WriteOptions

ROW = 4 + 3 * 4 + 4 * 4  # bytes of a Raw row of one-hot keys


@pytest.mark.parametrize(
    ("byte", "content", "message"),
    [
        (7 * ROW, b"\x02\0\0\0", rf"train\.bin: row 7 \(byte {7 * ROW}\): label 2 is neither 0 nor 1"),
        (7 * ROW, b"\0\0\0\x01", rf"row 7 \(byte {7 * ROW}\): label 16777216 .*is the file big-endian"),
        (7 * ROW + 8, b"\0\0\xc0\x7f", rf"row 7 \(byte {7 * ROW + 8}\): dense column 'd1' is nan"),
        (7 * ROW + 12, b"\0\0\x80\xff", rf"row 7 \(byte {7 * ROW + 12}\): dense column 'd2' is -inf"),
        (
            7 * ROW + 20,
            b"\x64\0\0\0",
            rf"row 7 \(byte {7 * ROW + 20}\): key 100 of table 'T1' lies outside .* 0 \.\. 99",
        ),
        (7 * ROW + 20, b"\0\0\0\x63", rf"row 7 \(byte {7 * ROW + 20}\): key 1660944384 .*big-endian"),
        (7 * ROW + 28, b"\xff\xff\xff\xff", rf"row 7 \(byte {7 * ROW + 28}\): table 'T3' has no key \(-1\)"),
    ],
)
def test_raw(converted: Any, byte: int, content: bytes, message: str) -> None:
    folder = converted("raw")
    poke(folder / "train.bin", byte, content)
    refused("raw", folder, message)


def test_raw_of_another_size(converted: Any) -> None:
    folder = converted("raw")
    content = (folder / "train.bin").read_bytes()
    for cut, kind in ((content[:-1], "truncated"), (content + b"\0", "oversized")):
        (folder / "train.bin").write_bytes(cut)
        place = rf"\((cut at row 49, byte {50 * ROW - 1}|ends at row 50, byte {50 * ROW})\)"
        message = rf"train\.bin: {kind}, {len(cut)} bytes where the manifest needs {len(content)} {place}"
        refused("raw", folder, message)


def test_raw_with_wide_keys_and_weights(converted: Any) -> None:
    folder = converted("raw", write=WriteOptions(key_dtype="int64"), shape=((9, 2),), weighted=True)
    row = 4 + 3 * 4 + 2 * 8 + 2 * 4
    poke(folder / "train.bin", 2 * row + 24, struct.pack("<q", 2**32))
    refused("raw", folder, rf"row 2 \(byte {2 * row + 24}\): key 4294967296 of table 'T0'")
    poke(folder / "train.bin", 2 * row + 24, struct.pack("<q", 3))
    poke(folder / "train.bin", 2 * row + 36, struct.pack("<f", np.inf))
    refused("raw", folder, rf"row 2 \(byte {2 * row + 36}\): a weight of table 'T0' is not finite")


def test_jagged(converted: Any) -> None:
    folder = converted("jagged", shape=MULTI_HOT, missing=True, weighted=True)
    train = folder / "train"
    bounds = np.fromfile(train / "000.offsets.bin", "<i8")
    row = int(np.flatnonzero(np.diff(bounds))[5])
    key = int(bounds[row])
    for file, byte, content, message in (
        ("rows.bin", 7 * 16, b"\0\0\0\x01", rf"rows\.bin: row 7 \(byte {7 * 16}\): label 16777216 .*big-endian"),
        ("rows.bin", 7 * 16 + 8, b"\0\0\xc0\x7f", rf"rows\.bin: row 7 \(byte {7 * 16 + 8}\): dense column 'd1' is nan"),
        (
            "000.keys.bin",
            4 * key,
            struct.pack("<i", 1000),
            rf"000\.keys\.bin: row {row} \(byte {4 * key}\): key 1000 of table 'T0' lies outside its rows 0 \.\. 999",
        ),
        ("000.keys.bin", 4 * key, struct.pack("<i", -1), rf"row {row} \(byte {4 * key}\): key -1 of table 'T0'"),
        (
            "000.keys.bin",
            4 * key,
            struct.pack(">i", 999),
            rf"row {row} \(byte {4 * key}\): key -419233792 .*big-endian",
        ),
        (
            "000.weights.bin",
            4 * key,
            struct.pack("<f", np.nan),
            rf"000\.weights\.bin: row {row} \(byte {4 * key}\): a weight of table 'T0' is not finite",
        ),
        (
            "000.offsets.bin",
            8 * row + 8,
            struct.pack("<q", 1 << 40),
            rf"000\.offsets\.bin: row {row} \(byte {8 * row}\): offsets {key} and {1 << 40} are not a bag",
        ),
        (
            "000.offsets.bin",
            8 * row + 8,
            struct.pack("<q", key + 4),
            rf"000\.offsets\.bin: row {row} \(byte {8 * row}\): offsets {key} and {key + 4} are not a bag of at most 3",
        ),
        ("000.offsets.bin", 0, struct.pack("<q", 2), r"000\.offsets\.bin: row 0 \(byte 0\): the first offset is 2"),
    ):
        good = (train / file).read_bytes()
        poke(train / file, byte, content)
        refused("jagged", folder, message)
        (train / file).write_bytes(good)


@pytest.mark.parametrize(
    ("file", "dtype", "message"),
    [
        ("000.offsets.bin", "<i8", r"last offset of .*000\.offsets\.bin \(byte 1600\) asks for \d+ keys .*big-endian"),
        ("002.keys.bin", "<i4", r"002\.keys\.bin: row \d+ \(byte \d+\): key -?\d+ of table 'T2' .*big-endian"),
    ],
)
def test_jagged_of_the_other_byte_order(converted: Any, file: str, dtype: str, message: str) -> None:
    folder = converted("jagged", shape=MULTI_HOT, rows=200)
    swap(folder / "train" / file, dtype)
    refused("jagged", folder, message)


def test_jagged_files_of_another_size(converted: Any) -> None:
    folder = converted("jagged", shape=MULTI_HOT, weighted=True)
    for file, unit, size in (
        ("rows", "row", 16),
        ("000.offsets", "offset", 8),
        ("000.keys", "key", 4),
        ("000.weights", "weight", 4),
    ):
        path = folder / "train" / f"{file}.bin"
        good = path.read_bytes()
        last, wanted = len(good) // size - 1, f"bytes where the manifest needs {len(good)}"
        for content, place in (
            (good[:-1], f"truncated, {len(good) - 1} {wanted} (cut at {unit} {last}, byte {len(good) - 1})"),
            (good + b"\0", f"oversized, {len(good) + 1} {wanted} (ends at {unit} {last + 1}, byte {len(good)})"),
        ):
            path.write_bytes(content)
            refused("jagged", folder, re.escape(f"{path}: {place}"))
        path.write_bytes(good)


def test_wide_keys_of_the_other_byte_order(converted: Any) -> None:
    folder = converted("raw", write=WriteOptions(key_dtype="int64"))
    row = 4 + 3 * 4 + 4 * 8
    poke(folder / "train.bin", 7 * row + 16, struct.pack(">q", 5))
    refused("raw", folder, rf"row 7 \(byte {7 * row + 16}\): key {5 << 56} of table 'T0' .*is the file big-endian")
