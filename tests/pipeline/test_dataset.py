"""Manifest, writer and files of a prepared data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from dlrm.errors import DataError
from embedding.jagged import Jagged
from pipeline.dataset import Ceilings, DatasetWriter, TableInfo, load_dataset

TABLES = (TableInfo(name="a", rows=50), TableInfo(name="b", rows=7))
NAMES = ("x", "y", "z")


def sample(rng: np.random.Generator, rows: int) -> tuple[Any, Any, Any]:
    labels = rng.integers(0, 2, rows)
    dense = rng.normal(size=(rows, 3)).astype(np.float32)
    return labels, dense, np.stack([rng.integers(0, 50, rows), rng.integers(0, 7, rows)], axis=1)


def small(path: Path, rng: np.random.Generator, **options: Any) -> Path:
    options = {"name": "small", "dense_names": NAMES, "tables": TABLES, **options}
    with DatasetWriter(path, **options) as writer:
        writer.write("train", *sample(rng, 40))
        writer.write("test", *sample(rng, 9))
        return writer.finish(licence="CC0", source="a test", notes=["none"], ceilings=None)


def edit(path: Path, **changes: Any) -> None:
    file = path / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_row_lies_on_disk_as_the_format_says(tmp_path: Path) -> None:
    with DatasetWriter(
        tmp_path,
        name="bytes",
        dense_names=["x", "y"],
        tables=[TableInfo(name="a", rows=2**33), TableInfo(name="b", rows=9, hotness=2)],
        key_dtype="int64",
        weighted=True,
    ) as writer:
        keys = np.array([[2**32 + 5, 8, -1]])
        writer.write("train", np.array([1]), np.array([[1.0, -2.5]]), keys, np.array([[0.5, 0.25, 9.0]], np.float32))
        writer.finish()
    expected = bytes.fromhex(
        "01000000"  # label
        "0000803f 000020c0"  # 1.0, -2.5
        "0500000001000000 0800000000000000 ffffffffffffffff"
        "0000003f 0000803e 00000000"  # the weight of a missing key is 0
    )
    assert (tmp_path / "train.bin").read_bytes() == expected


def test_criteo_rows_take_160_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    tables = [TableInfo(name=f"C{t}", rows=100) for t in range(26)]
    with DatasetWriter(tmp_path, name="criteo", dense_names=[f"I{n}" for n in range(13)], tables=tables) as writer:
        writer.write("train", np.zeros(3), rng.normal(size=(3, 13)), rng.integers(0, 100, (3, 26)))
        writer.finish()
    assert (tmp_path / "train.bin").stat().st_size == 3 * 160
    assert load_dataset(tmp_path).manifest.splits["train"].files[0].bytes == 480


def test_manifest_carries_every_field(tmp_path: Path, rng: np.random.Generator) -> None:
    ceilings = Ceilings(best=0.9, best_additive=0.8, dense_only=0.7)
    with DatasetWriter(tmp_path, name="all", dense_names=NAMES, tables=[TableInfo(name="a", rows=0)]) as writer:
        labels, dense, keys = sample(rng, 20)
        writer.write("train", labels, dense, keys[:, :1])
        writer.finish(table_rows=[51], frequency_ordered=True, licence="L", source="S", notes=["N"], ceilings=ceilings)
    dataset = load_dataset(str(tmp_path))
    assert dataset.tables == (TableInfo(name="a", rows=51, hotness=1, frequency_ordered=True),)
    assert (dataset.name, dataset.num_dense, dataset.manifest.licence) == ("all", 3, "L")
    summary = dataset.summary()
    assert summary["ceilings"] == {"best": 0.9, "best_additive": 0.8, "dense_only": 0.7}
    assert summary["splits"] == {"train": 20}
    assert summary["source"] == "S"
    assert json.loads(json.dumps(summary)) == summary
    file = dataset.manifest.splits["train"].files[0]
    assert file.checksum == f"xxh128:{xxhash.xxh3_128_hexdigest((tmp_path / file.path).read_bytes())}"
    assert dataset.verify() == ()


def test_chunks_join_to_one_split(tmp_path: Path, rng: np.random.Generator) -> None:
    parts = [sample(rng, rows) for rows in (5, 0, 1, 30)]
    with DatasetWriter(tmp_path, name="chunks", dense_names=NAMES, tables=TABLES) as writer:
        for part in parts:
            writer.write("train", *part)
        writer.finish()
    batch = load_dataset(tmp_path).split("train").read(slice(None))
    np.testing.assert_array_equal(batch.labels, np.concatenate([labels for labels, _, _ in parts]))
    np.testing.assert_array_equal(batch.dense, np.concatenate([dense for _, dense, _ in parts]))
    np.testing.assert_array_equal(batch.keys.keys.reshape(2, -1).T, np.concatenate([keys for _, _, keys in parts]))


@pytest.mark.parametrize("layout", ["raw", "jagged"])
def test_a_file_of_another_size_is_refused(tmp_path: Path, rng: np.random.Generator, layout: str) -> None:
    small(tmp_path, rng, layout=layout)
    file = tmp_path / ("train.bin" if layout == "raw" else "train/001.keys.bin")
    content = file.read_bytes()
    file.write_bytes(content[:-3])
    with pytest.raises(
        DataError, match=rf"truncated, {len(content) - 3} bytes where the manifest needs {len(content)}"
    ):
        load_dataset(tmp_path)
    file.write_bytes(content + b"more")
    with pytest.raises(DataError, match=rf"oversized, {len(content) + 4} bytes"):
        load_dataset(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match="No such file"):
        load_dataset(tmp_path)


def test_verify_finds_a_flipped_bit(tmp_path: Path, rng: np.random.Generator) -> None:
    small(tmp_path, rng)
    dataset = load_dataset(tmp_path)
    dataset.verify()
    file = tmp_path / "test.bin"
    content = bytearray(file.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"test\.bin: XXH128 [0-9a-f]{32}, but the manifest says"):
        dataset.verify()


def test_missing_data_set_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no readable dataset\.json"):
        load_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "holds list"),
        ('{"version": 3}', "version 3, but this release reads versions 1 and 2"),
        ('{"name": "x"}', "layout: missing"),
    ],
)
def test_malformed_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(tmp_path)
    assert str(tmp_path / "dataset.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "colour: unknown field"),
        ({"key_dtype": "int16"}, "key_dtype: "),
        ({"tables": []}, "40 rows take 640"),
        ({"dense": {"names": list(NAMES), "dtype": "int32"}}, "does not go with"),
        ({"tables": [{"name": "a", "rows": 5}, {"name": "a", "rows": 5}]}, "'a' appears 2 times"),
        ({"tables": [{"name": "a", "rows": 0}, {"name": "b", "rows": 5}]}, "'a': 0 rows"),
        ({"tables": [{"name": "a", "rows": 2**31 + 1}, {"name": "b", "rows": 5}]}, "key_dtype int64"),
        ({"tables": [{"name": "a", "rows": 5, "hotness": 0}, {"name": "b", "rows": 5, "hotness": 2}]}, "hotness 0"),
        ({"layout": "jagged"}, "listed with 960 bytes, but 40 rows take 640"),
        ({"splits": {"../up": {"rows": 0, "files": []}}}, "split '../up'"),
        ({"splits": {"train": {"rows": 0, "files": []}}}, "needs at least one file"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(
    tmp_path: Path, rng: np.random.Generator, changes: dict[str, Any], message: str
) -> None:
    small(tmp_path, rng)
    edit(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path)


def test_jagged_split_without_one_of_its_files_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    small(tmp_path, rng, layout="jagged")
    splits = json.loads((tmp_path / "dataset.json").read_text())["splits"]
    del splits["test"]["files"][2]
    edit(tmp_path, splits=splits)
    with pytest.raises(DataError, match="split 'test': lists parts"):
        load_dataset(tmp_path)


def test_row_count_that_the_files_do_not_hold_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    small(tmp_path, rng)
    splits = json.loads((tmp_path / "dataset.json").read_text())["splits"]
    splits["train"]["rows"] = 41
    edit(tmp_path, splits=splits)
    with pytest.raises(DataError, match="41 rows, but its files hold 40"):
        load_dataset(tmp_path)


def test_unknown_split_names_the_known_ones(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="no split 'valid'; it has train, test"):
        load_dataset(small(tmp_path, rng)).split("valid")


def test_rows_outside_the_split_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    split = load_dataset(small(tmp_path, rng)).split("test")
    for rows in ([9], [-1], [0, 10]):
        with pytest.raises(IndexError, match=r"outside 0 \.\. 8"):
            split.read(np.array(rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels, dense, keys: (labels + 2, dense, keys), "label is neither 0 nor 1"),
        (lambda labels, dense, keys: (labels, dense * np.nan, keys), "row 40: dense column 'x' is nan"),
        (lambda labels, dense, keys: (labels, dense[:, :2], keys), r"needs \[B\] and \[B, 3\]"),
        (lambda labels, dense, keys: (labels, dense, keys[:, :1]), r"needs integers \[4, 2\]"),
        (lambda labels, dense, keys: (labels, dense, keys + 50), "of table 'a' lies outside 0 .. 49"),
        (lambda labels, dense, keys: (labels, dense, keys * 0 - 2), "key -2 of table 'a'"),
        (lambda labels, dense, keys: (labels, dense, keys + 2**32), "key 42949673.* of table 'a'"),
        (lambda labels, dense, keys: (labels, dense, keys, keys.astype(np.float32)), "weights given, needs none"),
        (lambda labels, dense, keys: (labels, dense, Jagged(keys[:, 0], None, None, 1, 4)), "bags of 1 tables"),
    ],
)
@pytest.mark.parametrize("layout", ["raw", "jagged"])
def test_writer_refuses_what_could_not_be_read(
    tmp_path: Path, rng: np.random.Generator, layout: Any, change: Any, message: str
) -> None:
    with DatasetWriter(tmp_path, name="bad", dense_names=NAMES, tables=TABLES, layout=layout) as writer:
        writer.write("train", *sample(rng, 40))
        faulty = change(*sample(rng, 4))
        with pytest.raises(DataError, match=message):
            writer.write("train", *faulty)


def test_keys_beyond_rows_that_finish_is_told_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    tables = [TableInfo(name="a", rows=0), TableInfo(name="b", rows=7)]
    labels, dense, keys = sample(rng, 10)
    keys[3, 0] = 49
    with DatasetWriter(tmp_path, name="late", dense_names=NAMES, tables=tables) as writer:
        writer.write("train", labels, dense, keys)
        with pytest.raises(DataError, match="table 'a': key 49 was written, but the table has 49 rows"):
            writer.finish(table_rows={"a": 49, "b": 7})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["raw", "jagged"])
def test_a_writer_left_before_finish_leaves_nothing(tmp_path: Path, rng: np.random.Generator, layout: Any) -> None:
    writer = DatasetWriter(tmp_path, name="left", dense_names=NAMES, tables=TABLES, layout=layout)
    with pytest.raises(ZeroDivisionError), writer:
        writer.write("train", *sample(rng, 10 // (writer.row_words * 0)))
    with DatasetWriter(tmp_path, name="left", dense_names=NAMES, tables=TABLES, layout=layout) as writer:
        writer.write("train", *sample(rng, 10))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_data_set_is_replaced_only_when_asked(tmp_path: Path, rng: np.random.Generator) -> None:
    small(tmp_path, rng)
    before = (tmp_path / "train.bin").read_bytes()
    with pytest.raises(DataError, match="holds a data set already"):
        small(tmp_path, rng)
    assert (tmp_path / "train.bin").read_bytes() == before
    small(tmp_path, rng, overwrite=True)
    load_dataset(tmp_path).verify()


def test_an_interrupted_overwrite_leaves_the_old_set_whole(tmp_path: Path, rng: np.random.Generator) -> None:
    small(tmp_path, rng)
    before = sorted(path for path in tmp_path.rglob("*"))
    with DatasetWriter(tmp_path, name="new", dense_names=NAMES, tables=TABLES, overwrite=True) as writer:
        writer.write("train", *sample(rng, 40))
    load_dataset(tmp_path).verify()
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("layout", ["raw", "jagged"])
def test_folders_made_for_a_failed_set_go_with_it(tmp_path: Path, rng: np.random.Generator, layout: Any) -> None:
    (tmp_path / "given").mkdir()
    for folder in (tmp_path / "new" / "set", tmp_path / "given"):
        with DatasetWriter(folder, name="n", dense_names=NAMES, tables=TABLES, layout=layout) as writer:
            writer.write("train", *sample(rng, 4))
    assert list(tmp_path.rglob("*")) == [tmp_path / "given"]


def test_a_file_that_cannot_be_made_is_one_sentence(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "train.bin.part").mkdir()
    with (
        pytest.raises(DataError, match=r"train\.bin\.part: Is a directory; choose a folder that can be written"),
        DatasetWriter(tmp_path, name="n", dense_names=NAMES, tables=TABLES) as writer,
    ):
        writer.write("train", *sample(rng, 4))


def test_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose a folder that can be written"):
        DatasetWriter(tmp_path / "file" / "set", name="n", dense_names=NAMES, tables=TABLES)
