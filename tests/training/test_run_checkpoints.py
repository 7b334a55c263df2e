"""A run's checkpoints: written behind the training, as increments, and always one to go on from."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from dlrm.config import parse_run_config
from dlrm.errors import CheckpointError
from pipeline import checkpoint as checkpoint_module
from pipeline.checkpoint import latest_checkpoint, open_checkpoint
from pipeline.manifest import TableInfo
from pipeline.train import train
from pipeline.writer import DatasetWriter

EVERY = {"epochs": 1, "progress_every": 1, "checkpoint_every": 2}


def run(values):
    return train(parse_run_config(values))


@pytest.fixture
def wide_dataset(tmp_path, rng):
    """640 training rows over a table of 50 rows and one of 6,000, most of which no short run touches."""
    tables = [TableInfo(name="user", rows=50), TableInfo(name="item", rows=6000)]
    folder = tmp_path / "wide"
    with DatasetWriter(folder, name="wide", dense_names=["age"], tables=tables) as writer:
        for split, rows in (("train", 640), ("validation", 64), ("test", 64)):
            keys = np.stack([rng.integers(0, 50, rows), rng.integers(0, 6000, rows)], axis=1)
            dense = rng.normal(size=(rows, 1)).astype(np.float32)
            writer.write(split, (dense[:, 0] > 0).astype(np.int32), dense, keys)
        writer.finish()
    return folder


def state_of(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.names}


def last_state(values):
    return state_of(latest_checkpoint(Path(values["run"]["directory"]) / "checkpoints"))


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert np.isfinite(array).all(), name
        np.testing.assert_array_equal(array, right[name], err_msg=name)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("kind", ["adam", "rowwise_adagrad"])
def test_increments_are_small_and_go_on_bit_for_bit(wide_dataset, run_values, records, kind, asynchronous):
    sections = {"embedding": {"optimizer": {"kind": kind}}, "train": EVERY}
    whole = run_values(wide_dataset, "whole", **sections)
    run(whole)
    assert all(record["base"] is None for record in records(whole["run"]["directory"], "save"))

    how = {"incremental": True, "asynchronous": asynchronous}
    parts = run_values(wide_dataset, "parts", checkpoint=how, **sections)
    for until in (5, 11, None):  # the last checkpoint of each part is one to resume from
        run({**parts, "train": {**EVERY, "max_steps": until}})
    directory = Path(parts["run"]["directory"]) / "checkpoints"
    assert_bit_equal(last_state(parts), last_state(whole))

    saves = records(parts["run"]["directory"], "save")
    assert [(record["step"], record["base"]) for record in saves] == [
        (2, None), *((step, "step-000000000002") for step in (4, 5)),
        *((step, "step-000000000005") for step in (6, 8, 10, 11)),
        *((step, "step-000000000011") for step in (12, 14, 16, 18, 20)),
    ]  # fmt: skip
    full, first = saves[0]["bytes"], saves[1]["bytes"]
    assert 5 * first < full  # 2 x 32 of 6,000 rows, and the dense part
    assert all(record["stall_s"] > 0 and record["write_s"] > 0 for record in saves)
    assert full == sum(file.stat().st_size for file in (directory / "step-000000000002").rglob("*.npy"))
    # The two newest, and what they are based on.
    assert sorted(path.name for path in directory.iterdir()) == [
        f"step-{step:012d}" for step in (2, 5, 11, 18, 20)
    ]  # fmt: skip


def test_an_increment_of_most_rows_is_written_in_full(tiny_dataset, run_values, records):
    """Ten batches of 32 touch all of 50 and 20 rows and about two in three of 300."""
    train_twenty = {"max_steps": 20, "epochs": None, "checkpoint_every": 10}
    values = run_values(tiny_dataset(), train=train_twenty, checkpoint={"incremental": True})
    run(values)
    assert [record["base"] for record in records(values["run"]["directory"], "save")] == [None, None]


def test_best_weights_are_kept_as_an_increment_and_can_be_replaced(wide_dataset, run_values, records):
    rules = {"eval_every": 2, "checkpoint_every": 3, "early_stop": {"metric": "log_loss", "patience": 3}}
    values = run_values(
        wide_dataset, train={"epochs": 1, **rules}, checkpoint={"incremental": True}, optimizer={"lr": 0.01}
    )
    result = run(values)
    named = [record for record in records(values["run"]["directory"], "save") if record["path"].endswith("best")]
    assert len(named) >= 2
    assert named[0]["base"] is None  # nothing was there to be based on
    assert named[-1]["base"] == "step-000000000003"
    assert result.checkpoint.name == "best"
    assert result.report["log_loss"] < 1
    run(values)  # nothing is left to train; the report is the same
    assert open_checkpoint(result.checkpoint).step == named[-1]["step"]


def test_a_copy_beyond_the_limit_is_not_made(wide_dataset, run_values, records, monkeypatch):
    """1 MiB is less than 6,000 rows of 64 numbers with Adam's state, so that training waits for the disk."""
    written, original = [], checkpoint_module.write_tensor

    def write(path, array):
        written.append(threading.current_thread() is threading.main_thread())
        return original(path, array)

    monkeypatch.setattr("pipeline.checkpoint.write_tensor", write)
    model = {"embedding_dim": 64, "bottom_mlp": [64], "top_mlp": [1]}
    train_two = {"max_steps": 2, "progress_every": 1}
    for limit, at_once in ((1, True), (100, False)):
        values = run_values(
            wide_dataset, f"limit-{limit}", model=model, train=train_two, checkpoint={"memory_limit_mib": limit}
        )
        run(values)
        assert written
        assert all(main == at_once for main in written)
        written.clear()


