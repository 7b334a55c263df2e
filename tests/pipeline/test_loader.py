"""Order, shares, resuming and failures of the loader."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.errors import ConfigError, DataError
from embedding.jagged import Jagged
from pipeline.dataset import DatasetWriter, HostBatch, Split, TableInfo, load_dataset
from pipeline.loader import LoadedBatch, Loader, RowOrder, steps_per_epoch


class Numbered:
    """Stands for a split whose only key of row r is r, so that a batch says which rows it has."""

    name = "numbered"

    def __init__(self, rows: int, faulty: int | None = None, delay: float = 0.0) -> None:
        self.rows = rows
        self.shards = (rows,)
        self.reads = 0
        self._faulty = faulty
        self._delay = delay

    def read(self, rows: Any) -> HostBatch:
        self.reads += 1
        time.sleep(self._delay)
        if self._faulty is not None and self._faulty in rows:
            raise DataError(f"row {self._faulty} is wrong")
        count = len(rows)
        keys = Jagged(rows, None, None, 1, count)
        return HostBatch(np.zeros(count, np.float32), np.zeros((count, 0), np.float32), keys, count)

    def will_need(self, start: int, stop: int) -> None:
        assert 0 <= start < stop <= self.rows


def load(split: Any, **options: Any) -> list[LoadedBatch]:
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
        **options,
    }
    with Loader(split, **arguments) as loader:
        return list(loader)


def rows_of(batches: list[LoadedBatch]) -> list[list[int]]:
    return [batch.host.keys.keys.tolist() for batch in batches]


shapes = {
    "rows": st.integers(0, 70),
    "batch_size": st.integers(1, 80),
    "window": st.integers(1, 90),
    "seed": st.integers(0, 2**63 - 1),
    "shuffle": st.booleans(),
}


@given(**shapes, ranks=st.integers(1, 6))
@settings(deadline=None)
def test_every_epoch_visits_each_row_once_and_ranks_share_batches(
    rows: int, batch_size: int, window: int, seed: int, shuffle: bool, ranks: int
) -> None:
    options = {"batch_size": batch_size, "window": window, "seed": seed, "shuffle": shuffle, "epochs": 2}
    single = load(Numbered(rows), **options)
    steps = steps_per_epoch(rows, batch_size, drop_last=False)
    assert [batch.step for batch in single] == list(range(1, 2 * steps + 1))
    assert [batch.epoch for batch in single] == [0] * steps + [1] * steps
    assert [batch.last_of_epoch for batch in single] == ([False] * (steps - 1) + [True]) * 2 * (steps > 0)
    for epoch in (0, 1):
        part = rows_of(single)[epoch * steps : (epoch + 1) * steps]
        assert sorted(row for batch in part for row in batch) == list(range(rows))
        assert [len(batch) for batch in part[:-1]] == [batch_size] * max(steps - 1, 0)
    shares = [load(Numbered(rows), **options, ranks=ranks, rank=rank) for rank in range(ranks)]
    for step, whole in enumerate(single):
        parts = [share[step] for share in shares]
        assert [row for part in parts for row in part.host.keys.keys.tolist()] == whole.host.keys.keys.tolist()
        sizes = [part.host.num_rows for part in parts]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
        assert {part.global_rows for part in parts} == {whole.global_rows} == {sum(sizes)}


@given(**shapes, start=st.integers(0, 200), prefetch=st.integers(1, 5))
@settings(deadline=None)
def test_resuming_at_any_step_is_the_uninterrupted_run(
    rows: int, batch_size: int, window: int, seed: int, shuffle: bool, start: int, prefetch: int
) -> None:
    options = {"batch_size": batch_size, "window": window, "seed": seed, "shuffle": shuffle, "epochs": 3}
    whole = load(Numbered(rows), **options)
    start = min(start, len(whole))
    rest = load(Numbered(rows), **options, start_step=start, prefetch=prefetch)
    assert [batch.step for batch in rest] == [batch.step for batch in whole[start:]]
    assert rows_of(rest) == rows_of(whole)[start:]


@given(rows=st.integers(1, 100), window=st.integers(1, 40), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_a_window_is_visited_as_a_whole(rows: int, window: int, seed: int) -> None:
    split: Any = Numbered(rows)
    order = RowOrder(split, seed=seed, shuffle=True, window=window).rows(3, 0, rows)
    windows = order // window
    assert 1 + np.count_nonzero(np.diff(windows)) == -(-rows // window)


def test_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    split: Any = Numbered(1000)

    def order(seed: int, epoch: int, window: int = 300) -> list[int]:
        return RowOrder(split, seed=seed, shuffle=True, window=window).rows(epoch, 0, 1000).tolist()

    assert order(5, 2) == order(5, 2)
    different = [order(5, 2), order(5, 3), order(6, 2), order(5, 2, 301), list(range(1000))]
    assert len({tuple(rows) for rows in different}) == 5


def test_order_is_the_documented_one() -> None:
    split: Any = Numbered(10)
    seed, epoch, window = 77, 4, 4

    def permutation(stream: int, size: int) -> np.ndarray[Any, Any]:
        bits = np.random.Philox(key=[seed, 0], counter=[0, 0, stream, epoch])
        return np.random.Generator(bits).permutation(size)

    expected = np.concatenate([4 * w + permutation(1 + w, min(4, 10 - 4 * w)) for w in permutation(0, 3).tolist()])
    assert RowOrder(split, seed=seed, shuffle=True, window=window).rows(epoch, 0, 10).tolist() == expected.tolist()


def test_shuffled_rows_are_spread_evenly() -> None:
    """Each row's mean position over many epochs is the middle, within five standard errors."""
    split: Any = Numbered(24)
    order = RowOrder(split, seed=3, shuffle=True, window=8)
    positions = np.array([np.argsort(order.rows(epoch, 0, 24)) for epoch in range(1500)])
    error = np.sqrt((24**2 - 1) / 12 / 1500)
    np.testing.assert_allclose(positions.mean(axis=0), 11.5, atol=5 * error)


