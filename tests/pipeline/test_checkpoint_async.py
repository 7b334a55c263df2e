"""Saving behind the training: the state of the moment, no collective call in the thread, errors on every rank."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dlrm.errors import CheckpointError
from embedding.comm import SingleComm
from pipeline import checkpoint as module
from pipeline import checkpoint_async
from pipeline.checkpoint import Piece, latest_checkpoint, open_checkpoint, save_checkpoint
from pipeline.checkpoint_async import AsyncSaver

on_ranks = runpy.run_path(str(Path(__file__).with_name("thread_ranks.py")))["run_ranks"]
ROOT = Path(__file__).parents[2]


class OneThread:
    """A communicator that only the thread which made it may use."""

    def __init__(self, comm) -> None:
        self._comm, self._thread = comm, threading.get_ident()

    def __getattr__(self, name):
        if name not in {"rank", "size"}:
            assert threading.get_ident() == self._thread, f"{name} called behind the training"
        return getattr(self._comm, name)


def held_back(monkeypatch, ranks=(0,)):
    """Let no file of ``ranks`` be written before the event that is returned is set."""
    gate, original = threading.Event(), module.write_tensor

    def write(path, array):
        if any(f"rank-{rank:04d}" in str(path) for rank in ranks):
            assert gate.wait(30)
        return original(path, array)

    monkeypatch.setattr(module, "write_tensor", write)
    return gate


def part_of(array, comm):
    return Piece(array[comm.rank :: comm.size], array.shape, range(comm.rank, len(array), comm.size))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_is_saved_is_the_state_of_the_moment(rng, tmp_path, monkeypatch, size) -> None:
    gate = held_back(monkeypatch, range(size))
    shared = rng.random((40, 4))
    before = shared.copy()
    met = threading.Barrier(size)

    def work(comm):
        with AsyncSaver(tmp_path, OneThread(comm)) as saver:
            path = saver.save(step=5, tensors={"x": part_of(shared, comm)}, meta={"a": [1]})
            met.wait(30)
            shared[comm.rank :: comm.size] = np.nan  # the training goes on
            assert not path.exists()
            assert saver.saving == path
            met.wait(30)
            gate.set()
            assert saver.wait() == path
            assert saver.saving is None
            assert saver.wait() is None
            return path

    for path in on_ranks(size, work):
        assert isinstance(path, Path), path
        checkpoint = open_checkpoint(path)
        assert (checkpoint.step, checkpoint.meta, checkpoint.ranks) == (5, {"a": [1]}, size)
        np.testing.assert_array_equal(checkpoint.read("x"), before)
        names = {"manifest.json", *(f"rank-{rank:04d}" for rank in range(size))}
        assert {entry.name for entry in path.iterdir()} == names


@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_appears_without_any_further_call(rng, tmp_path, size) -> None:
    array = rng.random((9, 2))

    def work(comm):
        saver = AsyncSaver(tmp_path, comm)
        path = saver.save(step=1, tensors={"x": part_of(array, comm)}, meta={})
        until = time.monotonic() + 20
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        appeared = path.exists()
        saver.wait()
        return appeared

    assert on_ranks(size, work) == [True] * size


@pytest.mark.parametrize("size", [1, 2])
def test_increments_behind_the_training_are_exact(rng, tmp_path, size) -> None:
    table, state = rng.random((60, 16)), rng.random(60)
    states = {}
    met = threading.Barrier(size)

    def work(comm):
        own = slice(comm.rank, None, comm.size)
        tensors = {"t": part_of(table, comm), "t.n": part_of(state, comm)}
        with AsyncSaver(tmp_path, OneThread(comm), keep=1) as saver:
            base = saver.save(step=1, tensors=tensors, meta={})
            for step in (2, 3):
                local = np.random.default_rng(step * 10 + comm.rank)
                # The last time rank 0 has touched none of its rows.
                mask = local.random(len(table[own])) < (0.2 if step == 2 or comm.rank else 0.0)
                table[own][mask] += 1.5
                state[own][mask] += step
                met.wait(30)
                states[step] = (table.copy(), state.copy())
                met.wait(30)
                touched = {"t": mask, "t.n": mask}
                base = saver.save(step=step, tensors=tensors, meta={}, base=base, touched=touched)
                mask[:] = ~mask
                met.wait(30)
        return base

    assert len(set(on_ranks(size, work))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:012d}" for step in (1, 2, 3)]
    for step, (weights, numbers) in states.items():
        checkpoint = open_checkpoint(tmp_path / f"step-{step:012d}")
        np.testing.assert_array_equal(checkpoint.read("t"), weights)
        np.testing.assert_array_equal(checkpoint.read("t.n"), numbers)


def failing(monkeypatch, rank, error, times=1):
    original, left = module.write_tensor, [times]

    def write(path, array):
        if f"rank-{rank:04d}" in str(path) and left[0]:
            left[0] -= 1
            raise error
        return original(path, array)

    monkeypatch.setattr(module, "write_tensor", write)


@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_an_error_surfaces_on_every_rank_at_the_next_save(rng, tmp_path, monkeypatch, failed, error) -> None:
    array = rng.random((9, 2))
    before = save_checkpoint(tmp_path, step=1, tensors={"x": array}, meta={}, comm=SingleComm())
    failing(monkeypatch, failed, error)

    def work(comm):
        saver = AsyncSaver(tmp_path, OneThread(comm))
        tensors = {"x": part_of(array, comm)}
        saver.save(step=2, tensors=tensors, meta={})
        with pytest.raises(CheckpointError) as caught:
            saver.save(step=3, tensors=tensors, meta={})
        comm.barrier()
        left = sorted(path.name for path in tmp_path.iterdir())
        comm.barrier()
        saver.save(step=4, tensors=tensors, meta={})  # a disk that has room again
        saver.wait()
        return str(caught.value), left

    for message, left in on_ranks(2, work):
        assert str(error.args[-1]) in message
        assert ("rank 1" in message) == (failed == 1)
        assert left == [before.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == [before.name, "step-000000000004"]


def test_an_error_of_the_last_save_surfaces_at_the_end(rng, tmp_path, monkeypatch) -> None:
    failing(monkeypatch, 0, OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError, match="No space left"), AsyncSaver(tmp_path, SingleComm()) as saver:
        saver.save(step=2, tensors={"x": rng.random(5)}, meta={})
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_naming_surfaces_on_every_rank(rng, tmp_path) -> None:
    def work(comm):
        saver = AsyncSaver(tmp_path, comm)
        saver.save(step=2, tensors={"x": rng.random(5)}, meta={})  # both ranks claim it
        saver.wait()

    for error in on_ranks(2, work):
        assert isinstance(error, CheckpointError)
        assert "one rank must own it" in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("problem", ["meta", "touched", "name"])
def test_what_cannot_begin_is_refused_at_once_on_every_rank(rng, tmp_path, problem) -> None:
    def work(comm):
        bad = comm.rank == 1
        saver = AsyncSaver(tmp_path, comm)
        saver.save(
            step=2,
            tensors={f"x{comm.rank}": rng.random(5)},
            meta={"x": np.nan} if bad and problem == "meta" else {},
            touched={f"x{comm.rank}": np.ones(3, bool)} if bad and problem == "touched" else None,
            name="../x" if problem == "name" else None,
        )

    for error in on_ranks(2, work):
        assert isinstance(error, CheckpointError), error
    assert list(tmp_path.iterdir()) == []


def test_a_save_waits_for_the_one_before(rng, tmp_path, monkeypatch) -> None:
    gate = held_back(monkeypatch)
    saver = AsyncSaver(tmp_path, SingleComm())
    first = saver.save(step=1, tensors={"x": rng.random(5)}, meta={})
    with pytest.raises(CheckpointError, match="another process is saving"):  # nobody else may interfere
        save_checkpoint(tmp_path, step=9, tensors={"x": rng.random(5)}, meta={}, comm=SingleComm())
    threading.Timer(0.2, gate.set).start()
    saver.save(step=2, tensors={"x": rng.random(5)}, meta={})
    assert first.exists()
    assert saver.snapshot_seconds >= 0.15
    saver.wait()
    assert latest_checkpoint(tmp_path).name == "step-000000000002"


def test_a_copy_beyond_the_limit_is_not_made(rng, tmp_path, monkeypatch) -> None:
    def work(comm):
        saver = AsyncSaver(tmp_path, comm, memory_limit_bytes=1_000, keep=1)
        for step, rows in ((1, 10), (2, 200)):
            array = np.full((rows, 2), step, np.float32)
            path = saver.save(step=step, tensors={"x": array} if comm.rank == 1 else {}, meta={})
        return saver.saving is None and path.exists()

    assert on_ranks(2, work) == [True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000002"]


def test_a_copy_that_finds_no_memory_is_an_error_of_every_rank(rng, tmp_path, monkeypatch) -> None:
    def no_memory(part, settled, room):
        if part.name == "x1":
            raise MemoryError
        return part

    monkeypatch.setattr(checkpoint_async, "snapshot", no_memory)
    saved = on_ranks(
        2, lambda comm: AsyncSaver(tmp_path, comm).save(step=1, tensors={f"x{comm.rank}": np.ones(9)}, meta={})
    )
    for error in saved:
        assert isinstance(error, CheckpointError)
        assert "no memory for a copy" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_one_copy_that_every_save_uses(tmp_path) -> None:
    tensors = {f"x{i}": np.ones((32 << 8, 1 << 8), np.float32) for i in range(8)}
    strided = {name: array[:, ::2] for name, array in tensors.items()}
    size = sum(array.nbytes for array in strided.values())
    tracemalloc.start()
    with AsyncSaver(tmp_path, SingleComm()) as saver:
        for step in (1, 2):
            saver.save(step=step, tensors=strided, meta={})
        saver.wait()
    del saver
    peak = tracemalloc.get_traced_memory()[1]
    # Only what its own files keep: threads that other tests leave allocate too.
    own = [tracemalloc.Filter(True, f"*/pipeline/{name}") for name in ("checkpoint*", "copy_room.py", "tensor_file.py")]
    kept = tracemalloc.take_snapshot().filter_traces(own)
    tracemalloc.stop()
    assert size <= peak < size + (24 << 20)
    assert sum(trace.size for trace in kept.traces) < 1 << 20


def test_a_rank_that_is_gone_does_not_hold_up_the_others(rng, tmp_path, monkeypatch) -> None:
    gate = held_back(monkeypatch, (1,))

    def work(comm):
        saver = AsyncSaver(tmp_path, comm)
        saver.save(step=1, tensors={"x": part_of(rng.random((9, 2)), comm)}, meta={})
        if comm.rank == 1:  # its thread never ends its file
            return None
        started = time.monotonic()
        saver.close(patience_s=0.2)
        return time.monotonic() - started

    assert on_ranks(2, work)[0] < 10
    left = list(tmp_path.iterdir())
    gate.set()
    assert left == []
    assert latest_checkpoint(tmp_path) is None


def test_training_that_fails_still_keeps_what_was_under_way(rng, tmp_path) -> None:
    array = rng.random((9, 2))

    def work(comm):
        with AsyncSaver(tmp_path, OneThread(comm)) as saver:
            saver.save(step=1, tensors={"x": part_of(array, comm)}, meta={})
            raise ArithmeticError

    assert [type(error) for error in on_ranks(2, work)] == [ArithmeticError] * 2
    np.testing.assert_array_equal(open_checkpoint(latest_checkpoint(tmp_path)).read("x"), array)


SAVER = """
import sys
from pathlib import Path
import numpy as np
from embedding.comm import SingleComm
from pipeline.checkpoint_async import AsyncSaver

saver = AsyncSaver(Path(sys.argv[1]), SingleComm(), keep=1)
table = np.zeros((30_000, 4), np.float32)
for step in range(1, 100_000):
    table += 1
    saver.save(step=step, tensors={"table.C1": table, "table.C2": table}, meta={})
    print(step, flush=True)
"""


def test_kill_9_behind_the_training_keeps_the_previous_one(rng, tmp_path) -> None:
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
        assert process.stdout.readline() == "2\n"
        time.sleep(float(rng.uniform(0, 0.2)))
        os.kill(process.pid, signal.SIGKILL)
        begun = [2, *map(int, process.stdout.read().split())]
        process.stdout.close()
        process.wait()
        checkpoint = open_checkpoint(latest_checkpoint(directory))
        assert checkpoint.step >= begun[-1] - 1
        for name in ("table.C1", "table.C2"):
            assert (checkpoint.read(name) == checkpoint.step).all()
