"""Training rows straight from Parquet files: the order, shares and values of Raw rows, row groups in memory, faults."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.device import HostDevice
from dlrm.errors import ConfigError, DataError
from pipeline.adopt_parquet import adopt_parquet
from pipeline.check.dataset import check_dataset
from pipeline.convert import convert
from pipeline.dataset import Split, load_dataset
from pipeline.formats.raw import encode_rows
from pipeline.formats.row_groups import RowGroups
from pipeline.loader import Loader
from pipeline.manifest import DenseInfo, FileInfo, Manifest, SplitInfo, TableInfo, write_manifest
from pipeline.record_loader import RecordLoader

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: make install")
pq = pytest.importorskip("pyarrow.parquet")

TABLES = (TableInfo(name="a", rows=1000), TableInfo(name="b", rows=50, hotness=3), TableInfo(name="c", rows=9))
NAMES = ("x", "y")


def random_rows(rng: np.random.Generator, rows: int) -> tuple[Any, Any, Any]:
    """Labels [B], dense [B, 2], keys [B, 5] with bags of 0 to 3 keys in table b."""
    keys = np.column_stack(
        [rng.integers(0, 1000, rows), rng.integers(0, 50, (rows, 3)), rng.integers(0, 9, rows)]
    ).astype(np.int64)
    keys[:, 1:4][np.arange(3) >= rng.integers(0, 4, rows)[:, None]] = -1
    return rng.integers(0, 2, rows).astype(np.int32), rng.normal(size=(rows, 2)).astype(np.float32), keys


def table_of(labels: Any, dense: Any, keys: Any) -> Any:
    bags = [[key for key in bag if key >= 0] for bag in keys[:, 1:4].tolist()]
    return pa.table(
        {
            "label": pa.array(labels.astype(np.float32)),
            "x": pa.array(dense[:, 0]),
            "y": pa.array(dense[:, 1].astype(np.float64)),
            "a": pa.array(keys[:, 0]),
            "b": pa.array(bags, pa.list_(pa.int64())),
            "c": pa.array(keys[:, 4].astype(np.int32)),
        }
    )


def write_both(folder: Path, shards: list[int], group: int, rng: np.random.Generator) -> tuple[Path, Path]:
    """The same rows as Parquet files with row groups of ``group`` rows and as Raw files of the same lengths."""
    infos: dict[str, list[FileInfo]] = {"raw": [], "parquet": []}
    for number, count in enumerate(shards):
        labels, dense, keys = random_rows(rng, count)
        words = encode_rows(8, labels, dense, keys.astype(np.int32))
        paths = {"raw": folder / f"{number}.bin", "parquet": folder / f"{number}.parquet"}
        paths["raw"].write_bytes(words.tobytes())
        pq.write_table(table_of(labels, dense, keys), paths["parquet"], row_group_size=group)
        for layout, path in paths.items():
            infos[layout].append(FileInfo(path=str(path), rows=count, bytes=path.stat().st_size))
    for layout, files in infos.items():
        (folder / layout).mkdir()
        manifest = Manifest(
            name=layout,
            layout=layout,  # type: ignore[arg-type]
            label_column="label" if layout == "parquet" else None,
            dense=DenseInfo(names=NAMES),
            tables=TABLES,
            splits={"train": SplitInfo(rows=sum(shards), files=tuple(files))},
        )
        write_manifest(folder / layout, manifest)
    return folder / "raw", folder / "parquet"


@given(
    shards=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    group=st.integers(1, 30),
    batch_size=st.integers(1, 50),
    ranks=st.integers(1, 3),
    readers=st.integers(1, 3),
    window=st.integers(1, 50),
    block=st.integers(1, 5),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
@settings(deadline=None, max_examples=30)
def test_batches_are_those_of_raw_rows(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[int],
    group: int,
    batch_size: int,
    ranks: int,
    readers: int,
    window: int,
    block: int,
    shuffle: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    """Decoded batches and records of any rank, from any step on, over two epochs."""
    folder = tmp_path_factory.mktemp("both")
    raw, parquet = (
        load_dataset(place).split("train") for place in write_both(folder, shards, group, np.random.default_rng(seed))
    )
    steps = 2 * -(-sum(shards) // batch_size)
    options: dict[str, Any] = {
        "batch_size": batch_size, "rank": data.draw(st.integers(0, ranks - 1)), "ranks": ranks, "seed": seed,
        "shuffle": shuffle, "window": window, "drop_last": False, "prefetch": 3, "block": block, "readers": readers,
        "epochs": 2, "start_step": data.draw(st.integers(0, steps)),
    }  # fmt: skip
    seen = 0
    with Loader(raw, **options) as wanted, Loader(parquet, **options) as found:
        for one, other in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(one.host.labels, other.host.labels)
            np.testing.assert_array_equal(one.host.dense, other.host.dense)
            np.testing.assert_array_equal(one.host.keys.keys, other.host.keys.keys)
            np.testing.assert_array_equal(one.host.keys.offsets, other.host.keys.offsets)
            assert one.step == other.step
            seen += 1
    assert seen == steps - options["start_step"]
    options["device"] = HostDevice()
    with RecordLoader(raw, **options) as rows, RecordLoader(parquet, **options) as same:
        for first, second in zip(rows, same, strict=True):
            np.testing.assert_array_equal(first.records, second.records)


def counting(sizes: dict[int, int]) -> tuple[RowGroups, list[int]]:
    decoded: list[int] = []

    def decode(group: int) -> np.ndarray[Any, Any]:
        decoded.append(group)
        return np.full((sizes[group], 2), group, np.int32)

    return RowGroups(decode, len(sizes)), decoded


def test_a_shuffle_decodes_every_group_once_and_holds_two_windows(rng: np.random.Generator) -> None:
    """Three threads draw from window after window, 50 calls each, as a loader does."""
    groups, decoded = counting(dict.fromkeys(range(60), 3))
    windows = [range(10 * w, 10 * w + 10) for w in rng.permutation(6).tolist()]
    most = 0
    for turn, window in enumerate(windows):
        for announced in windows[turn : turn + 2]:
            groups.announce(announced)

        def draw(numbers: range = window, seed: int = turn) -> None:
            own = np.random.default_rng(seed)
            for _ in range(50):
                asked = np.unique(own.choice(list(numbers), 4)).tolist()
                for group, words in zip(asked, groups.get(asked), strict=True):
                    assert (words == group).all()

        threads = [threading.Thread(target=draw) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        most = max(most, groups.num_held)
    assert sorted(decoded) == sorted(set(decoded))
    assert most <= 20


def test_file_order_decodes_every_group_once_and_holds_a_few() -> None:
    groups, decoded = counting(dict.fromkeys(range(200), 1))
    for group in range(200):
        for _ in range(2):
            groups.get([group])
        assert groups.num_held <= 32 // 2 + 3
    assert sorted(decoded) == list(range(200))


def test_a_group_that_cannot_be_decoded_fails_every_time() -> None:
    tries: list[int] = []

    def decode(group: int) -> np.ndarray[Any, Any]:
        tries.append(group)
        raise DataError(f"group {group} is wrong")

    groups = RowGroups(decode, 3)
    groups.announce(range(3))
    for _ in range(2):
        with pytest.raises(DataError, match="group 1 is wrong"):
            groups.get([1])
    assert tries.count(1) >= 2


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Two files, of 40 and of 30 rows, in row groups of 16; adopted."""
    for number, count in enumerate((40, 30)):
        pq.write_table(table_of(*random_rows(rng, count)), tmp_path / f"{number}.parquet", row_group_size=16)
    adopt_parquet({"train": [tmp_path]}, out=tmp_path, table_rows=[1000, 50, 9])
    return tmp_path