def test_file_order_without_shuffling() -> None:
    assert rows_of(load(Numbered(7), shuffle=False, window=2)) == [[0, 1, 2, 3], [4, 5, 6]]


def test_incomplete_batch_is_dropped_on_request() -> None:
    assert [batch.global_rows for batch in load(Numbered(7), drop_last=True, epochs=3)] == [4, 4, 4]
    assert [batch.global_rows for batch in load(Numbered(8), drop_last=True)] == [4, 4]
    with pytest.raises(ConfigError, match=r"data\.batch_size: 9 exceeds the 8 rows of split 'numbered'"):
        load(Numbered(8), drop_last=True, batch_size=9)


def test_the_nearer_limit_ends_the_iteration() -> None:
    assert len(load(Numbered(8), stop_step=3, epochs=None)) == 3
    assert len(load(Numbered(8), stop_step=3, epochs=1)) == 2
    assert len(load(Numbered(8), stop_step=1, epochs=1)) == 1
    assert load(Numbered(8), stop_step=3, start_step=3, epochs=None) == []
    assert load(Numbered(0), epochs=None) == []


def test_a_batch_smaller_than_the_ranks_leaves_some_without_rows() -> None:
    sizes = [load(Numbered(5), batch_size=4, rank=rank, ranks=4)[1].host.num_rows for rank in range(4)]
    assert sizes == [1, 0, 0, 0]


def test_reading_runs_ahead_by_the_ring_and_no_further() -> None:
    split = Numbered(1000)
    with Loader(
        split,  # type: ignore[arg-type]
        batch_size=10,
        rank=0,
        ranks=1,
        seed=1,
        shuffle=False,
        window=10,
        drop_last=False,
        prefetch=4,
    ) as loader:
        for taken in range(5):
            deadline = time.monotonic() + 60
            while split.reads < taken + 4 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert split.reads == taken + 4
            next(loader)


def threads() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name.startswith("loader"))


def test_a_readers_error_reaches_the_consumer_once_and_ends_the_threads() -> None:
    split: Any = Numbered(100, faulty=57)
    loader = Loader(
        split,
        batch_size=10,
        rank=0,
        ranks=1,
        seed=1,
        shuffle=False,
        window=10,
        drop_last=False,
        prefetch=4,
        epochs=1,
    )
    before = [next(loader).step for _ in range(5)]
    assert before == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="row 57 is wrong"):
        next(loader)
    assert list(loader) == []
    assert not list(threads())


def test_closing_early_ends_the_threads() -> None:
    split: Any = Numbered(100_000, delay=0.005)
    with Loader(
        split,
        batch_size=1,
        rank=0,
        ranks=1,
        seed=1,
        shuffle=True,
        window=100,
        drop_last=False,
        prefetch=50,
        epochs=1,
    ) as loader:
        next(loader)
    assert not list(threads())
    assert split.reads < 200  # what was under way, not the rest of the epoch
    assert list(loader) == []
    loader.close()


@pytest.mark.parametrize("layout", ["raw", "jagged"])
def test_ranks_read_their_part_of_the_file(tmp_path: Path, rng: np.random.Generator, layout: Any) -> None:
    keys, dense = rng.integers(0, 99, (203, 2)), rng.normal(size=(203, 1)).astype(np.float32)
    labels = rng.integers(0, 2, 203)
    tables = [TableInfo(name="a", rows=99), TableInfo(name="b", rows=99)]
    with DatasetWriter(tmp_path, name="x", dense_names=["d"], tables=tables, layout=layout) as writer:
        writer.write("train", labels, dense, keys)
        writer.finish()
    split: Split = load_dataset(tmp_path).split("train")
    order: Any = RowOrder(split, seed=9, shuffle=True, window=64).rows(0, 0, 203)
    shares = [load(split, batch_size=50, ranks=3, rank=rank, seed=9, window=64) for rank in range(3)]
    for step in range(5):
        rows = order[step * 50 : (step + 1) * 50]
        hosts = [share[step].host for share in shares]
        np.testing.assert_array_equal(np.concatenate([host.labels for host in hosts]), labels[rows])
        np.testing.assert_array_equal(np.concatenate([host.dense for host in hosts]), dense[rows])
        joined = np.concatenate([host.keys.keys.reshape(2, -1) for host in hosts], axis=1)
        np.testing.assert_array_equal(joined.T, keys[rows])
