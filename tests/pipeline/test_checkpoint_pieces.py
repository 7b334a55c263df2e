"""Tensors written in pieces by some ranks are read in other pieces by other ranks, bit for bit."""

from __future__ import annotations

import json
import runpy
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.errors import CheckpointError
from embedding.comm import SingleComm
from pipeline import tensor_file
from pipeline.checkpoint import Piece, open_checkpoint, save_checkpoint
from pipeline.checkpoint_pieces import intersect, places
from pipeline.weights import export_weights

on_ranks = runpy.run_path(str(Path(__file__).with_name("thread_ranks.py")))["run_ranks"]

ranges = st.builds(
    lambda start, length, step: range(start, start + length * step, step),
    st.integers(0, 40),
    st.integers(0, 12),
    st.integers(1, 9),
)


@settings(deadline=None, max_examples=300)
@given(left=ranges, right=ranges)
def test_ranges_meet_where_sets_do(left, right) -> None:
    common = intersect(left, right)
    assert list(common) == sorted(set(left) & set(right))
    for whole in (left, right):
        assert list(np.array(whole, dtype=int)[places(common, whole)]) == list(common)


def plan_pieces(array, kind, rank, ranks, threshold=0):
    """What ``rank`` holds of a table under a kind of placement; strided views, as the tables are."""
    rows = len(array)
    every = range(array.shape[1]) if array.ndim == 2 else None
    pieces = []
    if kind == "table_wise":
        part = range(rows if rank == ranks - 1 else 0)
        pieces = [Piece(array[: len(part)], array.shape, part, every)]
    elif kind == "row_wise":
        part = range(threshold + rank, rows, ranks) if threshold + rank < rows else range(0)
        pieces = [Piece(array[threshold + rank :: ranks], array.shape, part, every)]
        if threshold and rank == 0:  # the replicated ones
            pieces.append(Piece(array[:threshold], array.shape, range(threshold), every))
    elif kind == "column_wise" and array.ndim == 1:
        return plan_pieces(array, "row_wise", rank, ranks)
    elif kind == "column_wise":
        width = array.shape[1] // 4  # always four parts, dealt to the ranks
        for part in range(rank, 4, ranks):
            columns = range(part * width, (part + 1) * width)
            pieces.append(Piece(array[:, columns.start : columns.stop], array.shape, range(rows), columns))
    return pieces


def save_planned(directory, tensors, kind, ranks, *, threshold=0, step=1, **options):
    paths = on_ranks(
        ranks,
        lambda comm: save_checkpoint(
            directory,
            step=step,
            tensors={name: plan_pieces(array, kind, comm.rank, ranks, threshold) for name, array in tensors.items()},
            meta={},
            comm=comm,
            **options,
        ),
    )
    assert isinstance(paths[0], Path), paths
    return paths[0]


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    rows=st.integers(1, 40),
    before=st.sampled_from(["table_wise", "row_wise", "column_wise"]),
    after=st.sampled_from(["table_wise", "row_wise", "column_wise"]),
    ranks=st.sampled_from([1, 2, 4]),
    new_ranks=st.sampled_from([1, 2, 3, 8]),
)
def test_any_plan_reads_any_other(tmp_path_factory, data, rows, before, after, ranks, new_ranks) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    threshold, new_threshold = data.draw(st.integers(0, rows)), data.draw(st.integers(0, rows))
    tensors = {"table.a": rng.random((rows, 8), np.float32), "table.a.accumulator": rng.random(rows, np.float32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "PIECE_BYTES", data.draw(st.sampled_from([1, 100, 1 << 20])))
        path = save_planned(tmp_path_factory.mktemp("c"), tensors, before, ranks, threshold=threshold)
        checkpoint = open_checkpoint(path)
        for name, array in tensors.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)
            for rank in range(new_ranks):
                for piece in plan_pieces(array, after, rank, new_ranks, new_threshold):
                    columns = piece.columns if array.ndim == 2 else None
                    found = checkpoint.read(name, rows=piece.rows, columns=columns)
                    np.testing.assert_array_equal(found, piece.array)
                    target = np.full((*found.shape, 2), np.nan, np.float32)[..., 0]  # no two elements side by side
                    assert checkpoint.read(name, target, rows=piece.rows, columns=columns) is target
                    np.testing.assert_array_equal(target, piece.array)


