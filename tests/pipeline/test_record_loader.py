"""Records through the ring: order, shares, resuming, reuse of buffers, direct reading, failures."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.config import DataConfig
from dlrm.device import HostDevice
from dlrm.errors import ConfigError, DataError
from embedding.jagged import Jagged
from embedding.topology import share_of, start_of
from pipeline.dataset import DatasetWriter, TableInfo, load_dataset
from pipeline.formats.record_files import PAGE, RecordLayout, prefers_direct
from pipeline.loader import Loader, RowOrder
from pipeline.manifest import DenseInfo, FileInfo, Manifest, SplitInfo, write_manifest
from pipeline.record_loader import RecordBatch, RecordLoader

WORDS = 5


def write_shards(folder: Path, shards: list[int], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """A Raw split of several files; returns all its rows: label, two dense columns, a key of each of two tables."""
    rows = sum(shards)
    words = np.empty((rows, WORDS), np.int32)
    words[:, 0] = rng.integers(0, 2, rows)
    words[:, 1:3] = rng.normal(size=(rows, 2)).astype(np.float32).view(np.int32)
    words[:, 3] = np.arange(rows)
    words[:, 4] = rng.integers(0, 50, rows)
    files, at = [], 0
    for number, count in enumerate(shards):
        (folder / f"{number}.bin").write_bytes(words[at : at + count].tobytes())
        files.append(FileInfo(path=f"{number}.bin", rows=count, bytes=count * WORDS * 4))
        at += count
    manifest = Manifest(
        name="shards",
        layout="raw",
        dense=DenseInfo(names=("a", "b")),
        tables=(TableInfo(name="row", rows=max(rows, 1)), TableInfo(name="x", rows=50)),
        splits={"train": SplitInfo(rows=rows, files=tuple(files))},
    )
    write_manifest(folder, manifest)
    return words.view(np.uint32)


def load(folder: Path, **options: Any) -> Iterator[RecordBatch]:
    arguments: dict[str, Any] = {
        "batch_size": 4,
        "rank": 0,
        "ranks": 1,
        "seed": 1,
        "shuffle": True,
        "window": 1 << 20,
        "drop_last": False,
        "prefetch": 3,
        "epochs": 1,
        "device": HostDevice(),
        **options,
    }
    with RecordLoader(load_dataset(folder).split("train"), **arguments) as loader:
        yield from loader


def test_a_run_gets_its_records_by_its_config(tmp_path: Path, rng: np.random.Generator) -> None:
    write_shards(tmp_path, [70, 33], rng)
    split = load_dataset(tmp_path).split("train")
    data = DataConfig(path=str(tmp_path), batch_size=20, shuffle_window=40, shuffle_block=3, prefetch=2, readers=1)
    usual: dict[str, Any] = {"batch_size": 20, "window": 40, "block": 3, "prefetch": 2, "seed": 5, "ranks": 2}
    asked: dict[str, Any] = {"seed": 5, "ranks": 2, "rank": 1, "device": HostDevice(), "epochs": 2}
    for options, meant in (
        ({"start_step": 4}, usual),
        ({"shuffle": False, "batch_size": 7, "drop_last": True}, usual | {"batch_size": 7}),
        ({"whole_batches": True, "stop_step": 3, "keep": 2}, usual),
    ):
        expected = load(tmp_path, **(meant | options), rank=1, epochs=2)
        with split.records(data, **asked, **options) as loader:
            steps = []
            for one, other in zip(loader, expected, strict=True):
                np.testing.assert_array_equal(one.records, other.records)
                assert (one.own, one.step, one.global_rows) == (other.own, other.step, other.global_rows)
                steps.append(one.step)
        assert steps


def nothing_wrong(keys: Jagged, row: int) -> None:
    assert keys.num_rows == 1
    assert row >= 0


def bags_wrong(keys: Jagged, row: int) -> None:
    raise DataError(f"row {row}")


def test_a_record_found_wrong_is_described_by_the_host(tmp_path: Path, rng: np.random.Generator) -> None:
    words = write_shards(tmp_path, [30, 33], rng).view(np.int32)
    words[41, 4] = 77  # of 50
    (tmp_path / "1.bin").write_bytes(words[30:].tobytes())
    found = 0
    for batch in load(tmp_path, batch_size=9, ranks=2, rank=1, block=4, epochs=2):
        for place in np.flatnonzero(batch.records[:, 4] >= 50):
            message = str(batch.fault(place, nothing_wrong))
            assert re.search(r"1\.bin: row 11.*: key 77 of table 'x' lies outside", message)
            found += 1
        for place in np.flatnonzero(batch.records[:, 4] < 50):
            assert str(batch.fault(place, nothing_wrong)).startswith(batch.locate(place) + ": the device found")
            assert str(batch.fault(place, bags_wrong)) == f"row {place - batch.own.start}"
            break
    others = load(tmp_path, batch_size=9, ranks=2, rank=0, block=4, epochs=2)
    found += sum(int((batch.records[:, 4] >= 50).sum()) for batch in others)
    assert found == 2  # each epoch, on one of the ranks


def documented_order(shards: list[int], *, seed: int, epoch: int, window: int, block: int) -> list[int]:
    """The rows of an epoch, straight from docs/formats.md."""

    def permutation(stream: int, size: int) -> list[int]:
        bits = np.random.Philox(key=[seed, 0], counter=[0, 0, stream, epoch])
        return np.random.Generator(bits).permutation(size).tolist()

    window = min(window, max(sum(shards), 1))
    windows, start = [], 0
    for count in shards:
        rows = list(range(start, start + count))
        windows += [rows[at : at + window] for at in range(0, count, window)]
        start += count
    order: list[int] = []
    for w in permutation(0, len(windows)):
        blocks = [windows[w][at : at + block] for at in range(0, len(windows[w]), block)]
        for b in permutation(1 + w, len(blocks)):
            order += blocks[b]
    return order


@given(
    shards=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    batch_size=st.integers(1, 60),
    ranks=st.integers(1, 5),
    readers=st.integers(1, 4),
    window=st.integers(1, 50),
    block=st.integers(1, 9),
    shuffle=st.booleans(),
    direct=st.booleans(),
    whole=st.booleans(),
    prefetch=st.integers(1, 4),
    keep=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_every_share_of_every_step_is_the_documented_one(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[int],
    batch_size: int,
    ranks: int,
    readers: int,
    window: int,
    block: int,
    shuffle: bool,
    direct: bool,
    whole: bool,
    prefetch: int,
    keep: int,
    seed: int,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    words = write_shards(folder, shards, np.random.default_rng(seed))
    rows = sum(shards)
    orders = [list(range(rows))] * 2
    if shuffle:
        orders = [documented_order(shards, seed=seed, epoch=e, window=window, block=block) for e in (0, 1)]
    batches = [order[at : at + batch_size] for order in orders for at in range(0, rows, batch_size)]
    start = data.draw(st.integers(0, len(batches)))
    rank = data.draw(st.integers(0, ranks - 1))
    seen: list[tuple[RecordBatch, Any]] = []
    steps = 0
    for batch in load(
        folder, batch_size=batch_size, ranks=ranks, rank=rank, readers=readers, window=window, block=block,
        shuffle=shuffle, direct=direct, whole_batches=whole, prefetch=prefetch, keep=keep, seed=seed, epochs=2,
        start_step=start,
    ):  # fmt: skip
        expected = batches[start + steps]
        steps += 1
        assert (batch.step, batch.global_rows) == (start + steps, len(expected))
        assert batch.epoch == (batch.step - 1) // (len(batches) // 2)
        mine = slice(start_of(len(expected), ranks, rank), start_of(len(expected), ranks, rank + 1))
        assert batch.num_rows == share_of(len(expected), ranks, rank)
        np.testing.assert_array_equal(batch.records, words[expected if whole else expected[mine]])
        np.testing.assert_array_equal(batch.records[batch.own], words[expected[mine]])
        seen = [*seen, (batch, words[expected[mine]])][-keep:]
        for older, its_rows in seen:  # the newest `keep` batches are still what they were
            np.testing.assert_array_equal(older.records[older.own], its_rows)
    assert steps == len(batches) - start


@given(
    shards=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    window=st.integers(1, 70),
    block=st.integers(1, 20),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
@settings(deadline=None)
def test_runs_are_the_rows(shards: list[int], window: int, block: int, seed: int, data: st.DataObject) -> None:
    class Shape:
        name = "x"
        rows = sum(shards)

        def __init__(self) -> None:
            self.shards = shards

        def will_need(self, start: int, stop: int) -> None:
            assert 0 <= start < stop <= self.rows

    start = data.draw(st.integers(0, Shape.rows))
    stop = data.draw(st.integers(start, Shape.rows))
    order = RowOrder(Shape(), seed=seed, shuffle=True, window=window, block=block)
    expected = documented_order(shards, seed=seed, epoch=3, window=window, block=block)[start:stop]
    assert order.rows(3, start, stop).tolist() == expected
    runs = order.runs(3, start, stop)
    assert (runs is None) == (block == 1)
    if runs is not None:
        assert [row for first, count in runs for row in range(first, first + count)] == expected
        assert all(count > 0 for _, count in runs)


def test_records_lie_in_a_ring_of_pinned_buffers(tmp_path: Path, rng: np.random.Generator) -> None:
    write_shards(tmp_path, [1000], rng)
    made: list[np.ndarray[Any, Any]] = []

    class Pinning(HostDevice):
        def pinned_empty(self, shape: Any, dtype: Any) -> Any:
            made.append(super().pinned_empty(shape, dtype))
            return made[-1]

    places = []
    for batch in load(tmp_path, batch_size=10, block=10, device=Pinning(), prefetch=2, keep=1, direct=False):
        assert any(np.shares_memory(batch.records, buffer) for buffer in made)
        assert batch.records.ctypes.data % PAGE == 0
        places.append(batch.records.ctypes.data)
    assert len(made) == len(set(places)) == 3
    assert places == (places[:3] * 34)[:100]


def test_a_held_buffer_is_not_overwritten_before_its_event(tmp_path: Path, rng: np.random.Generator) -> None:
    words = write_shards(tmp_path, [60], rng)
    waited: list[int] = []

    class Upload:
        def __init__(self, batch: RecordBatch) -> None:
            self.batch, self.before = batch, batch.records.copy()

        def done(self) -> bool:
            return True

        def synchronize(self) -> None:
            np.testing.assert_array_equal(self.batch.records, self.before)
            waited.append(self.batch.step)

    for batch in load(tmp_path, batch_size=10, shuffle=False, prefetch=1, keep=1):
        batch.hold(Upload(batch))
        np.testing.assert_array_equal(batch.records, words[10 * (batch.step - 1) : 10 * batch.step])
    assert waited == [1, 2, 3, 4]  # 5 and 6 have nobody behind them in a ring of two


def test_a_slow_consumer_holds_the_readers_back(tmp_path: Path, rng: np.random.Generator) -> None:
    write_shards(tmp_path, [1000], rng)
    split: Any = load_dataset(tmp_path).split("train")
    source, reads = split.record_source(direct=False), []
    read_runs = source.read_runs

    def counted(runs: Any, buffer: Any) -> Any:
        reads.append(runs)
        return read_runs(runs, buffer)

    source.read_runs = counted
    split.record_source = lambda **_: source
    with RecordLoader(
        split, device=HostDevice(), batch_size=10, rank=0, ranks=1, seed=1, shuffle=False, window=10, drop_last=False,
        prefetch=4, keep=2, epochs=1,
    ) as loader:  # fmt: skip
        for taken in range(5):
            deadline = time.monotonic() + 60
            while len(reads) < taken + 4 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert len(reads) == taken + 4
            next(loader)


def test_a_file_cut_short_while_it_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    write_shards(tmp_path, [100, 5000], rng)
    for direct in (False, True):
        split = load_dataset(tmp_path).split("train")
        source = split.record_source(direct=direct)
        os.truncate(tmp_path / "1.bin", 321 * WORDS * 4 + 6)
        buffer = np.empty(5100 * WORDS * 4 + 3 * PAGE, np.uint8)
        buffer = buffer[-buffer.ctypes.data % PAGE :]
        with pytest.raises(DataError, match=r"1\.bin: row 321 \(byte 6426\): the file ends there, but \d+ more bytes"):
            source.read_runs([(400, 1000)], buffer)
        source.close()
        write_shards(tmp_path, [100, 5000], rng)


def test_the_consumer_gets_one_error_and_the_threads_end(tmp_path: Path, rng: np.random.Generator) -> None:
    write_shards(tmp_path, [300], rng)
    batches = load(tmp_path, batch_size=10, shuffle=False, prefetch=2)
    assert [next(batches).step for _ in range(3)] == [1, 2, 3]
    (tmp_path / "0.bin").write_bytes(b"")  # the same file, now empty
    with pytest.raises(DataError, match=r"0\.bin: row \d+ \(byte \d+\): the file ends there"):
        list(batches)
    assert list(batches) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_an_unreadable_file_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    write_shards(tmp_path, [30], rng)
    split = load_dataset(tmp_path).split("train")
    (tmp_path / "0.bin").unlink()
    source = split.record_source(direct=False)
    with pytest.raises(DataError, match=r"0\.bin: row 3 \(byte 60\): cannot be read \(No such file"):
        source.read_runs([(3, 4)], np.empty(100, np.uint8))


def test_locating_a_record(tmp_path: Path, rng: np.random.Generator) -> None:
    words = write_shards(tmp_path, [7, 33], rng)
    for block in (1, 3):
        for batch in load(tmp_path, batch_size=16, block=block, window=20, ranks=2, rank=1):
            for place, record in enumerate(batch.records):
                row = int(record[3])
                file, inside = ("0.bin", row) if row < 7 else ("1.bin", row - 7)
                assert batch.locate(place) == f"{tmp_path / file}: row {inside} (byte {20 * inside})"
    assert words.shape == (40, WORDS)


def test_the_layout_says_where_columns_are(tmp_path: Path, rng: np.random.Generator) -> None:
    tables = [TableInfo(name="a", rows=9, hotness=3), TableInfo(name="b", rows=2**40)]
    options: dict[str, Any] = {
        "dense_names": ["x", "y"],
        "key_dtype": "int64",
        "weighted": True,
        "label_dtype": "float32",
    }
    keys = np.column_stack([rng.integers(-1, 9, (20, 3)), rng.integers(0, 2**40, 20)])
    weights = np.where(keys < 0, 0, rng.random((20, 4))).astype(np.float32)
    dense = rng.integers(-3, 900, (20, 2)).astype(np.int32)
    labels = rng.integers(0, 2, 20)
    with DatasetWriter(tmp_path, name="x", tables=tables, dense_dtype="int32", **options) as writer:
        writer.write("train", labels, dense, keys, weights)
        writer.finish()
    (batch,) = load(tmp_path, batch_size=20, shuffle=False)
    layout: RecordLayout = batch.layout
    assert (layout.hotness, layout.table_rows, layout.dense_transform) == ((3, 1), (9, 2**40), "log1p_at_read")
    records = batch.records
    np.testing.assert_array_equal(records[:, 0] == layout.label_one, labels)
    np.testing.assert_array_equal(records[:, 1 : 1 + layout.num_dense].view(np.int32), dense)
    stop = layout.first_key + layout.key_words * sum(layout.hotness)
    np.testing.assert_array_equal(np.ascontiguousarray(records[:, layout.first_key : stop]).view(np.int64), keys)
    np.testing.assert_array_equal(np.ascontiguousarray(records[:, stop:]).view(np.float32), weights)
    assert layout.weighted
    assert stop + 4 == layout.words


def test_what_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    with DatasetWriter(
        tmp_path / "j", name="x", dense_names=[], tables=[TableInfo(name="a", rows=9)], layout="jagged"
    ) as w:
        w.write("train", np.zeros(3, np.int32), np.zeros((3, 0)), np.zeros((3, 1), np.int64))
        w.finish()
    with pytest.raises(DataError, match="layout 'jagged' has no records of one length; read decoded batches"):
        list(load(tmp_path / "j"))
    write_shards(tmp_path, [30], rng)
    with pytest.raises(ConfigError, match=r"data\.batch_size: 31 exceeds the 30 rows"):
        list(load(tmp_path, batch_size=31, drop_last=True))


def test_large_files_pass_the_page_cache_by() -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert not prefers_direct(memory // 2)
    assert prefers_direct(memory)


@pytest.mark.parametrize("layout", ["raw", "jagged"])
def test_everyones_keys_beside_a_ranks_own_rows(tmp_path: Path, rng: np.random.Generator, layout: Any) -> None:
    keys = rng.integers(0, 99, (103, 2))
    tables = [TableInfo(name="a", rows=99), TableInfo(name="b", rows=99)]
    with DatasetWriter(tmp_path, name="x", dense_names=[], tables=tables, layout=layout) as writer:
        writer.write("train", rng.integers(0, 2, 103), np.zeros((103, 0)), keys)
        writer.finish()
    split = load_dataset(tmp_path).split("train")
    options: dict[str, Any] = {
        "batch_size": 25, "ranks": 3, "seed": 4, "shuffle": True, "window": 60, "drop_last": False, "prefetch": 2,
        "epochs": 1, "block": 4,
    }  # fmt: skip
    order = RowOrder(split, seed=4, shuffle=True, window=60, block=4).rows(0, 0, 103)
    for rank in range(3):
        with Loader(split, rank=rank, global_keys=True, **options) as loader:
            batches = list(loader)
        for step, batch in enumerate(batches):
            rows = order[25 * step : 25 * step + 25]
            mine = rows[start_of(rows.size, 3, rank) : start_of(rows.size, 3, rank + 1)]
            assert batch.global_keys is not None
            np.testing.assert_array_equal(batch.global_keys.keys.reshape(2, -1).T, keys[rows])
            np.testing.assert_array_equal(batch.host.keys.keys.reshape(2, -1).T, keys[mine])
