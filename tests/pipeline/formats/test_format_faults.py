"""Damaged files of every format are refused with one sentence that names file, row and byte."""

from __future__ import annotations

import gzip
import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from format_cases import MULTI_HOT, read_rows

from dlrm.errors import DataError
from pipeline.convert import convert, format_named
from pipeline.formats.interchange import ReadOptions, WriteOptions


def read_all(name: str, path: Path, **options: Any) -> None:
    """Read every row."""
    source = format_named(name).read(path, ReadOptions(**options))
    for split in source.splits:
        for _ in source.blocks(split):
            pass


def refused(name: str, path: Path, message: str, **options: Any) -> None:
    with pytest.raises(DataError, match=message):
        read_all(name, path, **options)


def poke(path: Path, byte: int, content: bytes) -> None:
    """Overwrite bytes of a file."""
    old = path.read_bytes()
    path.write_bytes(old[:byte] + content + old[byte + len(content) :])


def swap(path: Path, dtype: str) -> None:
    """Turn the bytes of every value round."""
    np.fromfile(path, dtype).byteswap().tofile(path)


@pytest.fixture
def converted(prepared: Any, tmp_path: Path) -> Callable[..., Path]:
    """A folder of one format, its split ``train`` with 50 rows."""

    def make(name: str, *, write: WriteOptions | None = None, **options: Any) -> Path:
        source = prepared(**options)
        losses = frozenset({"fp16-dense"} if name == "split-binary" else ())
        convert(source, tmp_path / "out", to=name, write=write, allow=losses)  # type: ignore[arg-type]
        return tmp_path / "out"

    return make


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


def norm_rows(path: Path, *, check_sum: bool, num_dense: int = 3, slots: int = 4) -> list[int]:
    """Byte of each row's label, walked by hand."""
    data = path.read_bytes()
    place, starts = (69 if check_sum else 64), []
    while place < len(data):
        place += 4 if check_sum else 0
        starts.append(place)
        place += 4 * (1 + num_dense)
        for _ in range(slots):
            place += 4 + 4 * struct.unpack_from("<i", data, place)[0]
        place += 1 if check_sum else 0
    return starts


def test_norm(converted: Any) -> None:
    folder = converted("norm")
    path = folder / "train" / "0.data"
    good, starts = path.read_bytes(), norm_rows(path, check_sum=False)
    assert len(starts) == 50
    at = starts[7]
    for byte, content, message in (
        (at, struct.pack("<f", 2), rf"0\.data: row 7 \(byte {at}\): label 2.0 is neither 0 nor 1"),
        (at + 8, struct.pack("<f", np.nan), rf"row 7 \(byte {at + 8}\): dense column 'd1' is nan"),
        (at + 16, struct.pack("<i", -1), rf"row 7 \(byte {at + 16}\): nnz -1 of a slot is no number of keys"),
        (at + 16, struct.pack("<i", 1 << 24), rf"row 7 \(byte {at + 16}\): nnz 16777216 .*big-endian.*--key-dtype"),
        (at + 20, struct.pack("<i", 1000), rf"row 7 \(byte {at + 20}\): key 1000 of table 'T0' lies outside"),
        (8, struct.pack("<q", 49), rf"0\.data: oversized: 49 samples end at byte {starts[49]}, but the file has"),
        (8, struct.pack("<q", 51), rf"row 50 \(byte {len(good)}\): truncated: the file ends at byte {len(good)}"),
        (0, struct.pack("<q", 7), r"0\.data: bad header \(byte 0\): error_check 7"),
        (0, struct.pack("<q", 1), r"0\.data: bad header \(byte 0\): error_check 1"),
        (16, struct.pack("<q", 2), r"header \(byte 16\): label_dim 2; Crosslane trains on one label"),
        (32, struct.pack("<q", 5), r"tells of 3 dense columns and 4 tables, but the data have 3 and 5"),
        (0, np.frombuffer(good, "<i8", 8).byteswap().tobytes(), r"bad header .*; it is big-endian"),
    ):
        poke(path, byte, content)
        refused("norm", folder, message)
        path.write_bytes(good)
    path.write_bytes(good[:-3])
    refused("norm", folder, rf"0\.data: row 49 \(byte {len(good) - 8}\): nnz 1 of a slot|row 49 .*truncated")
    path.write_bytes(good[:40])
    refused("norm", folder, r"0\.data: truncated, 40 bytes are no header of 64")
    path.unlink()
    refused("norm", folder, r"0\.data: no such file, but the file list names it")