def test_a_disk_that_fills_up_ends_the_run_with_one_sentence(wide_dataset, run_values, monkeypatch):
    original = checkpoint_module.write_tensor

    def full_disk(path, array):
        if "step-000000000004" in str(path) and path.name.startswith("table.item"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, array)

    monkeypatch.setattr("pipeline.checkpoint.write_tensor", full_disk)
    values = run_values(wide_dataset, train=EVERY)
    with pytest.raises(CheckpointError, match=r"step-000000000004: .*table\.item.*No space left on device"):
        run(values)
    assert open_checkpoint(latest_checkpoint(Path(values["run"]["directory"]) / "checkpoints")).step == 2
    monkeypatch.undo()
    whole = run_values(wide_dataset, "whole", train=EVERY)
    for config in (values, whole):
        run(config)
    assert_bit_equal(last_state(values), last_state(whole))


@pytest.mark.ranks
def test_kill_9_at_any_moment_leaves_a_run_to_go_on_with(wide_dataset, run_values, run_engine, start_engine, rng):
    steps = {"epochs": 4, "progress_every": 1, "checkpoint_every": 1}
    same = {
        "deterministic": True
    }  # two runs of their own: measured times might give them two plans, two orders of sums
    whole = run_values(wide_dataset, "whole", train={**steps, "checkpoint_every": 0}, **same)
    code, errors = run_engine(whole, ranks=2)
    assert code == 0, errors
    killed = run_values(wide_dataset, "killed", train=steps, checkpoint={"incremental": True}, **same)
    directory = Path(killed["run"]["directory"]) / "checkpoints"
    reached = 0
    for _ in range(2):
        process = start_engine(killed, ranks=2)
        until = time.monotonic() + 120
        while process.poll() is None and latest_step(directory) <= reached:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()
        time.sleep(float(rng.uniform(0, 0.3)))
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.communicate()
        psutil.wait_procs(everyone[1:], timeout=30)
        assert latest_step(directory) > reached
        reached = latest_step(directory)
        state_of(latest_checkpoint(directory))  # every byte is there
    code, errors = run_engine(killed, ranks=2)
    assert code == 0, errors
    assert_bit_equal(last_state(killed), last_state(whole))


def latest_step(directory):
    """By the names alone: a run that goes on may delete what is opened here."""
    return max((int(path.name.removeprefix("step-")) for path in directory.glob("step-*")), default=0)
