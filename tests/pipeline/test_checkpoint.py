"""Checkpoints are whole or absent, verified when read, and the same for any number of ranks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dlrm.errors import CheckpointError
from embedding.comm import SingleComm
from pipeline import checkpoint as module
from pipeline import tensor_file
from pipeline.checkpoint import (
    check_compatible,
    latest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

on_ranks = runpy.run_path(str(Path(__file__).with_name("thread_ranks.py")))["run_ranks"]
ROOT = Path(__file__).parents[2]
META = {"model": {"precision": "fp32"}, "course": {"epoch": 1, "best": None}}


def some_tensors(rng, rows=50):
    return {
        "bottom.0.weight": rng.normal(size=(4, 3)).astype(np.float32),
        "bottom.0.bias": rng.normal(size=4).astype(np.float32),
        "optimizer.m": rng.normal(size=16),
        "table.C1": rng.normal(size=(rows, 4)).astype(np.float32),
        "table.C1.accumulator": rng.random(size=(rows, 1)).astype(np.float32),
        "table.a/b é": rng.integers(0, 9, (3, 4)),
    }


def save(directory, tensors, *, step=1, meta=META, name=None):
    return save_checkpoint(directory, step=step, tensors=tensors, meta=meta, comm=SingleComm(), name=name)


def assert_holds(path, tensors):
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.names) == set(tensors)
    for name, array in tensors.items():
        found = checkpoint.read(name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_what_is_saved_is_read(rng, tmp_path) -> None:
    tensors = some_tensors(rng)
    path = save(tmp_path / "new" / "checkpoints", tensors, step=1200)
    assert path.name == "step-000000001200"
    assert_holds(path, tensors)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.step, checkpoint.meta, checkpoint.ranks, checkpoint.path) == (1200, META, 1, path)
    assert "table.C1" in checkpoint
    assert "table.C2" not in checkpoint
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name]


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    dtype=st.sampled_from(["float32", "float64", "int64", "uint8", ">f4"]),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7),
)
def test_any_array_survives(tmp_path_factory, data, dtype, shape) -> None:
    array = np.array(data.draw(hnp.arrays(np.dtype(dtype), shape)))
    if data.draw(st.booleans()):
        array = np.asfortranarray(array)
    if array.ndim and data.draw(st.booleans()):
        array = array[::-2]
    path = save(tmp_path_factory.mktemp("any"), {"x": array})
    found = open_checkpoint(path).read("x")
    assert found.shape == array.shape
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_tensors_larger_than_a_piece_survive(rng, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 100)
    tensors = {"table.C1": rng.random((57, 5)), "turned": rng.random((57, 5)).T, "one_long_row": rng.random((3, 70))}
    assert_holds(save(tmp_path, tensors), tensors)


def test_shards_are_npy_files_that_sha256sum_can_check(rng, tmp_path) -> None:
    tensors = some_tensors(rng)
    path = save(tmp_path, tensors)
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["tensors"].items():
        np.testing.assert_array_equal(np.load(path / entry["file"]), tensors[name])
        assert hashlib.sha256((path / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


def test_reading_into_an_array_allocates_nothing_else(rng, tmp_path) -> None:
    tensors = some_tensors(rng)
    checkpoint = open_checkpoint(save(tmp_path, tensors))
    out = np.full((50, 4), np.nan, np.float32)
    assert checkpoint.read("table.C1", out) is out
    np.testing.assert_array_equal(out, tensors["table.C1"])
    turned = np.full((4, 50), np.nan, np.float32).T
    np.testing.assert_array_equal(checkpoint.read("table.C1", turned), tensors["table.C1"])


@pytest.mark.parametrize("out", [np.empty((50, 5), np.float32), np.empty((50, 4))], ids=["shape", "dtype"])
def test_reading_into_an_array_that_does_not_fit_is_refused(rng, tmp_path, out) -> None:
    checkpoint = open_checkpoint(save(tmp_path, some_tensors(rng)))
    with pytest.raises(CheckpointError, match=r"table\.C1 is <f4 \[50, 4\], but float.. \[50, .\] is expected"):
        checkpoint.read("table.C1", out)


def test_an_unknown_tensor_is_named(rng, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor 'table\.C9'"):
        open_checkpoint(save(tmp_path, some_tensors(rng))).read("table.C9")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_of_any_number_of_ranks_are_read_by_one(rng, tmp_path, size) -> None:
    tensors = some_tensors(rng)
    names = list(tensors)
    saved = on_ranks(
        size,
        lambda comm: save_checkpoint(
            tmp_path,
            step=7,
            tensors={name: tensors[name] for name in names[comm.rank :: size]},
            meta=META if comm.rank == 0 else {},
            comm=comm,
        ),
    )
    assert len(set(saved)) == 1
    assert_holds(saved[0], tensors)
    opened = on_ranks(3, lambda comm: open_checkpoint(saved[0], comm=comm))
    assert [(checkpoint.step, checkpoint.meta, checkpoint.ranks) for checkpoint in opened] == [(7, META, size)] * 3


def test_a_tensor_of_two_owners_is_refused_on_every_rank(tmp_path) -> None:
    errors = on_ranks(2, lambda comm: save_checkpoint(tmp_path, step=1, tensors={"x": np.zeros(2)}, meta={}, comm=comm))
    assert all(isinstance(error, CheckpointError) and "one rank must own it" in str(error) for error in errors)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_cannot_write_fails_all(tmp_path, monkeypatch, rng) -> None:
    before = some_tensors(rng)
    save(tmp_path, before, step=1)
    original = module.write_tensor

    def full_disk(path, array):
        if "rank-0001" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return original(path, array)

    monkeypatch.setattr(module, "write_tensor", full_disk)
    errors = on_ranks(
        2,
        lambda comm: save_checkpoint(tmp_path, step=2, tensors={f"x{comm.rank}": np.zeros(2)}, meta={}, comm=comm),
    )
    for error in errors:
        assert isinstance(error, CheckpointError)
        assert "No space left on device" in str(error)
        assert "rank 1" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000001"]
    assert_holds(latest_checkpoint(tmp_path), before)


def test_a_damaged_checkpoint_fails_every_rank(rng, tmp_path) -> None:
    path = save(tmp_path, some_tensors(rng))
    (path / "manifest.json").unlink()
    for error in on_ranks(2, lambda comm: open_checkpoint(path, comm=comm)):
        assert isinstance(error, CheckpointError)


def test_a_flipped_bit_is_found_and_its_tensor_named(rng, tmp_path) -> None:
    tensors = some_tensors(rng)
    path = save(tmp_path, tensors)
    file = path / "rank-0000" / "table.C1.npy"
    content = bytearray(file.read_bytes())
    for position in (0, 60, *rng.integers(0, len(content), 8)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        checkpoint = open_checkpoint(path)
        with pytest.raises(CheckpointError, match=r"table\.C1\.npy: tensor table\.C1 is damaged"):
            checkpoint.read("table.C1")
        np.testing.assert_array_equal(checkpoint.read("optimizer.m"), tensors["optimizer.m"])


@pytest.mark.parametrize("change", [-1, 1, -1000])
def test_a_file_of_another_length_is_refused(rng, tmp_path, change) -> None:
    path = save(tmp_path, some_tensors(rng))
    file = path / "rank-0000" / "table.C1.npy"
    content = file.read_bytes()
    file.write_bytes(content[:change] if change < 0 else content + b"x")
    with pytest.raises(CheckpointError, match=rf"table\.C1 has {file.stat().st_size} bytes, but {len(content)}"):
        open_checkpoint(path).read("table.C1")


def test_a_missing_file_is_named(rng, tmp_path) -> None:
    path = save(tmp_path, some_tensors(rng))
    (path / "rank-0000" / "optimizer.m.npy").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.m cannot be read \(No such file"):
        open_checkpoint(path).read("optimizer.m")


def test_any_flipped_bit_of_the_manifest_is_found(rng, tmp_path) -> None:
    path = save(tmp_path, some_tensors(rng))
    file = path / "manifest.json"
    content = file.read_bytes()
    for position in rng.integers(0, len(content), 40):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        if _same_json(content, damaged):
            continue  # white space became other white space
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def _same_json(left, right) -> bool:
    try:
        return json.loads(left) == json.loads(right)
    except ValueError:
        return False


def test_what_is_no_checkpoint_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(CheckpointError, match="not of a Crosslane checkpoint"):
        open_checkpoint(tmp_path)


def test_a_newer_format_is_refused(rng, tmp_path) -> None:
    file = save(tmp_path, some_tensors(rng)) / "manifest.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 3'))
    with pytest.raises(CheckpointError, match="format version 3, but this Crosslane reads 1 to 2"):
        open_checkpoint(file.parent)


@pytest.mark.parametrize("meta", [{"x": math.nan}, {"x": object()}])
def test_meta_that_is_no_json_is_refused_and_nothing_is_left(rng, tmp_path, meta) -> None:
    with pytest.raises(CheckpointError, match="meta: not JSON"):
        save(tmp_path, some_tensors(rng), meta=meta)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", ".."])
def test_names_that_leave_the_folder_are_refused(tmp_path, name) -> None:
    with pytest.raises(CheckpointError, match="plain folder name"):
        save(tmp_path, {}, name=name)


def test_two_writers_of_one_folder_are_kept_apart(rng, tmp_path) -> None:
    class Intruder(dict):
        def __getitem__(self, name):
            with pytest.raises(CheckpointError, match="another process is saving"):
                save(tmp_path, some_tensors(rng), step=2)
            return super().__getitem__(name)

    save(tmp_path, Intruder(x=np.ones(3)))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000001"]


def test_the_latest_has_the_most_steps(rng, tmp_path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    tensors = some_tensors(rng)
    for step, name in ((30, None), (200, None), (100, "best")):
        save(tmp_path, tensors, step=step, name=name)
    (tmp_path / "notes").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-000000000200"


def test_pruning_keeps_the_newest_the_named_and_the_protected(rng, tmp_path) -> None:
    tensors = some_tensors(rng)
    paths = {step: save(tmp_path, tensors, step=step) for step in (5, 10, 100, 1000)}
    save(tmp_path, tensors, step=1, name="best")
    removed = prune_checkpoints(tmp_path, 2, protect=[paths[5]])
    assert removed == [paths[10]]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["best", paths[5].name, paths[100].name, paths[1000].name]
    prune_checkpoints(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == paths[1000]


def test_a_name_used_again_is_replaced(rng, tmp_path) -> None:
    save(tmp_path, some_tensors(rng), step=1, name="best")
    tensors = some_tensors(rng, rows=8)
    assert_holds(save(tmp_path, tensors, step=2, name="best"), tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


class Crash(BaseException):
    """As good as a kill: nothing is tidied up."""


def crash_at(monkeypatch, countdown):
    """Raise at the ``countdown``-th step that touches the disk."""
    left = [countdown]

    def guarded(function):
        def call(*arguments, **keywords):
            left[0] -= 1
            if left[0] == 0:
                raise Crash
            return function(*arguments, **keywords)

        return call

    for target, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (module.shutil, "rmtree")):
        monkeypatch.setattr(target, name, guarded(getattr(target, name)))
    return left


@pytest.mark.parametrize("name", [None, "best"])
def test_a_crash_at_any_moment_keeps_a_whole_checkpoint(rng, tmp_path, name) -> None:
    old, new = some_tensors(rng), some_tensors(rng, rows=9)
    finished = False
    for countdown in range(1, 60):
        directory = tmp_path / str(countdown)
        save(directory, old, step=1, name=name)
        with pytest.MonkeyPatch.context() as patch:
            left = crash_at(patch, countdown)
            with contextlib.suppress(Crash):
                save(directory, new, step=2, name=name)
            finished = left[0] > 0
        latest = latest_checkpoint(directory)
        assert_holds(latest, old if open_checkpoint(latest).step == 1 else new)
        # The next save tidies up and is whole again.
        save(directory, new, step=3)
        assert_holds(latest_checkpoint(directory), new)
        assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]
        if finished:
            break
    assert finished
    assert countdown > 10


SAVER = """
import sys
from pathlib import Path
import numpy as np
from embedding.comm import SingleComm
from pipeline.checkpoint import save_checkpoint

