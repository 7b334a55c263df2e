"""Manifests over files that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from dlrm.errors import DataError
from pipeline.adopt import adopt
from pipeline.dataset import load_dataset

ROWS = [1000, 20, 3]


def dlrm_bin(path: Path, rng: np.random.Generator, rows: int) -> np.ndarray[Any, Any]:
    """Rows of facebookresearch/dlrm: int32 label, 2 counts (some missing), 3 keys in no order of frequency."""
    words = np.empty((rows, 6), "<i4")
    words[:, 0] = rng.integers(0, 2, rows)
    words[:, 1:3] = rng.integers(-2, 100, (rows, 2))
    words[:, 3:] = rng.integers(0, ROWS, (rows, 3))
    words.tofile(path)
    return words


def identity(path: Path) -> tuple[int, int, int]:
    """Which file it is and when it was written; the time of reading changes with every look."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def test_dlrm_bin_is_read_in_place(tmp_path: Path, rng: np.random.Generator) -> None:
    first, second = dlrm_bin(tmp_path / "a.bin", rng, 30), dlrm_bin(tmp_path / "b.bin", rng, 12)
    dlrm_bin(tmp_path / "c.bin", rng, 7)
    before = identity(tmp_path / "a.bin")
    out = adopt(
        {"train": [tmp_path / "a.bin", tmp_path / "b.bin"], "test": [tmp_path / "c.bin"]},
        layout="dlrm-bin",
        rows_per_table=ROWS,
        num_dense=2,
        out=tmp_path / "adopted",
    )
    assert [path.name for path in out.iterdir()] == ["dataset.json"]
    assert identity(tmp_path / "a.bin") == before
    dataset = load_dataset(out)
    assert dataset.name == "adopted"
    assert dataset.verify() == tuple(str(tmp_path / name) for name in ("a.bin", "b.bin", "c.bin"))
    assert not any(table.frequency_ordered for table in dataset.tables)
    words = np.concatenate([first, second])
    rows = rng.permutation(42)
    batch = dataset.split("train").read(rows)
    np.testing.assert_array_equal(batch.labels, words[rows, 0])
    np.testing.assert_allclose(batch.dense, np.log1p(np.maximum(words[rows, 1:3], 0.0)), rtol=1e-7)
    np.testing.assert_array_equal(batch.keys.keys.reshape(3, -1).T, words[rows, 3:])


def test_hugectr_raw_with_float_dense_and_many_wide_keys(tmp_path: Path, rng: np.random.Generator) -> None:
    record = np.dtype([("label", "<i4"), ("dense", "<f4", 3), ("keys", "<i8", 5)])
    rows = np.zeros(25, record)
    rows["label"] = rng.integers(0, 2, 25)
    rows["dense"] = rng.normal(size=(25, 3))
    rows["keys"] = rng.integers(0, 7, (25, 5))
    rows.tofile(tmp_path / "train")
    out = adopt(
        {"train": [tmp_path / "train"]},
        layout="hugectr-raw",
        rows_per_table=[7, 8],
        num_dense=3,
        dense_dtype="float32",
        hotness=[2, 3],
        key_dtype="int64",
        out=tmp_path,
        relative=True,
        checksums=True,
    )
    dataset = load_dataset(out)
    file = dataset.splits["train"].files[0]
    assert (file.path, file.checksum) == ("train", f"xxh128:{xxhash.xxh3_128_hexdigest(rows)}")
    batch = dataset.split("train").read(slice(None))
    np.testing.assert_array_equal(batch.dense, rows["dense"])
    assert batch.keys.keys.dtype == np.int64
    expected = np.concatenate([rows["keys"][:, :2].ravel(), rows["keys"][:, 2:].ravel()])
    np.testing.assert_array_equal(batch.keys.keys, expected)
    assert np.diff(batch.keys.offsets).tolist() == [2] * 25 + [3] * 25


def test_hugectr_raw_with_float_labels(tmp_path: Path, rng: np.random.Generator) -> None:
    """What HugeCTR reads with ``float_label_dense=True``."""
    record = np.dtype([("label", "<f4"), ("dense", "<f4", 2), ("keys", "<i4", 3)])
    rows = np.zeros(40, record)
    rows["label"] = np.arange(40) % 3 == 0
    rows["dense"] = rng.normal(size=(40, 2))
    rows["keys"] = rng.integers(0, 3, (40, 3))
    rows.tofile(tmp_path / "train")
    arguments: dict[str, Any] = {
        "files": {"train": [tmp_path / "train"]},
        "layout": "hugectr-raw",
        "rows_per_table": ROWS,
        "num_dense": 2,
        "dense_dtype": "float32",
        "out": tmp_path / "out",
    }
    with pytest.raises(
        DataError, match=r"row 0: label 1065353216 .* it is 1 as float32, so set label_dtype to float32"
    ):
        adopt(**arguments)
    dataset = load_dataset(adopt(**arguments, label_dtype="float32"))
    batch = dataset.split("train").read(slice(None))
    np.testing.assert_array_equal(batch.labels, rows["label"])
    np.testing.assert_array_equal(batch.dense, rows["dense"])