def damaged(folder: Path, column: str, row: int, value: Any) -> Split:
    """The second file with another value, of the size that is listed for it."""
    path = folder / "1.parquet"
    size, table = path.stat().st_size, pq.read_table(path)
    values = table.column(column).to_pylist()
    values[row] = value
    changed = pa.array(values, table.schema.field(column).type)
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, changed), path, row_group_size=16)
    manifest = (folder / "dataset.json").read_text()
    return resized(folder, manifest, size, path.stat().st_size)


def resized(folder: Path, manifest: str, old: int, new: int) -> Split:
    head, tail = manifest.rsplit(f'"bytes": {old}', 1)
    (folder / "dataset.json").write_text(f'{head}"bytes": {new}{tail}')
    return load_dataset(folder).split("train")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", 0.5, "label -1 is neither 0 nor 1"),
        ("label", None, "column 'label' is null"),
        ("x", float("nan"), "dense column 'x' is nan"),
        ("y", 1e300, "dense column 'y' is inf"),
        ("a", 1000, r"key 1000 of table 'a' lies outside its rows 0 \.\. 999"),
        ("a", 2**40, "key 1099511627776 of table 'a' lies outside"),
        ("a", -2, "key -2 of table 'a'"),
        ("b", [1, 2, 3, 4], "4 keys in column 'b'"),
        ("b", [50], "key 50 of table 'b'"),
    ],
)
def test_a_wrong_value_is_named_with_file_and_row(folder: Path, column: str, value: Any, message: str) -> None:
    split = damaged(folder, column, 20, value)
    assert split.read(np.arange(50)).num_rows == 50
    with Loader(
        split, batch_size=10, rank=0, ranks=1, seed=1, shuffle=False, window=100, drop_last=False, prefetch=2, epochs=1
    ) as loader, pytest.raises(DataError, match=rf"1\.parquet: row 20: ({message})"):  # fmt: skip
        list(loader)


