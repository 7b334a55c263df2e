"""Increments hold the rows touched since a base, and base and increments together are exact."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.errors import CheckpointError
from embedding.comm import SingleComm
from pipeline import checkpoint_folder, tensor_file
from pipeline.checkpoint import Piece, latest_checkpoint, open_checkpoint, prune_checkpoints, save_checkpoint
from pipeline.weights import export_weights

on_ranks = runpy.run_path(str(Path(__file__).with_name("thread_ranks.py")))["run_ranks"]
ROOT = Path(__file__).parents[2]


def save(directory, tensors, step, **options):
    return save_checkpoint(directory, step=step, tensors=tensors, meta={}, comm=SingleComm(), **options)


def as_touched(mask, form):
    if form == "mask":
        return mask
    if form == "bits":
        return np.packbits(mask, bitorder="little")
    rows = np.flatnonzero(mask)
    return np.concatenate([rows[::-1], rows[:1]]).astype(form)  # any order, and one of them twice


def step_on(rng, tensors, share):
    """Change some rows of every table, in weight and state alike; says which."""
    rows = len(tensors["table.a"])
    mask = rng.random(rows) < share
    for array in tensors.values():
        array[mask] += rng.random(array[mask].shape).astype(array.dtype)
    return mask


def row_wise(array, rank, ranks, threshold):
    """The replicated rows (rank 0 saves them) and this rank's of the others."""
    part = range(min(threshold + rank, len(array)), len(array), ranks)
    own = Piece(array[threshold + rank :: ranks], array.shape, part)
    return [Piece(array[:threshold], array.shape, range(threshold)), own] if rank == 0 else [own]


def row_wise_touched(mask, rank, ranks, threshold, form):
    own = as_touched(mask[threshold + rank :: ranks], form)
    return [as_touched(mask[:threshold], form), own] if rank == 0 else [own]


@settings(deadline=None, max_examples=30)
@given(
    data=st.data(),
    rows=st.integers(1, 60),
    form=st.sampled_from(["mask", "bits", "int32", "int64"]),
    chained=st.booleans(),
)
def test_base_and_increments_are_exact_whatever_the_plans(tmp_path_factory, data, rows, form, chained) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    directory = tmp_path_factory.mktemp("c")
    tensors = {"table.a": rng.random((rows, 16)), "table.a.v": rng.random((rows, 16)), "table.a.n": rng.random(rows)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "PIECE_BYTES", data.draw(st.sampled_from([1, 500, 1 << 20])))
        base, mask = save(directory, tensors, 1), np.zeros(rows, bool)
        for step in (2, 3, 4):
            mask = (np.zeros(rows, bool) if chained else mask) | step_on(rng, tensors, data.draw(st.floats(0, 1)))
            ranks, threshold = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(0, rows))
            paths = on_ranks(
                ranks,
                lambda comm, ranks=ranks, threshold=threshold, step=step, base=base, mask=mask: save_checkpoint(
                    directory,
                    step=step,
                    tensors={name: row_wise(array, comm.rank, ranks, threshold) for name, array in tensors.items()},
                    meta={},
                    comm=comm,
                    base=base,
                    touched={name: row_wise_touched(mask, comm.rank, ranks, threshold, form) for name in tensors},
                ),
            )
            assert isinstance(paths[0], Path), paths
            checkpoint = open_checkpoint(latest_checkpoint(directory))
            assert checkpoint.step == step
            for name, array in tensors.items():
                np.testing.assert_array_equal(checkpoint.read(name), array)
                part = range(step % rows, rows, 3)
                found = checkpoint.read(name, rows=part, columns=range(3, 16, 4) if array.ndim == 2 else None)
                np.testing.assert_array_equal(found, array[part.start :: 3, 3::4] if array.ndim == 2 else array[part])
            base = paths[0] if chained else base


