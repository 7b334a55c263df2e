"""Damaged files of Norm, split binary and Criteo text are refused with one sentence that names file, row and byte."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_cases import MULTI_HOT, poke, read_all, read_rows, refused, swap

from dlrm.errors import DataError
from pipeline.convert import format_named
from pipeline.formats.interchange import ReadOptions, WriteOptions


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
        (at + 16, struct.pack("<i", 1 << 24), rf"row 7 \(byte {at + 16}\): nnz 16777216 .*--source-key-dtype"),
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
    refused(
        "norm",
        folder,
        rf"0\.data: row 49 \(byte {len(good) - 8}\): nnz 1 .* than the file, of {len(good) - 3} .*truncated",
    )
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
    refused("norm", folder, "--source-offset-keys: .* give them with --rows", offset_keys=True)
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
    (train / "cat_0.bin").write_bytes(content)
    labels = (train / "label.bin").read_bytes()
    for cut, kind, place in ((labels[:-3], "truncated", 47), (labels + b"\0", "oversized", 50)):
        (train / "label.bin").write_bytes(cut)
        message = rf"label\.bin: {kind}, {len(cut)} labels .* the other files have 50 rows .* row and byte {place}\)"
        refused("split-binary", folder, message)
    (train / "label.bin").write_bytes(labels)
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
        (
            "dtype: int16",
            "dtype: int99",
            r"feature_spec\.yaml: feature_spec\.T0\.dtype: 'int99'; NumPy knows no such type",
        ),
        ("dtype: int16", "dtype: int64", r"feature 'T0' has dtype int64, but must be int8 or int16 or int32"),
        ("dtype: bool", "dtype: float32", r"feature 'label' has dtype float32"),
        ("channel_spec", "channels", r"feature_spec\.yaml: no feature specification .*channel_spec: missing"),
        ("cardinality:", "size:", r"feature_spec\.yaml: feature_spec\.T0\.cardinality: missing"),
        ("  categorical:\n", "  categorical:\n  - T9\n", r"feature_spec\.yaml: feature_spec\.T9: missing"),
        ("    files:\n", "    file:\n", r"feature_spec\.yaml: .*source_spec\.train\.0\.files: missing"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"\(empty, but needs feature_spec, channel_spec and source_spec\)"),
        ("# nothing\n", r"\(empty, but needs"),
        ("- a\n", r"\(holds list, but needs"),
        ("a: [1", r"\(not YAML: .*line 1"),
        ("feature_spec:\nchannel_spec: {}\nsource_spec: {}\n", r"\(feature_spec: .*, not None\)"),
        ("feature_spec: {}\nchannel_spec: {}\n", r"\(source_spec: missing"),
        ("feature_spec: {a: }\nchannel_spec: {}\nsource_spec: {}\n", r"\(feature_spec\.a: .*, not None\)"),
        ("feature_spec: {}\nchannel_spec: {}\nsource_spec: {train: }\n", r"\(source_spec\.train: .*, not None\)"),
        ("feature_spec: {}\nchannel_spec: {}\nsource_spec: {train: []}\n", r"channel_spec\.label: \[\], but"),
    ],
)
def test_a_feature_specification_that_lacks_something_names_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "feature_spec.yaml").write_text(text)
    refused("split-binary", tmp_path, r"feature_spec\.yaml: .*" + message)


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
    message = r"t\.tsv\.gz: damaged or truncated gzip .* after \d+ whole lines \(\d+ bytes of text\)"
    with pytest.raises(DataError, match=message) as caught:
        read.extend(block.rows for block in blocks)  # what can be read comes first
    row, byte = (int(number) for number in re.findall(r"after (\d+) whole lines \((\d+) bytes", str(caught.value))[0])
    assert sum(read) == row > 30_000
    assert byte == row * (len(GOOD) + 1)
