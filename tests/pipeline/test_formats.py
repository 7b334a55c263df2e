"""Random rows through writer and reader, in both layouts, against plain Python lists."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.errors import DataError
from embedding.jagged import Jagged
from pipeline.dataset import Dataset, DatasetWriter, HostBatch, TableInfo, load_dataset

Bag = list[int]


def to_bags(batch: HostBatch) -> list[list[tuple[Bag, list[float]]]]:
    """Keys and weights by table and row."""
    keys = batch.keys
    count = keys.num_tables * keys.num_rows
    offsets = np.arange(count + 1) if keys.offsets is None else keys.offsets
    assert offsets.dtype == np.int64
    assert (offsets.size, offsets[0], offsets[-1]) == (count + 1, 0, keys.keys.size)
    bags = []
    for start, stop in itertools.pairwise(offsets):
        weights = [] if keys.weights is None else keys.weights[start:stop].tolist()
        bags.append((keys.keys[start:stop].tolist(), weights))
    return [bags[t * keys.num_rows : (t + 1) * keys.num_rows] for t in range(keys.num_tables)]


def columns_of(bags: list[list[Bag]], hotness: list[int], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """[B, H] with each bag's keys in order, the missing ones anywhere between."""
    blocks = []
    for table, width in zip(bags, hotness, strict=True):
        block = np.full((len(table), width), -1, np.int64)
        for row, bag in enumerate(table):
            block[row, np.sort(rng.permutation(width)[: len(bag)])] = bag
        blocks.append(block)
    return np.concatenate(blocks, axis=1) if blocks else np.empty((0, 0), np.int64)


@given(
    seed=st.integers(0, 2**32 - 1),
    layout=st.sampled_from(["raw", "jagged"]),
    key_dtype=st.sampled_from(["int32", "int64"]),
    label_dtype=st.sampled_from(["int32", "float32"]),
    weighted=st.booleans(),
    as_jagged=st.booleans(),
    hotness=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    num_rows=st.integers(0, 30),
    num_dense=st.integers(0, 3),
    cut=st.integers(0, 30),
)
@settings(deadline=None, max_examples=40)
def test_rows_come_back_as_they_were_written(
    seed: int,
    layout: Any,
    key_dtype: Any,
    label_dtype: Any,
    weighted: bool,
    as_jagged: bool,
    hotness: list[int],
    num_rows: int,
    num_dense: int,
    cut: int,
) -> None:
    rng = np.random.default_rng(seed)
    limit = 2**40 if key_dtype == "int64" else 2**31
    bags = [[rng.integers(0, limit, rng.integers(0, h + 1)).tolist() for _ in range(num_rows)] for h in hotness]
    labels = rng.integers(0, 2, num_rows)
    dense = rng.normal(size=(num_rows, num_dense)).astype(np.float32)
    columns = columns_of(bags, hotness, rng)
    weights = rng.normal(size=columns.shape).astype(np.float32)
    wanted = [
        [
            (bag, weights[row, sum(hotness[:t]) :][: hotness[t]][columns[row, sum(hotness[:t]) :][: hotness[t]] >= 0])
            for row, bag in enumerate(table)
        ]
        for t, table in enumerate(bags)
    ]
    with tempfile.TemporaryDirectory() as folder:
        tables = [TableInfo(name=f"t{t}", rows=limit, hotness=h) for t, h in enumerate(hotness)]
        names = [f"d{n}" for n in range(num_dense)]
        with DatasetWriter(
            folder,
            name="x",
            dense_names=names,
            tables=tables,
            layout=layout,
            key_dtype=key_dtype,
            label_dtype=label_dtype,
            weighted=weighted,
        ) as writer:
            for part in (slice(0, cut), slice(cut, None)):
                if as_jagged:
                    chosen = [table[part] for table in wanted]
                    flat = [bag for table in chosen for bag, _ in table]
                    offsets = np.cumsum([0, *map(len, flat)], dtype=np.int64)
                    keys: Any = Jagged(
                        np.array([key for bag in flat for key in bag], np.int64),
                        offsets,
                        np.concatenate([w for table in chosen for _, w in table] or [np.empty(0, np.float32)])
                        if weighted
                        else None,
                        len(tables),
                        len(chosen[0]),
                    )
                    writer.write("train", labels[part], dense[part], keys)
                else:
                    writer.write("train", labels[part], dense[part], columns[part], weights[part] if weighted else None)
            writer.finish()
        dataset = load_dataset(folder)
        dataset.verify()
        rows = rng.integers(0, num_rows, 2 * num_rows) if num_rows else np.empty(0, np.int64)
        batch = dataset.split("train").read(rows)
    assert batch.num_rows == rows.size
    assert (batch.labels.dtype, batch.dense.dtype, batch.keys.keys.dtype) == (np.float32, np.float32, key_dtype)
    np.testing.assert_array_equal(batch.labels, labels[rows])
    np.testing.assert_array_equal(batch.dense, dense[rows])
    expected = [[(table[row][0], table[row][1].tolist() if weighted else []) for row in rows] for table in wanted]
    assert to_bags(batch) == expected