def test_damaged_pages_are_named_with_row_and_byte(folder: Path) -> None:
    path = folder / "1.parquet"
    place = pq.read_metadata(path).row_group(1).column(0)
    start = min(place.data_page_offset, place.dictionary_page_offset or place.data_page_offset)
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    split = load_dataset(folder).split("train")
    assert split.read(np.arange(56)).num_rows == 56
    place = rf"1\.parquet: row 16 \(row group 1, column 'label', from byte {start}\)"
    with pytest.raises(DataError, match=f"{place}: cannot be read"):
        split.read(np.array([5, 60]))


def test_files_that_changed_are_refused(folder: Path) -> None:
    path, manifest = folder / "1.parquet", (folder / "dataset.json").read_text()
    size = path.stat().st_size
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(DataError, match=r"1\.parquet: 29 rows, but 30 are listed"):
        resized(folder, manifest, size, path.stat().st_size)
    pq.write_table(table.drop_columns("c"), path)
    with pytest.raises(DataError, match=r"1\.parquet: no column 'c'"):
        resized(folder, manifest, size, path.stat().st_size)
    path.write_bytes(b"PAR1" * 9)
    with pytest.raises(DataError, match=r"1\.parquet: bad footer length \(byte 28\): 827474256 bytes, but only 24"):
        resized(folder, manifest, size, path.stat().st_size)


def test_windows_that_memory_cannot_hold_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = load_dataset(folder).split("train")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}[name])
    split.will_need(0, 32)
    with pytest.raises(ConfigError, match=r"data\.shuffle_window: two windows of 40 decoded rows .* lower it to 32"):
        split.will_need(0, 40)


def test_a_check_finds_what_it_finds_in_the_same_rows_as_raw(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = tmp_path_factory.mktemp("converted") / "raw"
    convert(folder, raw, to="raw")
    every = np.arange(70)
    one, other = (load_dataset(place).split("train").read(every) for place in (folder, raw))
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.dense, other.dense)
    np.testing.assert_array_equal(one.keys.keys, other.keys.keys)
    found, wanted = check_dataset(folder), check_dataset(raw)
    for part in ("splits", "dense", "tables", "reference"):
        assert found[part] == wanted[part]
    assert found["bytes"] == sum((folder / f"{number}.parquet").stat().st_size for number in (0, 1))
    assert {check["status"] for check in found["checks"] if check["check"] != "checksums"} == {"ok"}