@settings(deadline=None, max_examples=60)
@given(rows=ranges, columns=ranges, data=st.data())
def test_any_strided_part_is_read(tmp_path_factory, rows, columns, data) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    array = rng.integers(0, 1 << 40, (150, 152))
    kind = data.draw(st.sampled_from(["table_wise", "row_wise", "column_wise"]))
    path = save_planned(tmp_path_factory.mktemp("c"), {"x": array}, kind, 2, threshold=data.draw(st.integers(0, 150)))
    found = open_checkpoint(path).read("x", rows=rows, columns=columns)
    np.testing.assert_array_equal(found, array[np.ix_(list(rows), list(columns))])


def test_whole_arrays_of_any_shape_are_read_by_rows(rng, tmp_path) -> None:
    tensors = {"cube": rng.random((5, 2, 3)), "line": rng.random(7), "point": np.array(3.0)}
    path = save_checkpoint(tmp_path, step=1, tensors=tensors, meta={}, comm=SingleComm())
    checkpoint = open_checkpoint(path)
    np.testing.assert_array_equal(checkpoint.read("cube", rows=range(1, 5, 3)), tensors["cube"][1:5:3])
    np.testing.assert_array_equal(checkpoint.read("line", rows=range(2, 3)), tensors["line"][2:3])
    assert checkpoint.read("point") == 3.0
    turned = np.full((3, 2, 5), np.nan).T
    np.testing.assert_array_equal(checkpoint.read("cube", turned), tensors["cube"])
    for name, part in (("point", {"rows": range(1)}), ("line", {"columns": range(1)}), ("cube", {"rows": range(6)})):
        with pytest.raises(CheckpointError, match=rf"{name} is .* and has no (rows|columns) range"):
            checkpoint.read(name, **part)


def test_a_part_that_does_not_fit_is_refused(rng, tmp_path) -> None:
    checkpoint = open_checkpoint(save_planned(tmp_path, {"x": rng.random((9, 4))}, "row_wise", 2))
    for part in ({"rows": range(3, 10)}, {"rows": range(5, 1, -1)}, {"columns": range(5)}):
        with pytest.raises(CheckpointError, match="use a checkpoint of this model"):
            checkpoint.read("x", **part)
    with pytest.raises(CheckpointError, match=r"x is <f8 \[3, 4\], but float64 \[4, 4\] is expected"):
        checkpoint.read("x", np.empty((4, 4)), rows=range(3))


def test_pieces_are_npy_files_and_whole_tensors_keep_the_first_format(rng, tmp_path) -> None:
    array = rng.random((9, 4))
    path = save_planned(tmp_path, {"table.x": array}, "row_wise", 2, threshold=3)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["version"] == 2
    rebuilt = np.full_like(array, np.nan)
    for piece in manifest["tensors"]["table.x"]["pieces"]:
        rebuilt[slice(*piece["rows"]), slice(*piece["columns"])] = np.load(path / piece["file"])
    np.testing.assert_array_equal(rebuilt, array)
    whole = save_planned(tmp_path, {"table.x": array}, "table_wise", 2, step=2)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert set(manifest["tensors"]["table.x"]) == {"file", "shape", "dtype", "bytes", "sha256"}


def test_a_checkpoint_of_the_first_format_is_read(rng, tmp_path) -> None:
    """Written here as version 1 defines it, not by what is tested."""
    import hashlib

    table = rng.random((6, 4))
    folder = tmp_path / "step-000000000005"
    (folder / "rank-0000").mkdir(parents=True)
    file = folder / "rank-0000" / "table.C1.npy"
    np.save(file, table)
    content = file.read_bytes()
    entry = {"file": "rank-0000/table.C1.npy", "shape": [6, 4], "dtype": "<f8", "bytes": len(content)}
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    manifest = {"format": "crosslane-checkpoint", "version": 1, "step": 5, "created": 1.5, "ranks": 1}
    manifest |= {"meta": {"a": 1}, "tensors": {"table.C1": entry}}
    plain = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["checksum"] = hashlib.sha256(plain.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.step, checkpoint.meta, checkpoint.base) == (5, {"a": 1}, None)
    assert checkpoint.entry("table.C1").file == entry["file"]
    np.testing.assert_array_equal(checkpoint.read("table.C1"), table)
    found = checkpoint.read("table.C1", rows=range(1, 6, 2), columns=range(2))
    np.testing.assert_array_equal(found, table[1::2, :2])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([range(0, 6, 2), range(0, 6, 3)], "hold the same rows; one rank must own it"),
        ([range(0, 6, 2), range(1, 5, 2)], "hold 10 of 12 elements"),
        ([range(0, 6, 2), range(1, 7, 2)], None),
        ([range(0, 6, 2), range(3, 9, 2)], "(outside of its shape|hold the same)"),
        ([range(0, 6, 2), range(5, 0, -2)], "does not hold rows"),
    ],
)
def test_every_row_has_one_owner(tmp_path, parts, message) -> None:
    results = on_ranks(
        2,
        lambda comm: save_checkpoint(
            tmp_path,
            step=1,
            tensors={"x": Piece(np.ones((len(parts[comm.rank]), 2)), (6, 2), parts[comm.rank])},
            meta={},
            comm=comm,
        ),
    )
    if message is None:
        assert open_checkpoint(results[0]).read("x").sum() == 12
        return
    for error in results:
        assert isinstance(error, CheckpointError)
        with pytest.raises(CheckpointError, match=message):
            raise error
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_differ_about_a_tensor_are_refused(tmp_path) -> None:
    def work(comm):
        piece = Piece(np.ones((3, 2), (np.float32, np.float64)[comm.rank]), (6, 2), range(comm.rank, 6, 2))
        return save_checkpoint(tmp_path, step=1, tensors={"x": piece}, meta={}, comm=comm)

    for error in on_ranks(2, work):
        assert isinstance(error, CheckpointError)
        assert "is <f8 [6, 2] on rank 1, but <f4 [6, 2] on another" in str(error)