def bytes_of(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_an_increment_takes_the_bytes_of_what_was_touched(rng, tmp_path) -> None:
    rows, dim = 20_000, 16
    tensors = {"table.a": rng.random((rows, dim), np.float32), "table.a.v": rng.random((rows, dim), np.float32)}
    base = save(tmp_path, tensors, 1)
    mask = step_on(rng, tensors, 0.1)
    small = save(tmp_path, tensors, 2, base=base, touched=dict.fromkeys(tensors, mask))
    touched = int(mask.sum())
    # Both tensors share the row numbers, 4 bytes each; what else there is are headers and the manifest.
    assert touched * (2 * dim * 4 + 4) <= bytes_of(small) <= touched * (2 * dim * 4 + 4) + 3_000
    # Where nearly all were touched, their numbers would cost more than the rows that stay away.
    full = save(tmp_path, tensors, 3, base=base, touched=dict.fromkeys(tensors, np.arange(rows) > 10))
    assert open_checkpoint(full).base is None
    assert bytes_of(full) <= bytes_of(base) + 3_000
    shutil.rmtree(base)
    np.testing.assert_array_equal(open_checkpoint(full).read("table.a"), tensors["table.a"])


def test_a_power_law_twentieth_of_an_epoch_is_several_times_smaller(rng, tmp_path) -> None:
    rows = 200_000
    tensors = {"table.a": rng.random((rows, 8), np.float32), "table.a.accumulator": rng.random((rows, 8), np.float32)}
    base = save(tmp_path, tensors, 1)
    # Of an epoch of ten look-ups per row: exponent 1.1, as in Criteo's tables.
    weights = np.arange(1, rows + 1) ** -1.1
    keys = np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(rows * 10 // 20))
    small = save(tmp_path, tensors, 2, base=base, touched=dict.fromkeys(tensors, np.unique(np.minimum(keys, rows - 1))))
    assert bytes_of(base) >= 2.5 * bytes_of(small)


def test_touched_rows_need_memory_for_a_few_blocks_only(tmp_path) -> None:
    table = np.ones((96 << 12, 64), np.float32)
    base = save(tmp_path, {"x": table}, 1)
    table[::2] += np.arange(64, dtype=np.float32)
    mask = np.arange(len(table)) % 2 == 0
    tracemalloc.start()
    path = save(tmp_path, {"x": table}, 2, base=base, touched={"x": mask})
    saved = tracemalloc.get_traced_memory()[1]
    out = np.empty_like(table)
    tracemalloc.reset_peak()
    start = tracemalloc.get_traced_memory()[0]
    open_checkpoint(path).read("x", out)
    loaded = tracemalloc.get_traced_memory()[1] - start
    tracemalloc.stop()
    assert saved < 64 << 20
    assert loaded < 64 << 20
    np.testing.assert_array_equal(out, table)


@pytest.mark.parametrize(
    ("touched", "message"),
    [
        (np.ones(9, bool), r"bool \[9\] does not fit 10 rows"),
        (np.ones(1, np.uint8), r"uint8 \[1\] does not fit 10 rows"),
        (np.array([3, 10]), "10 is not among its 10 rows"),
        (np.array([-1, 3]), "-1 is not among its 10 rows"),
        (np.ones((10, 1), bool), "does not fit"),
        (np.ones(10), "are float64; use bool"),
    ],
)
def test_touched_rows_that_do_not_fit_are_refused(rng, tmp_path, touched, message) -> None:
    tensors = {"x": rng.random((10, 4))}
    base = save(tmp_path, tensors, 1)
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, tensors, 2, base=base, touched={"x": touched})
    assert [path.name for path in tmp_path.iterdir()] == [base.name]


def test_a_base_must_be_a_checkpoint_of_the_same_tensors_in_the_same_folder(rng, tmp_path) -> None:
    tensors, mask = {"x": rng.random((10, 4))}, np.arange(10) < 3
    with pytest.raises(CheckpointError, match="name its base"):
        save(tmp_path, tensors, 2, touched={"x": mask})
    elsewhere = save(tmp_path / "elsewhere", tensors, 1)
    with pytest.raises(CheckpointError, match="must be another checkpoint in the same folder"):
        save(tmp_path / "here", tensors, 2, base=elsewhere, touched={"x": mask})
    base = save(tmp_path / "here", tensors, 1)
    with pytest.raises(CheckpointError, match="must be another checkpoint"):
        save(tmp_path / "here", tensors, 1, base=base, touched={"x": mask})
    for other, message in (({"x": rng.random((10, 5))}, r"x is <f8 \[10, 5\], but <f8 \[10, 4\] in its base"),):
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / "here", other, 2, base=base, touched={"x": mask})
    with pytest.raises(CheckpointError, match="has no tensor 'y'"):
        save(tmp_path / "here", {"y": rng.random((10, 4))}, 2, base=base, touched={"y": mask})
    with pytest.raises(CheckpointError, match="this rank writes no such tensor"):
        save(tmp_path / "here", tensors, 2, base=base, touched={"y": mask})
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        save(tmp_path / "here", tensors, 2, base=base.with_name("nothing"), touched={"x": mask})
    assert [path.name for path in (tmp_path / "here").iterdir()] == [base.name]