def test_norm_with_check_sums(converted: Any) -> None:
    folder = converted("norm", write=WriteOptions(check_sum=True))
    path = folder / "train" / "0.data"
    good, starts = path.read_bytes(), norm_rows(path, check_sum=True)
    at, end = starts[7], starts[8] - 5
    for byte, content, message in (
        (at + 5, bytes([good[at + 5] ^ 1]), rf"0\.data: row 7 \(byte {end}\): check-sum {good[end]} is not the sum"),
        (end, bytes([good[end] ^ 255]), rf"row 7 \(byte {end}\): check-sum {good[end] ^ 255} is not the sum"),
        (at - 4, struct.pack("<i", 3), rf"row 7 \(byte {at - 4}\): length 3 of a sample does not fit"),
        (at - 4, struct.pack("<i", 1 << 30), rf"row 7 \(byte {at - 4}\): truncated"),
        (20, b"\x02", r"0\.data: header \(byte 68\): check-sum \d+, but its bytes sum to \d+"),
    ):
        poke(path, byte, content)
        refused("norm", folder, message)
        path.write_bytes(good)
    path.write_bytes(good[:-1])
    refused("norm", folder, rf"0\.data: row 49 \(byte {starts[49] - 4}\): truncated")


def test_norm_without_what_lies_beside_it(converted: Any) -> None:
    folder = converted("norm", write=WriteOptions(key_dtype="int64"), shape=MULTI_HOT, missing=True)
    wanted = read_rows(folder)
    (folder / "crosslane.json").unlink()
    source = format_named("norm").read(folder, ReadOptions(offset_keys=True, table_rows=(1000, 50, 70_000)))
    assert source.schema.key_dtype == "int64"
    assert read_rows(folder, offset_keys=True, table_rows=(1000, 50, 70_000)).bags == wanted.bags
    refused("norm", folder, "give them with --rows", offset_keys=True)
    refused("norm", folder, "--rows: 2 numbers for 3 tables", table_rows=(1, 2))
    refused("norm", folder, r"key \d+ of table 'C2' lies outside", table_rows=(1000, 50, 70_000))
    refused("norm", folder, r"0\.data: (row \d+ .*(nnz|truncated)|oversized)", key_dtype="int32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2\n0.data\n", r"file_list\.txt: line 1 says 2 files, but 1 follow"),
        ("x\n0.data\n", r"file_list\.txt: line 1: 'x', but a file list starts with the number of files"),
        ("", r"file_list\.txt: line 1: ''"),
        ("\0" * 1600, r"line 1: '(\\x00){40}' and more, but a file list starts with the number of files$"),
        ("0\n", "name no file"),
    ],
)
def test_file_list(converted: Any, text: str, message: str) -> None:
    folder = converted("norm")
    (folder / "train" / "file_list.txt").write_text(text)
    (folder / "test" / "file_list.txt").unlink()
    refused("norm", folder, message)