def test_a_piece_of_the_wrong_size_is_refused(tmp_path) -> None:
    piece = Piece(np.ones((3, 2)), (6, 2), range(0, 6, 3))
    with pytest.raises(CheckpointError, match=r"a piece of shape \[3, 2\] does not hold rows range\(0, 6, 3\)"):
        save_checkpoint(tmp_path, step=1, tensors={"x": piece}, meta={}, comm=SingleComm())


@pytest.mark.parametrize("kind", ["row_wise", "column_wise"])
def test_a_flipped_bit_of_a_piece_is_found(rng, tmp_path, kind) -> None:
    array = rng.random((60, 8))
    path = save_planned(tmp_path, {"table.C1": array}, kind, 2)
    files = sorted(path.rglob("*.npy"))
    assert len(files) >= 2
    for file in files:
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{file.name}: tensor table\.C1 is damaged"):
            open_checkpoint(path).read("table.C1", rows=range(1, 60, 7))
        file.write_bytes(content)
    np.testing.assert_array_equal(open_checkpoint(path).read("table.C1"), array)


def test_names_of_pieces_and_of_tables_never_meet(rng, tmp_path) -> None:
    tensors = {"table.x": rng.random((9, 4)), "table.x@1": rng.random((9, 4)), "table.x.1": rng.random((9, 4))}
    checkpoint = open_checkpoint(save_planned(tmp_path, tensors, "row_wise", 1, threshold=3))
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


@pytest.mark.parametrize("kind", ["row_wise", "column_wise"])
def test_pieces_need_memory_for_a_few_blocks_only(tmp_path, kind) -> None:
    megabytes = 96
    table = np.ones((megabytes << 12, 64), np.float32)
    table += np.arange(64, dtype=np.float32)
    pieces = [piece for rank in range(2) for piece in plan_pieces(table, kind, rank, 2)]
    tracemalloc.start()
    path = save_checkpoint(tmp_path, step=1, tensors={"x": pieces}, meta={}, comm=SingleComm())
    saved = tracemalloc.get_traced_memory()[1]
    other = np.empty((len(table), 64 * 2), np.float32)[:, ::2]
    tracemalloc.reset_peak()
    start = tracemalloc.get_traced_memory()[0]
    checkpoint = open_checkpoint(path)
    checkpoint.read("x", other)
    loaded = tracemalloc.get_traced_memory()[1] - start
    tracemalloc.reset_peak()
    start = tracemalloc.get_traced_memory()[0]
    checkpoint.read("x", other[::3, ::2], rows=range(0, len(table), 3), columns=range(0, 64, 2))
    partly = tracemalloc.get_traced_memory()[1] - start
    tracemalloc.stop()
    assert saved < 40 << 20  # a block of 16 MiB, and the one before it
    assert loaded < 40 << 20
    assert partly < 40 << 20
    np.testing.assert_array_equal(other[::3, ::2], table[::3, ::2])


def test_weights_in_pieces_are_exported_as_whole_tables(rng, tmp_path) -> None:
    tensors = {"table.a": rng.random((30, 8)), "table.b": rng.random((1, 8))}
    path = save_planned(tmp_path / "c", tensors, "row_wise", 4, threshold=0)
    with np.load(export_weights(path, tmp_path / "w.npz")) as found:
        assert set(found) == set(tensors)
        for name, array in tensors.items():
            np.testing.assert_array_equal(found[name], array)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c", "w.npz"]
