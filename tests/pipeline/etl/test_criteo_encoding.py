"""Caps, conventions, the last day, further rows, and the statistics that the plan takes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dlrm.errors import ConfigError, DataError
from embedding.frequency import Frequency
from pipeline.dataset import load_dataset
from pipeline.etl.criteo import CriteoInputs, prepare_criteo
from pipeline.etl.encode_rows import encode_rows
from pipeline.etl.memory import parse_size
from pipeline.etl.rules import make_rules
from pipeline.statistics import read_frequencies


def write_rows(path: Path, rng: np.random.Generator, rows: int, *, labelled: bool = True) -> Path:
    lines = []
    for _ in range(rows):
        integers = ["" if value < -2 else str(value) for value in rng.integers(-4, 50, 13).tolist()]
        keys = [f"{value * 7_919 % 2**32:08x}" if value else "" for value in rng.integers(0, 12, 26).tolist()]
        lines.append("\t".join([str(rng.integers(2))][: int(labelled)] + integers + keys))
    path.write_text("\n".join(lines) + "\n")
    return path


def fields_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def words(folder: Path, split: str) -> np.ndarray:
    files = load_dataset(folder).manifest.splits[split].files
    return np.concatenate([np.fromfile(folder / file.path, "<i4").reshape(-1, 40) for file in files])


@pytest.mark.parametrize("missing", ["own", "zero", "rare"])
@pytest.mark.parametrize("modulo", [None, 30_000])
def test_caps_and_missing_categories(
    tmp_path: Path, rng: np.random.Generator, missing: str, modulo: int | None
) -> None:
    file = write_rows(tmp_path / "rows", rng, 300)
    rules = make_rules(cap_modulo=modulo, cap_rows=6, missing_category=missing, frequency_threshold=3)
    out = prepare_criteo(CriteoInputs(train=[file]), tmp_path / "out", rules=rules)
    found, fields = words(out, "train"), fields_of(file)
    for column in range(26):
        texts = [row[14 + column] for row in fields]
        values = [-1 if text == "" else int(text, 16) for text in texts]
        values = [value % modulo if modulo and value >= 0 else value for value in values]
        if missing == "zero":
            values = [max(value, 0) for value in values]
        counts = {value: values.count(value) for value in set(values) if value >= 0 or missing == "own"}
        ranked = sorted((-count, value) for value, count in counts.items() if count >= 3)[:5]
        numbers = {value: place for place, (_, value) in enumerate(ranked, 1)}
        assert found[:, 14 + column].tolist() == [numbers.get(value, 0) for value in values]


@pytest.mark.parametrize(
    ("transform", "floor", "shift", "fill"),
    [("clip_log1p", 0, 1, 0), ("add2_log1p", -2, 3, -2), ("add3_log", -2, 3, 0)],
)
def test_dense_conventions(
    tmp_path: Path, rng: np.random.Generator, transform: str, floor: int, shift: int, fill: int
) -> None:
    file = write_rows(tmp_path / "rows", rng, 60)
    out = prepare_criteo(CriteoInputs(train=[file]), tmp_path / "out", rules=make_rules(dense_transform=transform))
    found = words(out, "train")[:, 1:14].copy().view(np.float32)
    wanted = [
        [math.log(max(int(text) if text else fill, floor) + shift) for text in row[1:14]] for row in fields_of(file)
    ]
    np.testing.assert_allclose(found, wanted, rtol=3e-7, atol=0)


def test_the_last_day_is_halved(tmp_path: Path, rng: np.random.Generator) -> None:
    train, day = write_rows(tmp_path / "train", rng, 40), write_rows(tmp_path / "day", rng, 31)
    out = prepare_criteo(CriteoInputs(train=[train], last_day=day), tmp_path / "out")
    assert (len(words(out, "test")), len(words(out, "validation"))) == (16, 15)
    apart = prepare_criteo(CriteoInputs(train=[train], test=[day]), tmp_path / "apart")
    both = np.concatenate([words(out, "test"), words(out, "validation")])
    np.testing.assert_array_equal(both, words(apart, "test"))
    with pytest.raises(ConfigError, match="last day"):
        CriteoInputs(train=[train], last_day=day, test=[day])


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_rows_of_all_splits_are_counted_where_asked(tmp_path: Path, rng: np.random.Generator, fraction: float) -> None:
    """As MLPerf's row counts are; a preparation of all files as training rows numbers them the same way."""
    train, other = write_rows(tmp_path / "train", rng, 60), write_rows(tmp_path / "other", rng, 31)
    more = {"validation_fraction": fraction, "test": [other]} if fraction else {"last_day": other}
    rules = {"frequency_threshold": 6, "cap_modulo": 30_000, "missing_category": "zero"}
    inputs = CriteoInputs(train=[train], **more)
    out = prepare_criteo(inputs, tmp_path / "out", rules=make_rules(count="all", **rules))
    whole = prepare_criteo(CriteoInputs(train=[train, other]), tmp_path / "whole", rules=make_rules(**rules))
    parts = ("train", "validation", "test") if fraction else ("train", "test", "validation")
    np.testing.assert_array_equal(np.concatenate([words(out, part) for part in parts]), words(whole, "train"))
    assert load_dataset(out).tables == load_dataset(whole).tables
    apart = prepare_criteo(inputs, tmp_path / "apart", rules=make_rules(**rules))
    assert load_dataset(apart).tables != load_dataset(out).tables
    notes = load_dataset(out).manifest.notes
    assert "category 0: seen fewer than 6 times in the rows of all splits" in notes