def test_split_binary(converted: Any) -> None:
    folder = converted("split-binary")
    train = folder / "train"
    for file, byte, content, message in (
        ("label.bin", 7, b"\x02", r"label\.bin: row 7 \(byte 7\): label 2 is neither 0 nor 1"),
        (
            "numerical.bin",
            7 * 6 + 2,
            b"\x00\x7e",
            rf"numerical\.bin: row 7 \(byte {7 * 6 + 2}\): dense column 'd1' is nan",
        ),
        ("cat_0.bin", 14, b"\xe8\x03", r"cat_0\.bin: row 7 \(byte 14\): key 1000 of table 'T0' lies outside"),
        ("cat_1.bin", 7, b"\x9c", r"cat_1\.bin: row 7 \(byte 7\): key -100 of table 'T1' lies outside"),
        ("cat_2.bin", 7, b"\xff", r"cat_2\.bin: row 7 \(byte 7\): table 'T2' has no key \(-1\)"),
        ("cat_3.bin", 28, b"\x00\x01\x00\x00" * 2, None),
        ("cat_3.bin", 28, b"\x00\x00\x01\x00"[::-1], r"cat_3\.bin: row 7 \(byte 28\): key 256|big-endian"),
    ):
        good = (train / file).read_bytes()
        poke(train / file, byte, content)
        if message is None:
            read_all("split-binary", folder)
        elif "256" not in message:
            refused("split-binary", folder, message)
        (train / file).write_bytes(good)
    content = (train / "cat_0.bin").read_bytes()
    for cut, kind in ((content[:-1], "truncated"), (content + b"\0", "oversized")):
        (train / "cat_0.bin").write_bytes(cut)
        place = r"\(2 bytes a row, row (49 at byte 99|50 at byte 100)\)"
        refused("split-binary", folder, rf"cat_0\.bin: {kind}, {len(cut)} bytes, but 50 labels need 100 {place}")
    (train / "cat_0.bin").unlink()
    refused("split-binary", folder, r"cat_0\.bin: No such file.*feature_spec\.yaml names it")


@pytest.mark.parametrize(("file", "dtype", "limit"), [("cat_0.bin", "<i2", 1000), ("cat_3.bin", "<i4", 70_000)])
def test_split_binary_of_the_other_byte_order(converted: Any, file: str, dtype: str, limit: int) -> None:
    folder = converted("split-binary", rows=200)  # of so many keys one is too large the other way round
    swap(folder / "train" / file, dtype)
    refused("split-binary", folder, rf"{file}: row \d+ \(byte \d+\): key -?\d+ of table .* outside.*big-endian")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dtype: int16", "dtype: int99", r"feature_spec\.yaml: no feature specification"),
        ("dtype: int16", "dtype: int64", r"feature 'T0' has dtype int64, but must be int8 or int16 or int32"),
        ("dtype: bool", "dtype: float32", r"feature 'label' has dtype float32"),
        ("channel_spec", "channels", r"no feature specification .*'channel_spec'"),
        ("train/cat_0.bin", "train/cat_9.bin", r"cat_9\.bin: No such file"),
        ("  - T0\n    files:", "  - T0\n    - T1\n    files:", r"features \['T0', 'T1'\] in one file"),
        (
            "label:\n  - label",
            "label:\n  - label\n  - T0",
            r"channel_spec\.label: \['label', 'T0'\], but there must be one",
        ),
        ("type: split_binary", "type: parquet", r"needs chunks of type split_binary"),
    ],
)
def test_feature_specification(converted: Any, old: str, new: str, message: str) -> None:
    folder = converted("split-binary")
    path = folder / "feature_spec.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    refused("split-binary", folder, message)


def npy_start(path: Path) -> int:
    return path.read_bytes().index(b"\n") + 1


def test_torchrec(converted: Any) -> None:
    folder = converted("torchrec-npy")
    dense, sparse, labels = (folder / f"train_{part}.npy" for part in ("dense", "sparse", "labels"))
    starts = {path: npy_start(path) for path in (dense, sparse, labels)}
    for path, byte, content, message in (
        (labels, 28, struct.pack("<i", 3), rf"train_labels\.npy: row 7 \(byte {starts[labels] + 28}\): label 3"),
        (
            dense,
            88,
            struct.pack("<f", np.inf),
            rf"train_dense\.npy: row 7 \(byte {starts[dense] + 88}\): dense column 'd1'",
        ),
        (
            sparse,
            116,
            struct.pack("<i", 100),
            rf"train_sparse\.npy: row 7 \(byte {starts[sparse] + 116}\): key 100 .*'T1'",
        ),
        (sparse, 116, struct.pack("<i", -7), rf"row 7 \(byte {starts[sparse] + 116}\): key -7 of table 'T1'"),
        (sparse, 116, struct.pack(">i", 99), r"key 1660944384 of table 'T1' .*big-endian"),
    ):
        good = path.read_bytes()
        poke(path, starts[path] + byte, content)
        refused("torchrec-npy", folder, message)
        path.write_bytes(good)
    good = sparse.read_bytes()
    for content, message in (
        (good[:-1], rf"train_sparse\.npy: truncated, {len(good) - 1} bytes where .* \(row 49, byte {len(good) - 1}\)"),
        (good + b"\0", rf"train_sparse\.npy: oversized, {len(good) + 1} bytes where .* \(row 50, byte {len(good)}\)"),
        (b"PNG" + good[3:], r"train_sparse\.npy: bad header \(byte 0\)"),
        (good[:20], r"train_sparse\.npy: bad header \(byte 0\)"),
        (good.replace(b"<i4", b">i4", 1), r"train_sparse\.npy: values of type >i4 are big-endian"),
        (good.replace(b"<i4", b"<f4", 1), r"train_sparse\.npy: array of float32 \[50, 4\], but must be of kind i "),
        (good.replace(b"(50, 4)", b"(40, 5)", 1), r"array of int32 \[40, 5\], but must be .* shape \[50, any\]"),
    ):
        sparse.write_bytes(content)
        refused("torchrec-npy", folder, message)
    sparse.unlink()
    refused("torchrec-npy", folder, r"train_sparse_multi_hot\.npz")