def make(path: Path, keys: Any, tables: list[TableInfo], **options: Any) -> Dataset:
    keys = np.asarray(keys)
    with DatasetWriter(path, name="x", dense_names=["d", "e"], tables=tables, **options) as writer:
        dense = np.ones((len(keys), 2), np.float32)
        if options.get("dense_dtype") == "int32":
            dense = np.array([[-3, 0], [1, 2**31 - 1], [7, -(2**31)]], np.int32)
        writer.write("train", np.ones(len(keys)), dense, keys, options.get("weighted") and np.ones(keys.shape))
        writer.finish()
    return load_dataset(path)


def test_one_key_everywhere_needs_no_offsets(tmp_path: Path) -> None:
    tables = [TableInfo(name="a", rows=9), TableInfo(name="b", rows=9)]
    split = make(tmp_path, [[1, 2], [3, 4], [5, 6]], tables).split("train")
    keys = split.read(np.array([2, 0])).keys
    assert keys.one_hot
    assert keys.keys.tolist() == [5, 1, 6, 2]
    empty = split.read(slice(1, 1)).keys
    assert empty.one_hot
    assert (empty.keys.size, empty.num_tables, empty.num_rows) == (0, 2, 0)


def test_a_missing_key_makes_an_empty_bag_and_offsets_in_every_batch(tmp_path: Path) -> None:
    tables = [TableInfo(name="a", rows=9), TableInfo(name="b", rows=9)]
    split = make(tmp_path, [[1, 2], [3, -1], [5, 6]], tables).split("train")
    assert to_bags(split.read(slice(None))) == [[([1], []), ([3], []), ([5], [])], [([2], []), ([], []), ([6], [])]]
    # The same form on every rank, whichever rows it has: also where no key happens to be missing.
    assert split.read(slice(0, 1)).keys.offsets.tolist() == [0, 1, 2]
    assert split.read(slice(0, 0)).keys.offsets.tolist() == [0]


def test_integer_dense_columns_become_log1p_at_read(tmp_path: Path) -> None:
    dataset = make(tmp_path, [[0], [0], [0]], [TableInfo(name="a", rows=1)], dense_dtype="int32")
    assert dataset.manifest.dense.transform == "log1p_at_read"
    expected = np.array([[0, 0], [np.log(2), 31 * np.log(2)], [np.log(8), 0]])
    np.testing.assert_allclose(dataset.split("train").read(slice(None)).dense, expected, rtol=1e-7)