def test_further_rows_get_the_same_numbers(tmp_path: Path, rng: np.random.Generator) -> None:
    train, test = write_rows(tmp_path / "train", rng, 200), write_rows(tmp_path / "test", rng, 50)
    out = prepare_criteo(CriteoInputs(train=[train], test=[test]), tmp_path / "out", rules=make_rules(cap_rows=7))
    again = encode_rows([test], out, tmp_path / "again")
    np.testing.assert_array_equal(words(again, "test"), words(out, "test"))
    assert load_dataset(again).tables == load_dataset(out).tables
    shutil.copytree(out / "encoding", tmp_path / "copy")
    bare = tmp_path / "bare"
    bare.write_text("".join(line.split("\t", 1)[1] + "\n" for line in test.read_text().splitlines()))
    unlabelled = encode_rows([bare], tmp_path / "copy", tmp_path / "third", split="new", labelled=False)
    np.testing.assert_array_equal(words(unlabelled, "new")[:, 1:], words(out, "test")[:, 1:])
    assert not words(unlabelled, "new")[:, 0].any()
    part = next((tmp_path / "copy").glob("C1.*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"C1\.00000\.parquet: has \d+ bytes"):
        encode_rows([test], tmp_path / "copy", tmp_path / "fourth")
    with pytest.raises(DataError, match=r"no readable encoding\.json"):
        encode_rows([test], tmp_path, tmp_path / "fifth")


def test_vocabulary_and_statistics_say_what_the_rows_hold(tmp_path: Path, rng: np.random.Generator) -> None:
    train = write_rows(tmp_path / "train", rng, 250)
    out = prepare_criteo(CriteoInputs(train=[train]), tmp_path / "out", rules=make_rules(frequency_threshold=15))
    found, fields = words(out, "train"), fields_of(train)
    manifest = load_dataset(out).manifest
    frequencies = read_frequencies(out, manifest)
    assert frequencies is not None
    for column, table in enumerate(manifest.tables):
        counted = np.bincount(found[:, 14 + column], minlength=table.rows)
        frame = pl.read_parquet(out / "encoding" / f"{table.name}.00000.parquet")
        assert frame["number"].to_list() == list(range(1, table.rows))
        assert frame["count"].to_list() == counted[1:].tolist()
        texts = {int(row[14 + column], 16) if row[14 + column] else None: key for row, key in
                 zip(fields, found[:, 14 + column].tolist(), strict=True)}  # fmt: skip
        for category, number in zip(frame["category"], frame["number"], strict=True):
            assert texts[category] == number
        wanted, got = Frequency.from_counts(counted, table.rows), frequencies[table.name]
        np.testing.assert_allclose(got.shares(), wanted.shares(), rtol=1e-12)
        np.testing.assert_allclose(got.distinct(40), wanted.distinct(40), rtol=1e-9)
    other = prepare_criteo(CriteoInputs(train=[write_rows(tmp_path / "b", rng, 90)]), tmp_path / "other")
    assert read_frequencies(out, load_dataset(other).manifest) is None


def test_steps_of_counts_are_the_counts(rng: np.random.Generator) -> None:
    for _ in range(20):
        sizes = rng.integers(1, 60, 12)
        counts = np.concatenate([rng.integers(0, 40, 1), np.sort(rng.choice(50, 11, replace=False))[::-1]])
        rows = int(sizes.sum() + rng.integers(0, 30))
        wanted = Frequency.from_counts(np.repeat(counts, sizes), rows)
        got = Frequency.from_steps(counts.tolist(), sizes.tolist(), rows)
        np.testing.assert_array_equal(got.edges, wanted.edges)
        np.testing.assert_allclose(got.shares(), wanted.shares(), rtol=1e-12)
        np.testing.assert_allclose(got.distinct(25), wanted.distinct(25), rtol=1e-9)
        assert (got.rows, got.total) == (wanted.rows, wanted.total)


def test_sizes_of_memory_are_read() -> None:
    assert [parse_size("x", text) for text in ("2GiB", "1.5 kB", "7", "3m")] == [2 << 30, 1500, 7, 3_000_000]
    with pytest.raises(ConfigError, match="--memory-limit: 'lots'"):
        parse_size("--memory-limit", "lots")
