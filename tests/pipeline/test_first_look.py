"""The look at the data behind the caller's back: what it counts and reads, once, and what it says of wrong rows."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.config import RunConfig, parse_run_config
from dlrm.errors import DataError
from embedding.frequency import RowCounts
from embedding.jagged import Jagged
from pipeline import first_look
from pipeline.dataset import Dataset, load_dataset
from pipeline.first_look import FirstLook
from pipeline.planning import calibrate
from pipeline.synthetic import SyntheticTable, generate

TABLES = (SyntheticTable(rows=3000), SyntheticTable(rows=40, exponent=0.5), SyntheticTable(rows=900, hotness=3))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(generate(tmp_path_factory.mktemp("data") / "set", rows=4000, tables=TABLES, num_dense=2))


def config_of(path: Path, **sections: Any) -> RunConfig:
    return parse_run_config(
        {
            "data": {"path": str(path), "batch_size": 256},
            "model": {"embedding_dim": 8, "bottom_mlp": [8], "top_mlp": [4, 1]},
            **sections,
        }
    )


def test_threads_count_what_one_counts(dataset: Dataset) -> None:
    config = config_of(dataset.path)
    one, several = calibrate(config, dataset), FirstLook(config, dataset, threads=4).counts()
    assert one.counts is not None
    assert several.counts is not None
    assert several.counts.lookups == one.counts.lookups
    for mine, theirs in zip(several.counts.counts, one.counts.counts, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for name, frequency in one.frequencies.items():
        np.testing.assert_array_equal(several.frequencies[name].weights, frequency.weights)
    assert several.hotness == one.hotness


def test_counts_of_a_batch_are_those_of_its_keys() -> None:
    rng = np.random.default_rng()
    rows, batch = [7, 3000, 1], 200
    keys = np.stack([rng.integers(0, size, batch) for size in rows])
    counts = RowCounts(rows)
    counts.add(Jagged(keys.reshape(-1), None, None, len(rows), batch))
    for table, size in enumerate(rows):
        expected = np.bincount(keys[table], minlength=size)
        np.testing.assert_array_equal(np.pad(counts.counts[table], (0, size - len(counts.counts[table]))), expected)


@pytest.mark.parametrize(("evaluated", "batches"), [(100, 1), (1000, 4), (100_000, 15)])
def test_as_many_rows_as_the_larger_batch(dataset: Dataset, evaluated: int, batches: int) -> None:
    """Every row of a set that has fewer."""
    look = FirstLook(config_of(dataset.path, eval={"batch_size": evaluated}), dataset)
    rows = dataset.split("train").rows
    assert sum(keys.num_rows for keys in look.rows()) == min(batches * 256, rows)


def test_what_was_begun_is_read_once_and_elsewhere(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    count = first_look.calibrate

    def counted(*arguments: Any, **more: Any) -> Any:
        threads.append(threading.current_thread())
        return count(*arguments, **more)

    monkeypatch.setattr(first_look, "calibrate", counted)
    look = FirstLook(config_of(dataset.path), dataset)
    look.begin(counts=True)
    look.wait()
    assert look.counts() is look.counts()
    assert look.rows() is look.rows()
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_counts_that_nobody_wants_are_not_begun(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_look, "calibrate", None)
    look = FirstLook(config_of(dataset.path), dataset)
    look.begin(counts=False)
    look.wait()
    assert look.rows()


def test_a_wrong_row_is_told_to_who_asks(tmp_path: Path) -> None:
    folder = generate(tmp_path / "set", rows=4000, tables=TABLES, num_dense=2)
    for file in folder.rglob("*.bin"):
        words = np.memmap(file, np.uint32, "r+")
        words[:] = 0x7FFFFFFF
        words.flush()
    look = FirstLook(config_of(folder), load_dataset(folder))
    look.begin(counts=True)
    look.wait()
    for asked in (look.counts, look.rows):
        with pytest.raises(DataError):
            asked()