def test_several_files_make_one_split(tmp_path: Path, rng: np.random.Generator) -> None:
    tables = [TableInfo(name="a", rows=1000, hotness=2), TableInfo(name="b", rows=1000)]
    keys = rng.integers(0, 1000, (50, 3))
    make(tmp_path, keys, tables)
    file = tmp_path / "dataset.json"
    manifest = json.loads(file.read_text())
    content = (tmp_path / "train.bin").read_bytes()
    row_bytes = len(content) // 50
    parts = []
    for name, start, stop in (("p0", 0, 20), ("p1", 20, 20), ("p2", 20, 21), ("p3", 21, 50)):
        (tmp_path / name).write_bytes(content[start * row_bytes : stop * row_bytes])
        parts.append({"path": name, "rows": stop - start, "bytes": (stop - start) * row_bytes})
    whole = load_dataset(tmp_path).split("train")
    manifest["splits"]["train"]["files"] = parts
    file.write_text(json.dumps(manifest))
    pieces = load_dataset(tmp_path).split("train")
    for rows in (rng.permutation(50), rng.integers(0, 50, 7), np.array([20]), np.empty(0, np.int64)):
        a, b = whole.read(rows), pieces.read(rows)
        assert to_bags(a) == to_bags(b)
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.dense, b.dense)


