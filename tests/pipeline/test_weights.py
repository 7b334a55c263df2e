"""Weights go out as .npz and come back unchanged; what is no model is refused by name."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from dlrm.errors import CheckpointError
from embedding.comm import SingleComm
from pipeline.checkpoint import open_checkpoint, save_checkpoint
from pipeline.weights import check_weights, export_weights, import_weights, load_weights


def some_weights(rng, dtype=np.float32):
    shapes = {
        "bottom.0.weight": (8, 3),
        "bottom.0.bias": (8,),
        "bottom.1.weight": (4, 8),
        "bottom.1.bias": (4,),
        "top.0.weight": (1, 7),
        "top.0.bias": (1,),
        "table.user": (20, 4),
        "table.user.age": (7, 4),
        "table.Genre/é": (5, 4),
    }
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def save(path, tensors, **meta):
    return save_checkpoint(path.parent, step=9, tensors=tensors, meta=meta, comm=SingleComm(), name=path.name)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_survive_export_and_import(rng, tmp_path, dtype) -> None:
    weights = some_weights(rng, dtype)
    state = {"optimizer.m": np.ones(9), "table.user.accumulator": np.ones((20, 1)), "table.user.age.v": np.ones((7, 4))}
    checkpoint = save(tmp_path / "trained", {**weights, **state})
    file = export_weights(checkpoint, tmp_path / "weights.npz")
    with np.load(file) as found:  # as any other program would
        assert_same(found, weights)
    imported = open_checkpoint(import_weights(file, tmp_path / "imported"))
    assert imported.step == 0
    assert imported.meta == {"weights_only": True, "source": "weights.npz"}
    assert_same({name: imported.read(name) for name in imported.names}, weights)
    again = export_weights(tmp_path / "imported", tmp_path / "again.npz")
    with load_weights(again) as found:
        assert_same(found, weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "imported", "trained", "weights.npz"]


def test_the_model_in_meta_tells_tables_from_state(rng, tmp_path) -> None:
    # A table named like the state of another one.
    tensors = {"table.user": rng.random((4, 2)), "table.user.m": rng.random((3, 2)), "table.user.v": rng.random((4, 2))}
    checkpoint = save(tmp_path / "c", tensors, model={"tables": {"user": [4, 2], "user.m": [3, 2]}})
    with np.load(export_weights(checkpoint, tmp_path / "w.npz")) as found:
        assert set(found) == {"table.user", "table.user.m"}


@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_files_of_other_programs_are_read_lazily(rng, tmp_path, save_npz) -> None:
    weights = some_weights(rng)
    file = tmp_path / "w.npz"
    weights["table.user"] = np.asfortranarray(weights["table.user"])
    save_npz(file, **weights)
    with load_weights(file) as found:
        assert found.shapes["table.user"] == (20, 4)
        assert len(found) == len(weights)
        assert_same(found, weights)
    assert_same_checkpoint(import_weights(file, tmp_path / "c"), weights)


def assert_same_checkpoint(path, weights):
    checkpoint = open_checkpoint(path)
    assert_same({name: checkpoint.read(name) for name in checkpoint.names}, weights)


def test_large_tables_are_not_held_twice(tmp_path) -> None:
    megabytes = 64
    table = np.ones((megabytes << 14, 16), np.float32)
    checkpoint = save(tmp_path / "c", {"table.big": table, "table.big.accumulator": table[:, :1]})
    tracemalloc.start()
    file = export_weights(checkpoint, tmp_path / "w.npz")
    exported = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    save(tmp_path / "again", {"table.big": table})
    saved = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    import_weights(file, tmp_path / "imported")
    imported = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert exported < 0.6 * table.nbytes  # one piece of 16 MiB, and the one before it
    assert saved < 0.1 * table.nbytes
    assert imported < 1.6 * table.nbytes


def test_an_export_of_a_damaged_checkpoint_leaves_no_file(rng, tmp_path) -> None:
    checkpoint = save(tmp_path / "c", some_weights(rng))
    file = checkpoint / "rank-0000" / "table.user.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tensor table\.user is damaged"):
        export_weights(checkpoint, tmp_path / "w.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_target_that_cannot_be_written_is_named(rng, tmp_path) -> None:
    checkpoint = save(tmp_path / "c", some_weights(rng))
    with pytest.raises(CheckpointError, match=r"weights .*nowhere.*No such file"):
        export_weights(checkpoint, tmp_path / "nowhere" / "w.npz")


def test_import_replaces_no_foreign_folder(rng, tmp_path) -> None:
    np.savez(tmp_path / "w.npz", **some_weights(rng))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
        import_weights(tmp_path / "w.npz", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_check_weights_names_the_first_difference(rng, tmp_path) -> None:
    weights = some_weights(rng)
    np.savez(tmp_path / "w.npz", **weights)
    expected = {name: array.shape for name, array in weights.items()}
    with load_weights(tmp_path / "w.npz") as found:
        check_weights(found, expected)
        with pytest.raises(CheckpointError, match=r"table\.user has shape \[20, 4\], expected \[21, 4\]"):
            check_weights(found, {**expected, "table.user": (21, 4)})
        with pytest.raises(CheckpointError, match=r"table\.tag is missing, expected \[2, 4\]"):
            check_weights(found, {**expected, "table.tag": (2, 4)})
        del expected["top.0.bias"]
        with pytest.raises(CheckpointError, match=r"top\.0\.bias \[1\] is unknown to the model"):
            check_weights(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"middle.0.weight": np.ones((2, 2))}, r"'middle\.0\.weight' is no weight"),
        ({"bottom.1.bias": None}, r"bottom\.1\.bias is missing"),
        ({"bottom.0.weight": None, "bottom.0.bias": None}, r"bottom\.0\.weight is missing"),
        ({"bottom.1.weight": np.ones((4, 9))}, r"bottom\.1\.weight has shape \[4, 9\], expected \[out, 8\]"),
        ({"bottom.1.bias": np.ones((4, 1))}, r"bottom\.1\.bias has shape \[4, 1\], expected \[4\]"),
        ({"top.0.weight": np.ones(7)}, r"top\.0\.weight has shape \[7\], expected \[out, in\]"),
        ({"table.user": np.ones((20, 5))}, r"table\.user has shape \[20, 5\], expected \[rows, 4\]"),
        ({"table.user": np.ones(20)}, r"table\.user has shape \[20\], expected \[rows, 4\]"),
        ({"table.user": np.ones((20, 4), np.int64)}, r"table\.user is int64; save it as float32 or float64"),
        ({"table.user": np.full((20, 4), np.nan)}, r"table\.user holds NaN or infinity"),
        ({"top.0.bias": np.array([np.inf])}, r"top\.0\.bias holds NaN or infinity"),
        ({"table.user": np.array(["text"])}, r"table\.user holds <U4, not numbers"),
        ({"table.user": np.array([{}])}, r"table\.user holds object, not numbers"),
    ],
)
def test_what_is_no_model_is_refused_and_leaves_nothing(rng, tmp_path, change, message) -> None:
    weights = {name: array for name, array in {**some_weights(rng), **change}.items() if array is not None}
    np.savez(tmp_path / "w.npz", **weights)
    with pytest.raises(CheckpointError, match=message):
        import_weights(tmp_path / "w.npz", tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]


def test_files_that_are_no_weights_are_refused(rng, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.npz: No such file"):
        load_weights(tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(CheckpointError, match=r"text\.npz: .*name an \.npz file"):
        load_weights(tmp_path / "text.npz")
    np.savez(tmp_path / "w.npz", **some_weights(rng))
    content = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"short\.npz"):
        load_weights(tmp_path / "short.npz")


def test_a_flipped_bit_is_found(rng, tmp_path) -> None:
    table = rng.random((500, 4))
    np.savez(tmp_path / "w.npz", **{"table.user": table})
    content = bytearray((tmp_path / "w.npz").read_bytes())
    content[5_000] ^= 4
    (tmp_path / "w.npz").write_bytes(content)
    with load_weights(tmp_path / "w.npz") as weights, pytest.raises(CheckpointError, match=r"table\.user is damaged"):
        weights["table.user"]
