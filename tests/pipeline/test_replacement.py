"""A data set that replaces another: no file of the old one is left, and no other file is touched."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.adopt import adopt
from pipeline.dataset import load_dataset
from pipeline.etl import publishing
from pipeline.etl.criteo import CriteoInputs, prepare_criteo
from pipeline.etl.job import Job
from pipeline.generated import describe_synthetic, write_recipe
from pipeline.manifest import TableInfo
from pipeline.synthetic import SyntheticTable, generate
from pipeline.writer import DatasetWriter

TABLES = (TableInfo(name="a", rows=9), TableInfo(name="b", rows=5))


def write_set(folder: Path, rng: np.random.Generator, *splits: str, **options: Any) -> Path:
    with DatasetWriter(folder, name="x", dense_names=["d"], tables=TABLES, **options) as writer:
        for split in splits:
            keys = np.stack([rng.integers(0, table.rows, 7) for table in TABLES], axis=1)
            writer.write(split, rng.integers(0, 2, 7), rng.normal(size=(7, 1)), keys)
        return writer.finish(licence="", source="a test", notes=[])


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


@pytest.fixture
def criteo_files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "train.tsv", tmp_path / "test.tsv"]
    for path in paths:
        fields = (["1", *[str(random.randrange(9))] * 13, *["0000000a"] * 26] for _ in range(9))
        path.write_text("".join("\t".join(row) + "\n" for row in fields))
    return paths


def test_only_what_the_old_manifest_alone_names_is_removed(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = write_set(tmp_path / "set", rng, "train", "test", "extra", layout="jagged")
    (folder / "extra" / "mine.txt").touch()
    (folder / "validation.bin").touch()
    (tmp_path / "elsewhere.bin").write_bytes((folder / "test" / "rows.bin").read_bytes())
    (folder / "test" / "rows.bin").unlink()
    (folder / "test" / "rows.bin").symlink_to(tmp_path / "elsewhere.bin")
    write_set(folder, rng, "train", overwrite=True)
    assert files_in(folder) == {"dataset.json", "train.bin", "extra/mine.txt", "validation.bin", "test/rows.bin"}
    assert (tmp_path / "elsewhere.bin").is_file()
    assert not (folder / "train").exists()
    load_dataset(folder).verify()


def test_a_recipe_leaves_no_rows_of_the_set_before_it(tmp_path: Path) -> None:
    generate(tmp_path, rows=20, tables=[SyntheticTable(rows=9)] * 2)
    assert "train.bin" in files_in(tmp_path)
    write_recipe(tmp_path, describe_synthetic("criteo-terabyte", rows=10), overwrite=True)
    assert files_in(tmp_path) == {"dataset.json"}


def test_files_of_an_adopted_set_stay(tmp_path: Path, rng: np.random.Generator) -> None:
    write_set(tmp_path, rng, "train", "old")
    files = {"train": [tmp_path / "old.bin"]}
    kind = {"layout": "hugectr-raw", "rows_per_table": [9, 5], "num_dense": 1, "dense_dtype": "float32"}
    adopt(files, out=tmp_path, **kind, relative=True, checksums=True, overwrite=True)
    write_set(tmp_path, rng, "train", overwrite=True)
    assert files_in(tmp_path) == {"dataset.json", "train.bin", "old.bin"}


def test_a_broken_manifest_is_replaced_and_tells_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    write_set(tmp_path, rng, "train", "test")
    (tmp_path / "dataset.json").write_text("{")
    write_set(tmp_path, rng, "train", overwrite=True)
    assert files_in(tmp_path) == {"dataset.json", "train.bin", "test.bin"}


@pytest.mark.parametrize("at", ["before", "after"])
def test_criteo_prepared_again_after_a_stop_leaves_no_old_split(
    tmp_path: Path, criteo_files: list[Path], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    train, test = criteo_files
    out = prepare_criteo(CriteoInputs(train=[train], test=[test]), tmp_path / "out")
    alone = prepare_criteo(CriteoInputs(train=[train]), tmp_path / "alone")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "write_manifest" if at == "before" else "remove_left_behind", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare_criteo(CriteoInputs(train=[train]), out, overwrite=True)
    assert (out / "test.bin").exists()
    if at == "after":
        load_dataset(out).verify()
    with monkeypatch.context() as patch:
        patch.setattr(Job, "mark", stopped)  # goes on, does nothing anew
        prepare_criteo(CriteoInputs(train=[train]), out, overwrite=True)
    assert files_in(out) == files_in(alone)
    load_dataset(out).verify()