def test_a_big_endian_file_is_recognised(tmp_path: Path, rng: np.random.Generator) -> None:
    words = dlrm_bin(tmp_path / "t.bin", rng, 30)
    words[:, 0] = 1
    words.byteswap().tofile(tmp_path / "t.bin")
    with pytest.raises(DataError, match=r"t.bin: row 0: label 16777216 .* it is 1 in big-endian order"):
        adopt({"train": [tmp_path / "t.bin"]}, layout="dlrm-bin", rows_per_table=ROWS, num_dense=2, out=tmp_path / "o")


def test_relative_paths_move_with_the_manifest(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "data").mkdir()
    dlrm_bin(tmp_path / "data" / "t.bin", rng, 5)
    adopt(
        {"train": [tmp_path / "data" / "t.bin"]},
        layout="dlrm-bin",
        rows_per_table=ROWS,
        num_dense=2,
        out=tmp_path / "sets" / "one",
        relative=True,
    )
    (tmp_path / "moved").mkdir()
    for name in ("data", "sets"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert load_dataset(tmp_path / "moved" / "sets" / "one").split("train").rows == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_dense": 3}, r"720 bytes are no whole number of rows of 28 bytes \(20 are left over\)"),
        ({"layout": "parquet"}, "known are hugectr-raw and dlrm-bin"),
        ({"dense_dtype": "float32"}, "dlrm-bin holds int32 dense columns"),
        ({"hotness": [1, 1, 2]}, "dlrm-bin holds int32"),
        ({"hotness": [1, 1]}, "2 values of hotness for 3 tables"),
        ({"rows_per_table": [1000, 20, 1]}, r"key \d of table 'C3' lies outside its rows 0 \.\. 0"),
        ({"rows_per_table": [1000, 20, 0]}, "'C3': 0 rows"),
        ({"rows_per_table": [1000, -2, 3]}, "-2 rows of table 2; needs at least 1"),
        ({"files": {"train": []}}, "no files"),
        ({"num_dense": -2}, "-2 dense columns; needs at least 0"),
        ({"layout": "hugectr-raw", "dense_dtype": "float32"}, "look like int32, so ask for dense type int32"),
        ({"num_dense": 1, "rows_per_table": [9, 9, 9, 9]}, "of table 'C"),
    ],
)
def test_arguments_that_do_not_fit_the_file_are_refused(
    tmp_path: Path, rng: np.random.Generator, change: dict[str, Any], message: str
) -> None:
    dlrm_bin(tmp_path / "t.bin", rng, 30)
    arguments: dict[str, Any] = {
        "files": {"train": [tmp_path / "t.bin"]},
        "layout": "dlrm-bin",
        "rows_per_table": ROWS,
        "num_dense": 2,
        **change,
    }
    with pytest.raises(DataError, match=message):
        adopt(**arguments, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_will_not_do_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    dlrm_bin(tmp_path / "t.bin", rng, 30)
    (tmp_path / "empty.bin").touch()
    (tmp_path / "x").mkdir()
    good, folder, empty = tmp_path / "t.bin", tmp_path, tmp_path / "empty.bin"
    for files, message in (
        ({"train": [tmp_path / "nowhere.bin"]}, "train file .*nowhere.bin: no such file"),
        ({"train": [good], "test": [folder]}, "test file .*: not a file"),
        ({"train": [empty]}, "empty.bin: empty; a file needs at least one row"),
        ({"train": [good], "test": [good]}, "t.bin: named for train and again for test"),
        ({"train": [good, tmp_path / "x" / ".." / "t.bin"]}, "t.bin: named for train and again for train"),
    ):
        with pytest.raises(DataError, match=message):
            adopt(files, layout="dlrm-bin", rows_per_table=ROWS, num_dense=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float_columns_taken_for_counts_are_noticed(tmp_path: Path, rng: np.random.Generator) -> None:
    words = dlrm_bin(tmp_path / "t.bin", rng, 30)
    words[:, 1:3] = np.abs(rng.normal(size=(30, 2))).astype("<f4").view("<i4")
    words.tofile(tmp_path / "t.bin")
    with pytest.raises(DataError, match="look like float32, so ask for dense type float32"):
        adopt(
            {"train": [tmp_path / "t.bin"]},
            layout="hugectr-raw",
            rows_per_table=ROWS,
            num_dense=2,
            out=tmp_path / "out",
        )


def test_a_manifest_is_replaced_only_when_asked(tmp_path: Path, rng: np.random.Generator) -> None:
    dlrm_bin(tmp_path / "t.bin", rng, 5)
    arguments: dict[str, Any] = {"layout": "dlrm-bin", "rows_per_table": ROWS, "num_dense": 2, "out": tmp_path / "o"}
    adopt({"train": [tmp_path / "t.bin"]}, **arguments)
    with pytest.raises(DataError, match="holds a data set already"):
        adopt({"train": [tmp_path / "t.bin"]}, **arguments)
    adopt({"train": [tmp_path / "t.bin"]}, **arguments, name="again", overwrite=True)
    assert load_dataset(tmp_path / "o").name == "again"