def test_torchrec_multi_hot(converted: Any) -> None:
    folder = converted("torchrec-npy", shape=MULTI_HOT)
    path = folder / "train_sparse_multi_hot.npz"
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("2.npy").header_offset
    start = member + 30 + len("2.npy")
    good = path.read_bytes()
    start += good[start:].index(b"\n") + 1
    poke(path, start + 4 * (7 * 5 + 3), b"\xff\xff\xff\x7f")
    message = rf"\(Bad CRC-32 for file '2\.npy', which starts at byte {member}\)"
    refused("torchrec-npy", folder, rf"multi_hot\.npz: damaged or truncated .npz {message}")
    path.write_bytes(good[: len(good) // 2])
    refused("torchrec-npy", folder, r"multi_hot\.npz")


def test_facebook(prepared: Any, tmp_path: Path) -> None:
    convert(prepared(dense_dtype="int32", least=0), tmp_path / "out", to="facebook-npz")
    (tmp_path / "out" / "test.npz").unlink()
    path = tmp_path / "out" / "train.npz"
    good = dict(np.load(path).items())

    def changed(name: str, index: Any, value: Any, dtype: str = "<i4") -> None:
        array = good[name].astype(dtype)
        array[index] = value
        np.savez(path, **{**good, name: array})

    start = 128  # of a .npy file whose header is short
    for name, index, value, dtype, message in (
        ("y", 7, 2, "<i4", rf"train\.npz: y: row 7 \(byte {start + 28}\): label 2 is neither"),
        ("X_int", (7, 1), -1, "<i4", rf"train\.npz: X_int: row 7 \(byte {start + 88}\): count -1 is negative"),
        ("X_int", (7, 1), 0.5, "<f8", rf"X_int: row 7 \(byte {start + 176}\): 0.5 is no whole number"),
        ("X_int", (7, 1), np.nan, "<f8", r"X_int: row 7 .*: nan is no whole number"),
        ("X_int", (7, 1), 2**31, "<i8", rf"X_int: row 7 \(byte {start + 176}\): 2147483648 is no whole number of 32"),
        ("X_cat", (7, 1), 100, "<i4", rf"X_cat: row 7 \(byte {start + 116}\): key 100 of table 'T1' lies outside"),
        ("X_cat", (7, 1), 5, ">i4", r"X_cat: values of type >i4 are big-endian"),
    ):
        changed(name, index, value, dtype)
        refused("facebook-npz", tmp_path / "out", message)
    np.savez(path, X_int=good["X_int"], X_cat=good["X_cat"][:-1], y=good["y"])
    refused("facebook-npz", tmp_path / "out", r"X_cat: array of int32 \[49, 4\], but must be .* \[50, any\]")
    np.savez(path, X_int=good["X_int"], y=good["y"])
    refused("facebook-npz", tmp_path / "out", r"no \.npz file with X_int, X_cat and y")
    np.savez_compressed(path, **good)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("X_cat.npy")
    poke(path, info.header_offset + 30 + len("X_cat.npy") + 20 + info.compress_size // 2, b"\x55\xaa\x55\xaa")
    refused("facebook-npz", tmp_path / "out", r"train\.npz: (damaged or truncated .npz|X_cat: bad header)")


def test_parquet(converted: Any) -> None:
    folder = converted("parquet", write=WriteOptions(rows_per_file=20), shape=MULTI_HOT)
    path = folder / "train" / "1.parquet"
    frame = pl.read_parquet(path, glob=False)

    def put(column: str, values: Any) -> None:
        frame.with_columns(pl.Series(column, values)).write_parquet(path)

    labels, dense, lists = (frame[name].to_list() for name in ("label", "d1", "T0"))
    for column, values, message in (
        ("label", [2.0, *labels[1:]], r"1\.parquet: row 0: label -1 is neither 0 nor 1"),
        ("label", [*labels[:7], None, *labels[8:]], r"1\.parquet: row 7: column 'label' is null"),
        ("d1", [*dense[:7], float("nan"), *dense[8:]], r"1\.parquet: row 7: dense column 'd1' is nan"),
        ("d1", [*dense[:7], 0.1, *dense[8:]], r"row 7: dense column 'd1' is .*0.1.*, which 32 bits do not hold"),
        ("T0", [*lists[:7], [1, 1000], *lists[8:]], r"row 7: key 1000 of table 'T0' lies outside its rows 0 \.\. 999"),
        ("T0", [*lists[:7], [1, -2], *lists[8:]], r"row 7: key -2 of table 'T0'"),
        ("T0", [*lists[:7], [1, 2, 3, 4], *lists[8:]], r"row 7: 4 keys in column 'T0', but .* at most 3"),
        ("T0", [*lists[:7], [1, None], *lists[8:]], r"1\.parquet: row 7: a key in a list of column 'T0' is null"),
        ("T0", [*lists[:7], None, *lists[8:]], r"row 7: column 'T0' is null"),
        ("T1", ["a"] * 20, r"1\.parquet: column 'T1' has type String"),
    ):
        put(column, values)
        refused("parquet", folder, message)
    frame[:-1].write_parquet(path)
    refused("parquet", folder, r"1\.parquet: 19 rows, but .*_metadata\.json says 20")
    frame.drop("T2").write_parquet(path)
    refused("parquet", folder, r"1\.parquet: no column 'T2', only label")
    path.write_bytes(path.read_bytes()[:-9])
    refused("parquet", folder, r"1\.parquet: not a readable Parquet file")
    path.unlink()
    refused("parquet", folder, r"1\.parquet: no such file")


def test_parquet_metadata(converted: Any) -> None:
    folder = converted("parquet")
    path = folder / "train" / "_metadata.json"
    values = json.loads(path.read_text())
    for change, message in (
        ({"labels": []}, r"_metadata\.json: labels \[\]; Crosslane trains on one label"),
        ({"cats": "C1"}, r"_metadata\.json: cats must be a list of objects"),
        ({"conts": [{"col_name": "d9", "index": 1}]}, r"0\.parquet: no column 'd9'"),
    ):
        path.write_text(json.dumps({**values, **change}))
        refused("parquet", folder, message)
    path.write_text("{")
    refused("parquet", folder, r"_metadata\.json: not a Parquet data set's metadata")


def test_doubles_are_rounded_where_that_is_allowed(converted: Any) -> None:
    folder = converted("parquet")
    path = folder / "train" / "0.parquet"
    frame = pl.read_parquet(path, glob=False).with_columns(d1=pl.Series([0.1] * 50, dtype=pl.Float64))
    frame.write_parquet(path)
    found = read_rows(folder, allow=frozenset({"fp32-dense"}))
    np.testing.assert_array_equal(found.dense[:, 1], np.float32(0.1))


GOOD = "\t".join(["1", *["5"] * 13, *["0000000a"] * 26])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD[:-9], r"39 columns, but a row has 40"),
        (GOOD + "\t1", r"more than 40 columns"),
        ("2" + GOOD[1:], r"column 1 \(label\): '2', but must be 0 or 1"),
        (GOOD.replace("\t5\t", "\t5.5\t", 1), r"column 2 \(I1\): '5.5', but must be an integer"),
        (GOOD.replace("\t5\t", "\t2147483648\t", 1), r"column I1: 2147483648 does not fit 32 bits"),
        (GOOD[:5] + "2147483648" + GOOD[5:], r"column I2: 52147483648 does not fit 32 bits"),
        (GOOD.replace("\t5\t", "\t-2147483648\t", 1), r"column I1: -2147483648 does not fit 32 bits"),
        (GOOD[:-1], r"column 40 \(C26\): '0000000', but must be 8 hexadecimal digits"),
        (GOOD[:-1] + "g", r"column 40 \(C26\): '0000000g'"),
    ],
)
def test_criteo_text(tmp_path: Path, line: str, message: str) -> None:
    rows = [GOOD] * 30_000  # more than one piece of the file
    rows[25_000] = line
    (tmp_path / "t.tsv").write_text("\n".join(rows) + "\n")
    start = 25_000 * (len(GOOD) + 1)
    with pytest.raises(DataError, match=rf"t\.tsv: row 25000 \(byte \d+\): {message}") as caught:
        read_all("criteo-tsv", tmp_path / "t.tsv")
    byte = int(str(caught.value).split("(byte ")[1].split(")")[0])
    assert start <= byte <= start + len(line)