@pytest.mark.parametrize(
    ("column", "value", "check", "message"),
    [
        ("label", 0.5, "labels", "label -1 is neither 0 nor 1"),
        ("x", float("nan"), "dense values", "dense column 'x' is nan"),
        ("y", 1e300, "dense values", "dense column 'y' is inf"),
        ("a", 2**40 + 5, "keys", "key 1099511627781 of table 'a' lies outside its rows 0 .. 999"),
        ("b", [50, -7], "keys", "key 50 of table 'b'"),
    ],
)
def test_a_check_counts_wrong_values(folder: Path, column: str, value: Any, check: str, message: str) -> None:
    damaged(folder, column, 20, value)
    values = check_dataset(folder)
    (entry,) = (one for one in values["checks"] if one["status"] == "failed")
    assert (entry["check"], entry["faults"]) == (check, 2 if column == "b" else 1)
    assert f"1.parquet: row 20: {message}" in entry["detail"]


def test_a_check_of_files_that_cannot_be_read(folder: Path) -> None:
    damaged(folder, "x", 20, None)
    with pytest.raises(DataError, match=r"1\.parquet: row 20: column 'x' is null"):
        check_dataset(folder)
    pq.write_table(pq.read_table(folder / "0.parquet").drop_columns("c"), folder / "0.parquet")
    manifest = (folder / "dataset.json").read_text()
    sizes = [int(size) for size in re.findall(r'"bytes": (\d+)', manifest)]
    new = (folder / "0.parquet").stat().st_size
    (folder / "dataset.json").write_text(manifest.replace(f'"bytes": {sizes[0]}', f'"bytes": {new}', 1))
    with pytest.raises(DataError, match=r"0\.parquet: no column 'c'"):
        check_dataset(folder)


def test_without_pyarrow_the_way_out_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'crosslane\[parquet\]'"):
        load_dataset(folder).split("train")


def write_split(path: Path, rng: np.random.Generator, rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of(*random_rows(rng, rows)), path)


def test_a_folder_of_splits_is_adopted(tmp_path: Path, rng: np.random.Generator) -> None:
    for split, counts in {"train": (20, 12), "valid": (7,)}.items():
        for number, rows in enumerate(counts):
            write_split(tmp_path / "data" / split / f"part_{number}.parquet", rng, rows)
    place = adopt_parquet({"train": [tmp_path / "data"]}, out=tmp_path / "out", checksums=True, relative=True)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("data", "out"):
        (tmp_path / name).rename(moved / name)
    dataset = load_dataset(moved / place.name)
    assert {name: split.rows for name, split in dataset.splits.items()} == {"train": 32, "validation": 7}
    assert dataset.verify() == ()
    assert [table.hotness for table in dataset.tables] == [1, 3, 1]
    assert dataset.split("train").shards == (20, 12)
    assert dataset.split("train").read(slice(None)).num_rows == 32


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda data: {"train": [data / "train"], "test": [data / "train" / "0.parquet"]}, "name each file once"),
        (lambda data: {"train": [data, data / "train"]}, "one split is needed"),
        (lambda data: {"train": [data / "none"]}, "no Parquet files|no such file"),
        (lambda data: {}, "no files; name at least one"),
    ],
)
def test_what_is_not_adopted(
    tmp_path: Path, rng: np.random.Generator, arrange: Callable[..., Any], message: str
) -> None:
    for split in ("train", "test"):
        write_split(tmp_path / split / "0.parquet", rng, 5)
    with pytest.raises(DataError, match=message):
        adopt_parquet(arrange(tmp_path), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