def increments(rng, directory, steps=(10, 20, 30, 40)):
    """A full one and increments, each over the one before."""
    tensors = {"table.a": rng.random((50, 4)), "table.a.n": rng.random(50)}
    base, states = None, {}
    for step in steps:
        touched = dict.fromkeys(tensors, step_on(rng, tensors, 0.2)) if base else None
        base = save(directory, tensors, step, base=base, touched=touched)
        states[step] = {name: array.copy() for name, array in tensors.items()}
    return states


def assert_holds(path, tensors):
    checkpoint = open_checkpoint(path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_pruning_never_removes_a_base_that_is_needed(rng, tmp_path) -> None:
    states = increments(rng, tmp_path)
    assert prune_checkpoints(tmp_path, 1) == []
    latest = latest_checkpoint(tmp_path)
    assert_holds(latest, states[40])
    full = save(tmp_path, states[40], 50)
    assert prune_checkpoints(tmp_path, 2) == []
    removed = prune_checkpoints(tmp_path, 1)
    # Those that need another go first, so that a crash in between leaves none that cannot be read.
    assert [int(path.name[5:]) for path in removed] == [40, 30, 20, 10]
    assert [path.name for path in tmp_path.iterdir()] == [full.name]


def test_a_named_increment_keeps_its_base(rng, tmp_path) -> None:
    tensors = {"x": rng.random((50, 4))}
    base = save(tmp_path, tensors, 1)
    best = save(tmp_path, tensors, 2, name="best", base=base, touched={"x": np.array([], np.int64)})
    save(tmp_path, tensors, 3)
    assert prune_checkpoints(tmp_path, 1) == []
    assert_holds(best, tensors)
    with pytest.raises(CheckpointError, match="is the base of best and cannot be replaced"):
        save(tmp_path, tensors, 1)
    save(tmp_path, tensors, 4, name="best")
    assert prune_checkpoints(tmp_path, 1) == [base]


def test_a_base_that_is_gone_or_another_is_noticed_at_opening(rng, tmp_path) -> None:
    states = increments(rng, tmp_path, (10, 20))
    base, path = tmp_path / "step-000000000010", tmp_path / "step-000000000020"
    aside = base.with_name(checkpoint_folder.ASIDE + base.name)
    base.rename(aside)
    assert_holds(path, states[20])  # a crash had moved it
    shutil.rmtree(aside)
    with pytest.raises(CheckpointError, match=rf"increment of {base.name}, which cannot be opened beside it"):
        open_checkpoint(path)
    save(tmp_path / "other", states[10], 10).rename(base)
    with pytest.raises(CheckpointError, match=f"increment of another {base.name} than lies beside it"):
        open_checkpoint(path)


def test_a_flipped_bit_of_an_increment_or_its_base_is_found(rng, tmp_path) -> None:
    states = increments(rng, tmp_path, (10, 20, 30))
    path = latest_checkpoint(tmp_path)
    files = [file for file in sorted(tmp_path.rglob("*.npy")) if "table.a.n.npy" not in file.name]
    assert len(files) == 1 + 2 * 2
    for file in files:
        content = file.read_bytes()
        for position in (3, int(rng.integers(len(content))), len(content) - 1):
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"tensor table\.a (\(row numbers\) )?is damaged"):
                open_checkpoint(path).read("table.a")
        file.write_bytes(content)
    assert_holds(path, states[30])