def test_criteo_keys_beyond_their_tables(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text((GOOD + "\n") * 3)
    message = rf"t\.tsv: row 0 \(byte {len(GOOD) - 8 - 9 * 24}\): key 10 of table 'C2' lies"
    refused("criteo-tsv", tmp_path / "t.tsv", message, table_rows=(11, *[10] * 25))
    refused("criteo-tsv", tmp_path / "t.tsv", "--rows: 2 numbers for 26 tables", table_rows=(11, 11))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"crosslane\.json: "),
        ('{"name": "x", "dense_names": [], "dense": "float32", "tables": []}', "tells of 0 dense columns and 0 tables"),
        ('{"name": "x", "unknown": 1}', r"crosslane\.json: .*unknown"),
    ],
)
def test_what_lies_beside_data_must_fit_it(converted: Any, content: str, message: str) -> None:
    folder = converted("torchrec-npy")
    (folder / "crosslane.json").write_text(content)
    refused("torchrec-npy", folder, message)


def test_criteo_text_names_the_byte_at_which_a_field_starts(tmp_path: Path) -> None:
    rows = [GOOD] * 30_000
    for line, field, message in (
        (GOOD.replace("\t5\t", "\t99999999999\t", 1), 2, "column I1: 99999999999 does not fit"),
        (GOOD[:-8] + "7fffffff", len(GOOD) - 8, "key 2147483647 of table 'C26' lies outside"),
    ):
        rows[25_000] = line
        (tmp_path / "t.tsv").write_text("\n".join(rows) + "\n")
        byte = 25_000 * (len(GOOD) + 1) + field
        place = rf"t\.tsv: row 25000 \(byte {byte}\)"
        refused("criteo-tsv", tmp_path / "t.tsv", f"{place}: {message}", table_rows=(2**31 - 1,) * 26)


def test_packed_text_that_is_cut_short_names_what_is_lost(tmp_path: Path, rng: np.random.Generator) -> None:
    lines = [GOOD[:-8] + f"{key:08x}" for key in rng.integers(0, 2**32, 150_000)]
    packed = gzip.compress(("\n".join(lines) + "\n").encode(), compresslevel=1)
    path = tmp_path / "t.tsv.gz"
    path.write_bytes(packed[: len(packed) * 9 // 10])
    blocks = format_named("criteo-tsv").read(path, ReadOptions()).blocks("train")
    read: list[int] = []
    message = r"t\.tsv\.gz: damaged or truncated gzip .* row \d+ \(byte \d+ of the text\)"
    with pytest.raises(DataError, match=message) as caught:
        read.extend(block.rows for block in blocks)  # what can be read comes first
    row, byte = (int(number) for number in re.findall(r"row (\d+) \(byte (\d+)", str(caught.value))[0])
    assert sum(read) == row > 30_000
    assert byte == row * (len(GOOD) + 1)