for step in range(1, 100_000):
    tensors = {f"table.C{i}": np.full((2_000, 4), step + i, np.float32) for i in range(6)}
    save_checkpoint(Path(sys.argv[1]), step=step, tensors=tensors, meta={}, comm=SingleComm(), name=sys.argv[2] or None)
    print(step, flush=True)
"""


@pytest.mark.parametrize("name", ["", "best"])
def test_kill_9_while_saving_keeps_a_whole_checkpoint(rng, tmp_path, name) -> None:
    for trial in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), name],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout
        assert process.stdout.readline() == "1\n"
        time.sleep(float(rng.uniform(0, 0.1)))
        os.kill(process.pid, signal.SIGKILL)
        announced = [1, *map(int, process.stdout.read().split())]
        process.stdout.close()
        process.wait()
        latest = latest_checkpoint(tmp_path)
        assert latest is not None, trial
        checkpoint = open_checkpoint(latest)
        assert checkpoint.step >= announced[-1]
        for i in range(6):
            assert np.all(checkpoint.read(f"table.C{i}") == checkpoint.step + i)
        prune_checkpoints(tmp_path, 1)


MODEL = {
    "tables": {"user": [50, 16], "item": [300, 16]},
    "num_dense": 13,
    "bottom_mlp": [64, 16],
    "precision": "fp32",
    "optimizer": "adam",
}


def test_the_same_model_is_compatible_after_json() -> None:
    as_read = json.loads(json.dumps(MODEL))
    check_compatible(as_read, {**MODEL, "bottom_mlp": (64, 16)})
    check_compatible(dict(reversed(as_read.items())), MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": {"user": [51, 16], "item": [300, 16]}}, r"model\.tables\.user is \[50, 16\].*\[51, 16\] here"),
        ({"tables": {"user": [50, 16]}}, r"model\.tables\.item is \[300, 16\] in the checkpoint, but absent here"),
        ({"tables": {**MODEL["tables"], "tag": [9, 16]}}, r"model\.tables\.tag is absent in the checkpoint"),
        ({"tables": dict(reversed(MODEL["tables"].items()))}, r"order of model\.tables is user, item.*item, user here"),
        ({"bottom_mlp": [64, 32, 16]}, r"model\.bottom_mlp is \[64, 16\] in the checkpoint, but \[64, 32, 16\] here"),
        ({"precision": "fp64"}, r"model\.precision is 'fp32' in the checkpoint, but 'fp64' here"),
        ({"optimizer": "sgd"}, r"model\.optimizer is 'adam'"),
        ({"num_dense": 0}, r"model\.num_dense is 13"),
    ],
)
def test_another_model_is_refused_by_its_first_difference(change, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_compatible(MODEL, {**MODEL, **change})