def poke(path: Path, row: int, word: int, value: float, words: int, dtype: Any = np.int32) -> None:
    """Overwrite one word of a row behind the reader's back."""
    content = np.fromfile(path, np.int32).reshape(-1, words)
    content[row, word : word + np.dtype(dtype).itemsize // 4] = np.array([value], dtype).view(np.int32)
    content.tofile(path)


@pytest.mark.parametrize("layout", ["raw", "jagged"])
@pytest.mark.parametrize(
    ("word", "value", "dtype", "message"),
    [
        (0, 2, np.int32, r"row 2: label 2 is neither 0 nor 1"),
        (0, -1, np.int32, r"row 2: label -1"),
        (1, np.nan, np.float32, r"row 2: dense column 'd' is nan"),
        (2, -np.inf, np.float32, r"row 2: dense column 'e' is -inf"),
    ],
)
def test_wrong_label_or_dense_value_is_named(
    tmp_path: Path, layout: str, word: int, value: float, dtype: Any, message: str
) -> None:
    make(tmp_path, [[0], [1], [2], [3]], [TableInfo(name="a", rows=9)], layout=layout)
    file = tmp_path / ("train.bin" if layout == "raw" else "train/rows.bin")
    poke(file, 2, word, value, 4 if layout == "raw" else 3, dtype)
    split = load_dataset(tmp_path).split("train")
    assert split.read(np.array([3, 0, 1])).num_rows == 3
    place = f"row 2 (byte {2 * 4 * (4 if layout == 'raw' else 3) + 4 * word})"
    with pytest.raises(DataError, match=re.escape(f"{file.name}: {place}") + message.removeprefix("row 2")):
        split.read(np.array([0, 3, 2]))


@pytest.mark.parametrize("key_dtype", ["int32", "int64"])
@pytest.mark.parametrize(
    ("hotness", "column", "value", "message"),
    [
        (1, 0, 9, r"row 1: key 9 of table 'a' lies outside its rows 0 \.\. 8"),
        (1, 1, -1, r"row 1: table 'b' has no key \(-1\).*set missing_keys to true"),
        (1, 1, -2, r"row 1: key -2 of table 'b'"),
        (2, 1, 9, r"row 1: key 9 of table 'a'"),
        (2, 3, -5, r"row 1: key -5 of table 'b'"),
    ],
)
def test_key_outside_its_table_is_named(
    tmp_path: Path, key_dtype: str, hotness: int, column: int, value: int, message: str
) -> None:
    tables = [TableInfo(name=name, rows=9, hotness=hotness) for name in "ab"]
    make(tmp_path, np.zeros((3, 2 * hotness), int), tables, key_dtype=key_dtype)
    width = np.dtype(key_dtype).itemsize // 4
    poke(tmp_path / "train.bin", 1, 3 + column * width, value, 3 + 2 * hotness * width, key_dtype)
    split = load_dataset(tmp_path).split("train")
    place = f"row 1 (byte {4 * (3 + 2 * hotness * width) + 12 + 4 * column * width})"
    with pytest.raises(DataError, match=re.escape(f"train.bin: {place}") + message.removeprefix("row 1")):
        split.read(slice(None))


def test_a_table_of_one_key_beside_a_multi_hot_one_may_miss_it_only_if_the_manifest_says_so(tmp_path: Path) -> None:
    tables = [TableInfo(name="a", rows=9, hotness=2), TableInfo(name="b", rows=9)]
    make(tmp_path / "multi", [[4, -1, 3], [-1, -1, 2]], tables)
    dataset = load_dataset(tmp_path / "multi")
    assert not dataset.manifest.missing_keys
    assert dataset.split("train").read(slice(None)).keys.keys.tolist() == [4, 3, 2]
    poke(tmp_path / "multi" / "train.bin", 1, 5, -1, 6)
    with pytest.raises(DataError, match=r"row 1 \(byte 44\): table 'b' has no key \(-1\).*set missing_keys to true"):
        load_dataset(tmp_path / "multi").split("train").read(slice(None))
    make(tmp_path / "said", [[4, -1, 3], [-1, -1, -1]], tables)
    dataset = load_dataset(tmp_path / "said")
    assert dataset.manifest.missing_keys
    assert dataset.split("train").read(slice(None)).keys.keys.tolist() == [4, 3]


@pytest.mark.parametrize("key_dtype", ["int32", "int64"])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_first_wrong_key_in_the_order_of_the_batch_is_named(
    tmp_path: Path, rng: np.random.Generator, key_dtype: str, parts: int
) -> None:
    tables = [TableInfo(name=name, rows=1000) for name in "abc"]
    keys = rng.integers(0, 1000, (300, 3))
    make(tmp_path, keys, tables, key_dtype=key_dtype)
    width = np.dtype(key_dtype).itemsize // 4
    words = np.fromfile(tmp_path / "train.bin", np.int32).reshape(300, -1)
    ends = sorted({0, 300, *rng.integers(1, 300, parts - 1).tolist()})
    manifest = json.loads((tmp_path / "dataset.json").read_text())
    manifest["splits"]["train"]["files"] = [
        {"path": f"p{start}", "rows": stop - start, "bytes": 4 * words.shape[1] * (stop - start)}
        for start, stop in itertools.pairwise(ends)
    ]
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))

    def store() -> None:
        for start, stop in itertools.pairwise(ends):
            words[start:stop].tofile(tmp_path / f"p{start}")

    store()
    order = rng.permutation(300)
    batch = load_dataset(tmp_path).split("train").read(order)
    np.testing.assert_array_equal(batch.keys.keys.reshape(3, -1).T, keys[order])
    wrong = {(int(row), int(table)) for row, table in zip(rng.integers(0, 300, 5), rng.integers(0, 3, 5), strict=True)}
    for row, table in wrong:
        words[row, 3 + table * width : 3 + (table + 1) * width] = 5000 if width == 1 else (5000, 0)
    store()
    first = min(wrong, key=lambda place: (int(np.argmax(order == place[0])), place[1]))
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path).split("train").read(order)
    named = re.search(r"p(\d+): row (\d+) \(byte \d+\): key 5000 of table '(\w)'", str(caught.value))
    assert named
    found = (int(named[1]) + int(named[2]), "abc".index(named[3]))
    # Files are read one after the other, each in the order of the batch.
    assert found == first if parts == 1 else found in wrong


