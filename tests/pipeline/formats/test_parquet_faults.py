"""Damaged Parquet files are refused with one sentence that names file and row, or row group and byte."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import polars as pl
from format_cases import MULTI_HOT, read_rows, refused

from pipeline.formats.interchange import WriteOptions


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