def test_an_export_of_an_increment_stands_alone(rng, tmp_path) -> None:
    states = increments(rng, tmp_path / "c", (1, 2, 3))
    path = latest_checkpoint(tmp_path / "c")
    with np.load(export_weights(path, tmp_path / "w.npz")) as found:
        np.testing.assert_array_equal(found["table.a"], states[3]["table.a"])


def test_the_manifest_names_base_rows_and_count(rng, tmp_path) -> None:
    increments(rng, tmp_path, (1, 2))
    manifest = json.loads((latest_checkpoint(tmp_path) / "manifest.json").read_text())
    first = json.loads((tmp_path / "step-000000000001" / "manifest.json").read_text())
    assert manifest["base"] == {"name": "step-000000000001", "checksum": first["checksum"]}
    (piece,) = manifest["tensors"]["table.a"]["pieces"]
    folder = latest_checkpoint(tmp_path)
    assert np.load(folder / piece["file"]).shape == (piece["count"], 4)
    assert np.load(folder / piece["numbers"]["file"]).shape == (piece["count"],)
    assert manifest["tensors"]["table.a.n"]["pieces"][0]["numbers"] == piece["numbers"]


class Crash(BaseException):
    """As good as a kill: nothing is tidied up."""


def test_a_crash_at_any_moment_of_increments_and_pruning_leaves_one_to_resume_from(rng, tmp_path) -> None:
    finished = False
    for countdown in range(1, 80):
        directory = tmp_path / str(countdown)
        states = increments(rng, directory, (10, 20))
        tensors = {name: array.copy() for name, array in states[20].items()}
        mask = step_on(rng, tensors, 0.3)
        states[30] = {name: array.copy() for name, array in tensors.items()}
        states[40] = states[30]
        left = [countdown]
        with pytest.MonkeyPatch.context() as patch:
            for target, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree")):
                patch.setattr(target, name, guarded(getattr(target, name), left))
            with contextlib.suppress(Crash):
                save(directory, tensors, 30, base=directory / "step-000000000020", touched=dict.fromkeys(tensors, mask))
                save(directory, tensors, 40)
                prune_checkpoints(directory, 1)
            finished = left[0] > 0
        latest = latest_checkpoint(directory)
        step = open_checkpoint(latest).step
        assert step >= 20
        assert_holds(latest, states[step])
        for path in directory.glob("step-*"):  # nor is any other broken
            assert_holds(path, states[open_checkpoint(path).step])
        if finished:
            break
    assert finished
    assert countdown > 20


def guarded(function, left):
    def call(*arguments, **keywords):
        left[0] -= 1
        if left[0] == 0:
            raise Crash
        return function(*arguments, **keywords)

    return call


SAVER = """
import sys
from pathlib import Path
import numpy as np
from embedding.comm import SingleComm
from pipeline.checkpoint import prune_checkpoints, save_checkpoint

directory, base = Path(sys.argv[1]), None
tables = {f"table.C{i}": np.zeros((2_000, 4), np.float32) for i in range(3)}
for step in range(1, 100_000):
    touched = {}
    for name, table in tables.items():
        table[step % 7 :: 7] = step
        touched[name] = np.arange(step % 7, len(table), 7)
    full = step % 5 == 1
    path = save_checkpoint(directory, step=step, tensors=tables, meta={}, comm=SingleComm(),
                           base=None if full else base, touched=None if full else touched)
    base = path
    prune_checkpoints(directory, 1)
    print(step, flush=True)
"""


def test_kill_9_while_saving_increments_keeps_a_whole_state(rng, tmp_path) -> None:
    for trial in range(3):
        directory = tmp_path / str(trial)
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(directory)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout
        assert process.stdout.readline() == "1\n"
        time.sleep(float(rng.uniform(0, 0.3)))
        os.kill(process.pid, signal.SIGKILL)
        announced = [1, *map(int, process.stdout.read().split())]
        process.stdout.close()
        process.wait()
        checkpoint = open_checkpoint(latest_checkpoint(directory))
        assert checkpoint.step >= announced[-1]
        expected = np.zeros((2_000, 4), np.float32)
        for step in range(1, checkpoint.step + 1):
            expected[step % 7 :: 7] = step
        for i in range(3):
            np.testing.assert_array_equal(checkpoint.read(f"table.C{i}"), expected)