def test_a_high_word_of_a_64_bit_key_counts(tmp_path: Path) -> None:
    make(tmp_path, np.zeros((2, 1), int), [TableInfo(name="a", rows=9)], key_dtype="int64")
    poke(tmp_path / "train.bin", 1, 4, 1, 5)
    poke(tmp_path / "train.bin", 0, 3, 9, 5, np.int32)
    with pytest.raises(DataError, match=r"row 0 \(byte 12\): key 9 of table 'a'"):
        load_dataset(tmp_path).split("train").read(slice(None))
    poke(tmp_path / "train.bin", 0, 3, 0, 5, np.int32)
    with pytest.raises(DataError, match=r"row 1 \(byte 32\): key 4294967296 of table 'a'"):
        load_dataset(tmp_path).split("train").read(slice(None))


@pytest.mark.parametrize("layout", ["raw", "jagged"])
def test_weight_that_is_not_finite_is_named(tmp_path: Path, layout: str) -> None:
    tables = [TableInfo(name="a", rows=9), TableInfo(name="b", rows=9)]
    make(tmp_path, np.ones((3, 2), int), tables, weighted=True, layout=layout)
    if layout == "raw":
        poke(tmp_path / "train.bin", 1, 6, np.nan, 7, np.float32)
    else:
        poke(tmp_path / "train/001.weights.bin", 1, 0, np.nan, 1, np.float32)
    place = "train.bin: row 1 (byte 52)" if layout == "raw" else "001.weights.bin: row 1 (byte 4)"
    with pytest.raises(DataError, match=re.escape(f"{place}: a weight of table 'b' is not finite")):
        load_dataset(tmp_path).split("train").read(slice(None))


def test_damaged_jagged_files_are_named(tmp_path: Path) -> None:
    make(tmp_path, [[4], [5], [6]], [TableInfo(name="a", rows=9)], layout="jagged")
    keys, offsets = tmp_path / "train/000.keys.bin", tmp_path / "train/000.offsets.bin"
    poke(keys, 2, 0, 9, 1)
    with pytest.raises(DataError, match=r"000\.keys\.bin: row 2 \(byte 8\): key 9 of table 'a'"):
        load_dataset(tmp_path).split("train").read(slice(None))
    poke(offsets, 2, 0, 0, 2)
    with pytest.raises(DataError, match=r"000\.offsets\.bin: row 1 \(byte 8\): offsets 1 and 0 are not a bag"):
        load_dataset(tmp_path).split("train").read(slice(None))
    poke(offsets, 3, 0, 4, 2)
    with pytest.raises(DataError, match=r"12 bytes, but the last offset .* asks for 4 keys of 4 bytes"):
        load_dataset(tmp_path).split("train")
    poke(offsets, 3, 0, 3, 2)
    poke(offsets, 0, 0, 1, 2)
    with pytest.raises(
        DataError, match=r"000\.offsets\.bin: row 0 \(byte 0\): the first offset is 1, but bags start at key 0"
    ):
        load_dataset(tmp_path).split("train")


def test_bag_longer_than_the_columns_is_refused(tmp_path: Path) -> None:
    tables = [TableInfo(name="a", rows=9, hotness=2)]
    with DatasetWriter(tmp_path, name="x", dense_names=[], tables=tables) as writer:
        bags = Jagged(np.array([1, 2, 3]), np.array([0, 3]), None, 1, 1)
        with pytest.raises(DataError, match=r"table 0 \(from 0\) has 3 keys, but the table's hotness is 2"):
            writer.write("train", np.zeros(1), np.empty((1, 0)), bags)


def test_jagged_finds_the_longest_bag(tmp_path: Path) -> None:
    tables = [TableInfo(name="a", rows=9, hotness=1)]
    with DatasetWriter(tmp_path, name="x", dense_names=[], tables=tables, layout="jagged") as writer:
        bags = Jagged(np.array([1, 2, 3, 4]), np.array([0, 3, 3, 4]), None, 1, 3)
        writer.write("train", np.zeros(3), np.empty((3, 0)), bags)
        writer.finish()
    dataset = load_dataset(tmp_path)
    assert dataset.tables[0].hotness == 3
    assert to_bags(dataset.split("train").read(slice(None))) == [[([1, 2, 3], []), ([], []), ([4], [])]]
