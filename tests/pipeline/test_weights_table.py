"""One table goes out as .npy or Parquet and comes back; rows that do not fit are refused by name."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from dlrm.errors import CheckpointError, ConfigError
from embedding.comm import SingleComm
from pipeline import tensor_file
from pipeline.checkpoint import Piece, open_checkpoint, save_checkpoint
from pipeline.cli import app
from pipeline.weights_table import export_table, import_table

ROWS, DIM = 37, 4


def trained(rng, directory, dtype=np.float32):
    """A table in strided pieces, an increment over it, another table and states."""
    tables = {"table.user": rng.normal(size=(ROWS, DIM)).astype(dtype), "table.item": rng.normal(size=(5, DIM))}
    tables["bottom.0.weight"] = rng.normal(size=(2, 3))
    state = {"table.user.accumulator": np.ones(ROWS)}

    def pieces():
        user = tables["table.user"]
        parts = [Piece(user[start::3], user.shape, range(start, ROWS, 3)) for start in range(3)]
        return {**tables, **state, "table.user": parts}

    meta = {"model": {"tables": {"user": [ROWS, DIM], "item": [5, DIM]}}}
    base = save_checkpoint(directory, step=8, tensors=pieces(), meta=meta, comm=SingleComm())
    tables["table.user"][1::3] += 1
    touched = {"table.user": [None, np.arange(12), np.array([], np.int64)]}
    path = save_checkpoint(
        directory, step=9, tensors=pieces(), meta=meta, comm=SingleComm(), base=base, touched=touched
    )
    return path, tables


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("piece_bytes", [100, 1 << 24])
def test_a_table_survives_export_and_import(rng, tmp_path, monkeypatch, dtype, suffix, piece_bytes) -> None:
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", piece_bytes)
    path, tables = trained(rng, tmp_path / "run", dtype)
    file = export_table(path, tmp_path / f"user{suffix}", "user")
    if suffix == ".npy":
        found = np.load(file)
    else:
        frame = pl.read_parquet(file)
        assert frame.schema["key"] == pl.Int64
        np.testing.assert_array_equal(frame["key"], np.arange(ROWS))
        found = frame["vector"].to_numpy()
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, tables["table.user"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run", file.name]
    # Into the base, which had other rows.
    imported = open_checkpoint(import_table(file, tmp_path / "new", "user", into=tmp_path / "run/step-000000000008"))
    assert (imported.step, imported.meta) == (0, {"weights_only": True, "source": file.name})
    assert set(imported.names) == set(tables)
    for name, array in tables.items():
        np.testing.assert_array_equal(imported.read(name), array)
        assert imported.read(name).dtype == array.dtype


def test_parquet_of_other_programs_replaces_the_rows_it_names(rng, tmp_path) -> None:
    path, tables = trained(rng, tmp_path / "run")
    keys = rng.permutation(ROWS)[:9].astype(np.int32)
    vectors = rng.random((9, DIM))
    frame = pl.DataFrame({"label": ["x"] * 9, "key": keys, "vector": vectors.tolist()})
    assert frame.schema["vector"] == pl.List(pl.Float64)
    frame.write_parquet(tmp_path / "some.parquet")
    imported = open_checkpoint(import_table(tmp_path / "some.parquet", tmp_path / "new", "user", into=path))
    expected = tables["table.user"].copy()
    expected[keys] = vectors.astype(np.float32)
    np.testing.assert_array_equal(imported.read("table.user"), expected)


def rows_of(keys, dim=DIM, value=0.5):
    return pl.DataFrame({"key": keys, "vector": [[value] * dim for _ in keys]})


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (rows_of([0, ROWS]), f"key {ROWS} is not among the {ROWS} rows of table.user"),
        (rows_of([-1]), "key -1 is not among"),
        (rows_of([3, 4, 3]), "key 3 is there twice"),
        (rows_of([3, None]), "a key or a vector is missing"),
        (rows_of([3], value=None), "expected key .whole numbers. and vector"),
        (rows_of([3, 4], value=float("nan")), "holds NaN or infinity"),
        (rows_of([3], dim=DIM + 1), "name a file with rows of table.user"),
        (rows_of([3]).rename({"vector": "v"}), r"has columns key \(Int64\), v"),
        (rows_of([3]).with_columns(key=pl.lit("a")), "has columns key .String."),
        (pl.DataFrame({"key": [1], "vector": [[1.0, None, 1.0, 1.0]]}), "a key or a vector is missing"),
    ],
)
def test_parquet_that_does_not_fit_is_refused_and_leaves_nothing(rng, tmp_path, frame, message) -> None:
    path, _ = trained(rng, tmp_path / "run")
    frame.write_parquet(tmp_path / "bad.parquet")
    with pytest.raises(CheckpointError, match=message):
        import_table(tmp_path / "bad.parquet", tmp_path / "new", "user", into=path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.parquet", "run"]


def test_a_key_twice_is_found_across_blocks(rng, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 32)
    path, _ = trained(rng, tmp_path / "run")
    rows_of([1, 2, 3, 4, 5, 6, 1]).write_parquet(tmp_path / "bad.parquet")
    with pytest.raises(CheckpointError, match="key 1 is there twice"):
        import_table(tmp_path / "bad.parquet", tmp_path / "new", "user", into=path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((ROWS + 1, DIM)), rf"float64 \[{ROWS + 1}, 4\] does not fit table\.user \[{ROWS}, 4\]"),
        (np.ones((ROWS, DIM), np.int64), "int64 .* does not fit"),
        (np.full((ROWS, DIM), np.inf), "holds NaN or infinity"),
        (np.array([{}]), "name a file with rows of table.user"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(rng, tmp_path, array, message) -> None:
    path, _ = trained(rng, tmp_path / "run")
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(CheckpointError, match=message):
        import_table(tmp_path / "bad.npy", tmp_path / "new", "user", into=path)


def test_bad_names_are_told(rng, tmp_path) -> None:
    path, _ = trained(rng, tmp_path / "run")
    with pytest.raises(CheckpointError, match="has no table 'C9', only user, item"):
        export_table(path, tmp_path / "x.npy", "C9")
    with pytest.raises(CheckpointError, match=r"one table is a \.npy or a \.parquet file"):
        export_table(path, tmp_path / "x.csv", "user")
    with pytest.raises(CheckpointError, match=r"nowhere.*No such file"):
        export_table(path, tmp_path / "nowhere" / "x.npy", "user")
    with pytest.raises(CheckpointError, match=r"x\.npy: No such file"):
        import_table(tmp_path / "x.npy", tmp_path / "new", "user", into=path)
    (tmp_path / "x.parquet").write_text("no rows")
    with pytest.raises(CheckpointError, match=r"x\.parquet: .*name a file with rows"):
        import_table(tmp_path / "x.parquet", tmp_path / "new", "user", into=path)
    np.save(tmp_path / "x.npy", np.ones((ROWS, DIM)))
    with pytest.raises(CheckpointError, match="would replace the one that is read"):
        import_table(tmp_path / "x.npy", path, "user", into=path)
    with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
        import_table(tmp_path / "x.npy", tmp_path / "run", "user", into=path)


def test_the_command_line_exports_and_imports_a_table(rng, tmp_path) -> None:
    path, tables = trained(rng, tmp_path / "run")

    def crosslane(*words):
        done = CliRunner().invoke(app, ["checkpoint", *map(str, words)])
        if done.exception:
            raise done.exception
        return json.loads(done.stdout)

    file, new = tmp_path / "user.parquet", tmp_path / "new"
    exported = crosslane("export", path, file, "--table", "user", "--json")
    assert exported == {"path": str(file), "table": "user", "rows": ROWS, "dim": DIM}
    imported = crosslane("import", file, new, "--table", "user", "--into", path, "--json")
    assert imported == {**exported, "path": str(new)}
    np.testing.assert_array_equal(open_checkpoint(new).read("table.user"), tables["table.user"])
    with pytest.raises(ConfigError, match="--table and --into: go together"):
        crosslane("import", file, new, "--table", "user")
