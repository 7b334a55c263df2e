"""Synthetic rows at scale: compiled and reference, disk and on the fly, their laws, their teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dlrm.config import DataConfig
from dlrm.device import HostDevice
from dlrm.errors import ConfigError, DataError
from pipeline import generated, generator_numba
from pipeline.dataset import load_dataset
from pipeline.generated import SHAPES, GeneratedRows, describe_synthetic, parse_synthetic, write_recipe, write_synthetic
from pipeline.generator import BYTES_SCALE, Generator, exp2, generate_records, segments
from pipeline.manifest import Manifest, Recipe, row_words
from pipeline.record_loader import RecordLoader


@given(
    tables=st.lists(st.tuples(st.integers(1, 2**31), st.integers(1, 3), st.floats(0, 3)), min_size=1, max_size=4),
    num_dense=st.integers(0, 5),
    seed=st.integers(0, 2**63 - 1),
    first=st.integers(0, 2**62),
)
@settings(deadline=None, max_examples=15)
def test_compiled_rows_are_the_references(tables: Any, num_dense: int, seed: int, first: int) -> None:
    rows, hotness, exponents = zip(*tables, strict=True)
    generator = Generator(rows, hotness, exponents, num_dense, seed)
    numbers = first + np.arange(300)
    records, logits = np.empty((2, 300, generator.row_words), np.uint32), np.empty((2, 300), np.float32)
    generate_records(numbers, *generator.constants, records[0], logits[0])
    compiled: Any = generator_numba.generate_records
    compiled(numbers, *generator.constants, records[1], logits[1])
    np.testing.assert_array_equal(records[0], records[1])
    np.testing.assert_array_equal(logits[0].view(np.uint32), logits[1].view(np.uint32))
    assert np.isfinite(logits).all()
    limits = np.repeat(rows, hotness)
    assert (records[0][:, 1 + num_dense :] < limits).all()


def test_exp2_is_near(rng: np.random.Generator) -> None:
    y = rng.uniform(-60, 60, 10_000).astype(np.float32)
    np.testing.assert_allclose(exp2(y), np.exp2(y.astype(float)), rtol=3e-5)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.1, 1.45])
def test_keys_follow_the_law(exponent: float, seed: int) -> None:
    """Chi-squared of 200,000 keys over the segments, and of keys inside one: within ten standard deviations."""
    generator = Generator([1000], [1], [exponent], 0, seed)
    records = np.empty((200_000, 2), np.uint32)
    generator.write(np.arange(200_000), records)
    edges, probabilities = segments(1000, exponent)
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-12)
    each = np.repeat(probabilities / np.diff(edges), np.diff(edges)) * 200_000
    counts = np.bincount(records[:, 1], minlength=1000)
    chi_squared = ((counts - each) ** 2 / each).sum()
    # The variance of Pearson's statistic with small expected counts has a term in their inverses.
    spread = np.sqrt(2 * 999 + (1 / each).sum())
    assert abs(chi_squared - 999) < 10 * spread


def test_dense_columns_labels_and_teacher(seed: int) -> None:
    """Within seven standard errors; and the logit ranks labels better than chance by far."""
    sizes = [min(size, 50_000) for size in SHAPES["criteo-terabyte"]]
    generator = Generator(sizes, [1] * 26, [1.1] * 26, 13, seed)
    records = np.empty((50_000, generator.row_words), np.uint32)
    logits = generator.write(np.arange(50_000), records).astype(float)
    dense = records[:, 1:14].view(np.float32).astype(float)
    np.testing.assert_allclose(dense.mean(axis=0), 0, atol=7 / np.sqrt(50_000))
    np.testing.assert_allclose(dense.T @ dense / 50_000, np.eye(13), atol=7 * np.sqrt(2 / 50_000))
    assert np.abs(dense).max() <= 510 * float(BYTES_SCALE)
    labels = records[:, 0]
    probabilities = 1 / (1 + np.exp(-logits))
    spread = np.sqrt((probabilities * (1 - probabilities)).sum())
    assert abs(labels.sum() - probabilities.sum()) < 7 * spread
    assert abs(labels.mean() - 0.25) < 0.03  # the bias comes from 16,384 other rows
    assert roc_auc_score(labels, logits) > 0.7


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    manifest = describe_synthetic("criteo-terabyte", rows=70_000, seed=11, exponents=(1.2,), scale=1000)
    return manifest, write_synthetic(tmp_path_factory.mktemp("synth") / "set", manifest)


def test_rows_on_disk_are_the_rows_on_the_fly(written: Any, rng: np.random.Generator) -> None:
    manifest, folder = written
    disk = load_dataset(folder)
    virtual = load_dataset("synthetic:criteo-terabyte?rows=70000&seed=11&exponent=1.2&scale=1000")
    assert disk.tables == virtual.tables == manifest.tables
    assert disk.manifest.recipe == virtual.manifest.recipe
    assert {name: split.rows for name, split in disk.splits.items()} == {
        "train": 63_000, "validation": 3_500, "test": 3_500
    }  # fmt: skip
    assert disk.verify() == ()
    for name in disk.splits:
        rows = rng.integers(0, disk.split(name).rows, 500)
        one, other = disk.split(name).read(rows), virtual.split(name).read(rows)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.dense, other.dense)
        np.testing.assert_array_equal(one.keys.keys, other.keys.keys)
        assert one.keys.offsets is None
        assert other.keys.offsets is None


@pytest.mark.parametrize("block", [1, 64])
def test_records_on_the_fly_for_any_rank(written: Any, block: int, tmp_path: Path) -> None:
    manifest, folder = written
    write_recipe(tmp_path, manifest)
    with pytest.raises(DataError, match="holds a data set already"):
        write_recipe(tmp_path, manifest)
    options: dict[str, Any] = {
        "batch_size": 9_000, "ranks": 3, "seed": 2, "shuffle": True, "window": 20_000, "drop_last": False,
        "prefetch": 2, "epochs": 1, "device": HostDevice(), "block": block,
    }  # fmt: skip
    for rank in (0, 2):
        sources = [load_dataset(place).split("train") for place in (folder, tmp_path)]
        with RecordLoader(sources[0], rank=rank, **options) as a, RecordLoader(sources[1], rank=rank, **options) as b:
            for one, other in zip(a, b, strict=True):
                np.testing.assert_array_equal(one.records, other.records)


def test_a_cap_on_the_rows_of_a_table(rng: np.random.Generator) -> None:
    cap, scale = int(rng.integers(1, 10**6)), int(rng.integers(1, 1000))
    path = f"synthetic:criteo-terabyte?rows=100&scale={scale}"
    whole, capped = parse_synthetic(path), parse_synthetic(f"{path}&cap={cap}")
    assert [table.rows for table in capped.tables] == [min(table.rows, cap) for table in whole.tables]
    prototype = describe_synthetic("criteo-terabyte", rows=100, cap=4_000_000)
    assert sum(table.rows for table in prototype.tables) == 24_063_992
    keys = GeneratedRows(capped, "train", Path("made")).make(np.arange(90))[:, 14:]
    assert (keys >= 0).all()
    assert (keys < [table.rows for table in capped.tables]).all()


def test_bags_of_several_keys(rng: np.random.Generator) -> None:
    manifest = parse_synthetic("synthetic:criteo-multihot?rows=5000&scale=1000")
    hotness = [table.hotness for table in manifest.tables]
    assert (sum(hotness), hotness[20], row_words(manifest)) == (214, 100, 228)
    assert sum(describe_synthetic("criteo-multihot", rows=20).tables[t].rows for t in range(26)) == 204_184_588
    rows = load_dataset("synthetic:criteo-multihot?rows=5000&scale=1000").split("train").read(np.arange(4500))
    offsets, keys = rows.keys.offsets, rows.keys.keys
    np.testing.assert_array_equal(np.diff(offsets), np.repeat(hotness, 4500))
    for table, info in enumerate(manifest.tables):
        own = keys[offsets[table * 4500] : offsets[(table + 1) * 4500]]
        assert 0 <= own.min() <= own.max() < info.rows
    assert abs(rows.labels.mean() - 0.25) < 0.05


def test_what_is_refused(tmp_path: Path) -> None:
    for path, message in (
        ("synthetic:criteo?rows=5", "no shape 'criteo'; known are criteo-terabyte"),
        ("synthetic:criteo-terabyte", "must have the form"),
        ("synthetic:criteo-terabyte?rows=x", "must have the form"),
        ("synthetic:criteo-terabyte?rows=5&colour=red", "unknown colour"),
        ("synthetic:criteo-terabyte?rows=0", "rows 0"),
        ("synthetic:criteo-terabyte?rows=5&exponent=11", r"exponents \[11\.0\]"),
        ("synthetic:criteo-terabyte?rows=5&cap=0", "cap 0; need"),
        ("synthetic:criteo-terabyte?rows=5&cap=", "must have the form"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_synthetic(path)
    manifest = parse_synthetic("synthetic:criteo-terabyte?rows=100")
    assert sum(table.rows for table in manifest.tables) == 187_767_399
    with pytest.raises(DataError, match="recipe: missing"):
        Manifest(name="x", layout="synthetic", tables=manifest.tables, splits={})
    with pytest.raises(DataError, match="recipe: missing, or without an exponent for each table"):
        Manifest(
            name="x", layout="synthetic", tables=manifest.tables, splits={}, recipe=Recipe(seed=1, exponents=(1.0,))
        )


def test_numbers_of_rows_for_a_device_that_makes_them(written: Any, rng: np.random.Generator) -> None:
    """The device here is the host: the compiled rows, behind the same seam as a GPU's."""
    _, folder = written
    path = "synthetic:criteo-terabyte?rows=70000&seed=11&exponent=1.2&scale=1000"
    disk, split = load_dataset(folder).split("validation"), load_dataset(path).split("validation")
    device = HostDevice(threads=1)
    made = split.rows_on(device)
    data = DataConfig(path=path, batch_size=300, shuffle_window=1000, shuffle_block=int(rng.integers(1, 4)))
    options: dict[str, Any] = {"seed": 3, "rank": 1, "ranks": 2, "device": device, "epochs": 2, "start_step": 4}
    steps = 0
    with disk.records(data, **options) as rows, split.records(data, numbers=True, **options) as numbers:
        for one, other in zip(rows, numbers, strict=True):
            records, logits = np.empty(one.records.shape, np.uint32), np.full(one.num_rows, np.nan, np.float32)
            made.write(other.records.view(np.int64).reshape(-1), records, logits)
            np.testing.assert_array_equal(records, one.records)
            assert np.isfinite(logits).all()
            assert (one.step, one.own) == (other.step, other.own)
            steps += 1
    assert steps == 20
    for refused in (lambda: disk.rows_on(device), lambda: disk.records(data, numbers=True, **options)):
        with pytest.raises(DataError, match="layout 'raw' has its rows in files"):
            refused()


def test_large_sets_go_to_the_disk_from_where_they_are_made(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated, "CACHED_BYTES", 1 << 20)
    monkeypatch.setattr(generated, "CHUNK_ROWS", 1024)  # so that the ring goes round and round
    rows = int(rng.integers(20_000, 60_000))
    manifest = describe_synthetic("criteo-terabyte", rows=rows, seed=int(rng.integers(2**40)), scale=1000)
    written = load_dataset(write_synthetic(tmp_path / "set", manifest))
    written.verify()
    for name, split in manifest.splits.items():
        wanted = GeneratedRows(manifest, name, tmp_path).make(np.arange(split.rows))
        np.testing.assert_array_equal(np.fromfile(tmp_path / "set" / f"{name}.bin", np.int32), wanted.ravel())
