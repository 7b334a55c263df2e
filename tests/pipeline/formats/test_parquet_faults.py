"""Damaged Parquet files are refused with one sentence that names file and row, or row group and byte."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from format_cases import MULTI_HOT, assert_same, poke, read_rows, refused

from pipeline.formats.interchange import WriteOptions

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: make install")
pq = pytest.importorskip("pyarrow.parquet")


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


def test_ends_of_a_file(converted: Any) -> None:
    folder = converted("parquet", shape=MULTI_HOT)
    path = folder / "train" / "0.parquet"
    good = path.read_bytes()
    size, footer = len(good), struct.unpack("<I", good[-8:-4])[0]
    for content, message in (
        (good[:11], r"truncated, 11 bytes are no Parquet file, which has at least 12"),
        (b"PNG" + good[3:], r"bad header \(byte 0\): b'PNG1', but a Parquet file starts with b'PAR1'"),
        (good[:-9], rf"truncated at byte {size - 9}: it ends with b'.*', but a Parquet file ends with b'PAR1'"),
        (good[: size // 2], rf"truncated at byte {size // 2}: it ends with"),
        (good + b"more", rf"oversized, {size + 4} bytes where its footer ends at byte {size}"),
        (
            good[:-8] + struct.pack(">I", footer) + b"PAR1",
            rf"bad footer length \(byte {size - 8}\): .*, but only {size - 12} come .*with its bytes reversed",
        ),
        (
            good[: -8 - footer] + bytes(footer) + good[-8:],
            rf"footer \(from byte {size - 8 - footer}\): cannot be read \(",
        ),
    ):
        path.write_bytes(content)
        refused("parquet", folder, rf"0\.parquet: {message}")


def write_groups(path: Path, rng: np.random.Generator, **options: Any) -> Any:
    """Writes 60 rows in three row groups; returns pyarrow's description."""
    columns = {
        "label": pa.array(rng.integers(0, 2, 60).astype(np.float32)),
        "d": pa.array(rng.normal(size=60).astype(np.float32)),
        "a": pa.array(rng.integers(0, 100, 60)),
        "b": pa.array([[1] * int(count) for count in rng.integers(1, 4, 60)], pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(columns), path, row_group_size=20, **options)
    return pq.read_metadata(path)


@pytest.mark.parametrize("column", [0, 2, 3])
def test_a_damaged_page_names_row_group_column_and_byte(tmp_path: Path, rng: np.random.Generator, column: int) -> None:
    path = tmp_path / "0.parquet"
    chunk = write_groups(path, rng).row_group(1).column(column)
    byte = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    name = "ldab"[column].replace("l", "label")
    poke(path, byte, b"\xff" * 40)
    place = rf"0\.parquet: row 20 \(row group 1, column '{name}', from byte {byte}\): cannot be read"
    refused("parquet", path, place)
    refused("parquet", path, place, table_rows=(100, 2))


def test_a_page_that_fails_its_check_sum(tmp_path: Path, rng: np.random.Generator) -> None:
    """A value changed in place is a value like any other, unless the writer has noted sums."""
    path = tmp_path / "0.parquet"
    for noted in (False, True):
        chunk = write_groups(
            path, rng, compression="none", use_dictionary=False, write_page_checksum=noted
        ).row_group(2).column(2)  # fmt: skip
        byte = chunk.data_page_offset + chunk.total_compressed_size - 8
        value = 99 - path.read_bytes()[byte]
        poke(path, byte, struct.pack("<q", value))
        if noted:
            message = rf"row 40 \(row group 2, column 'a', from byte {chunk.data_page_offset}\): .*CRC"
            refused("parquet", path, message, table_rows=(100, 2))
        else:
            assert read_rows(path, table_rows=(100, 2)).bags[-1][0] == [value]


def test_polars_reads_the_same_where_pyarrow_is_not_installed(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0.parquet"
    chunk = write_groups(path, rng).row_group(1).column(2)
    wanted = read_rows(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert_same(read_rows(path), wanted)
    good = path.read_bytes()
    byte = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    poke(path, byte, b"\xff" * 40)
    refused("parquet", path, r"0\.parquet: one of rows 0 \.\. 59: cannot be read", table_rows=(100, 3))
    path.write_bytes(good[:-9])
    refused("parquet", path, r"0\.parquet: truncated at byte")
