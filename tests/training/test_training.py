"""Training runs: repeatable and resumable to the bit, the same on any number of ranks, stopped by their rules."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from dlrm.config import parse_run_config
from dlrm.errors import CheckpointError, ConfigError, CrosslaneError
from pipeline.checkpoint import open_checkpoint
from pipeline.resumption import check_resumable
from pipeline.train import train


def tensors_of(directory):
    checkpoint = open_checkpoint(max((Path(directory) / "checkpoints").glob("step-*")))
    return {name: checkpoint.read(name) for name in checkpoint.names}


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert np.isfinite(values).all(), name
        np.testing.assert_array_equal(values, right[name], err_msg=name)


def run(values):
    return train(parse_run_config(values))


@pytest.mark.parametrize("kind", ["adam", "momentum", "ftrl"])
def test_repeated_runs_are_equal_to_the_bit(tiny_dataset, run_values, kind):
    data = tiny_dataset()
    for directory in ("one", "two"):
        run(run_values(data, directory, optimizer={"kind": kind}))
    root = Path(run_values(data)["run"]["directory"]).parent
    assert_bit_equal(tensors_of(root / "one"), tensors_of(root / "two"))


def test_a_checkpoint_from_before_a_field_of_data_goes_on_under_its_default(tiny_dataset, run_values):
    values = run_values(tiny_dataset(), train={"epochs": 2, "max_steps": 8})
    checkpoint = open_checkpoint(run(values).checkpoint)
    del checkpoint.meta["config"]["data"]["shuffle_block"]
    check_resumable(checkpoint, parse_run_config(values))
    other = parse_run_config({**values, "data": {**values["data"], "shuffle_block": 4}})
    with pytest.raises(CheckpointError, match=r"was trained with data\.shuffle_block = 1, not 4"):
        check_resumable(checkpoint, other)


def test_training_learns_and_writes_what_it_promises(tiny_dataset, run_values, records):
    values = run_values(tiny_dataset(train=4000, test=2000), train={"epochs": 3, "progress_every": 10})
    result = run(values)
    directory = Path(values["run"]["directory"])
    assert result.reason == "finished"
    assert result.step == 3 * 125
    assert result.report["auc"] > 0.75
    for name in ("progress.jsonl", "checkpoints", "report.json", "report.html"):
        assert (directory / name).exists()
    steps = records(directory, "step")
    assert [record["step"] for record in steps] == [*range(10, 375, 10), 375]
    assert steps[-1]["samples"] == 12_000
    assert set(steps[0]["stages_ms"]) >= {"lookup", "top_forward", "sparse_update"}
    assert records(directory)[0]["type"] == "start"
    assert records(directory)[-1]["type"] == "end"


@pytest.mark.parametrize("optimizer", [{"kind": "adam"}, {"kind": "adagrad"}])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tiny_dataset, run_values, records, optimizer):
    data = tiny_dataset()
    schedule = {"learning_rate": {"warmup_steps": 5, "decay_start": 9, "decay_steps": 12}}
    run(run_values(data, "whole", optimizer=optimizer, **schedule))
    part = run_values(data, "parts", optimizer=optimizer, **schedule)
    run({**part, "train": {"epochs": 2, "progress_every": 1, "max_steps": 8}})
    run(part)
    root = Path(part["run"]["directory"]).parent
    assert_bit_equal(tensors_of(root / "whole"), tensors_of(root / "parts"))
    whole, parts = (
        {record["step"]: record["loss"] for record in records(root / name, "step")} for name in ("whole", "parts")
    )
    assert whole == parts


def test_a_finished_run_started_again_trains_no_step_and_reports_the_same(tiny_dataset, run_values, records):
    values = run_values(tiny_dataset())
    first = run(values)
    steps = len(records(values["run"]["directory"], "step"))
    again = run(values)
    assert again.report["auc"] == first.report["auc"]
    assert len(records(values["run"]["directory"], "step")) == steps


def test_early_stopping_keeps_the_best_weights(tiny_dataset, run_values, records):
    values = run_values(
        tiny_dataset(train=600),
        optimizer={"kind": "adam", "lr": 0.05},
        train={"epochs": 40, "eval_every": 10, "early_stop": {"metric": "auc", "patience": 3}},
    )
    result = run(values)
    evaluations = [item for item in records(values["run"]["directory"], "eval") if item["split"] == "validation"]
    best = max(evaluations, key=lambda item: item["metrics"]["auc"])
    assert result.reason == "early_stop"
    assert len(evaluations) >= 4
    assert result.checkpoint.name == "best"
    assert open_checkpoint(result.checkpoint).step == best["step"]
    assert result.step == best["step"] + 30


def test_training_ends_at_the_target(tiny_dataset, run_values):
    values = run_values(
        tiny_dataset(train=4000), train={"epochs": 9, "eval_every": 20, "target": {"metric": "auc", "value": 0.7}}
    )
    result = run(values)
    assert result.reason == "target"
    assert result.step < 9 * 125


@pytest.mark.parametrize(
    ("rule", "first", "then"),
    [
        ("target", {"metric": "auc", "value": 0.1}, {"metric": "auc", "value": 0.99999}),
        ("early_stop", {"metric": "auc", "patience": 1}, {"metric": "log_loss", "patience": 50}),
    ],
)
def test_a_run_that_its_rule_ended_goes_on_under_another_rule(tiny_dataset, run_values, rule, first, then):
    data = tiny_dataset(train=600)
    common = {"epochs": 3, "eval_every": 5}
    values = run_values(data, optimizer={"kind": "adam", "lr": 0.05}, train={**common, rule: first})
    ended = run(values)
    assert ended.reason == rule
    assert run(values).step == ended.step
    further = run({**values, "train": {**values["train"], rule: then}})
    assert further.reason == "finished"
    assert further.step == 57


@pytest.mark.parametrize(
    ("train", "data", "samples"),
    [
        ({"epochs": 2}, {}, 806),
        ({"epochs": 2}, {"drop_last": True}, 768),
        ({"epochs": 2, "max_steps": 5}, {}, 160),
        ({"epochs": None, "max_steps": 14}, {}, 435),
    ],
)
def test_a_run_plans_the_samples_that_it_takes(tiny_dataset, run_values, records, train, data, samples):
    values = run_values(tiny_dataset(), train=train, data=data)
    run(values)
    assert records(values["run"]["directory"], "start")[0]["samples"] == samples
    assert records(values["run"]["directory"], "step")[-1]["samples"] == samples


def test_no_step_is_made_with_a_loss_that_is_not_a_number(tiny_dataset, run_values):
    values = run_values(tiny_dataset(), optimizer={"kind": "sgd", "lr": 1e30})
    with np.errstate(all="ignore"), pytest.raises(CrosslaneError, match=r"loss is (nan|inf) at step \d+; lower"):
        run(values)


def test_a_checkpoint_of_another_model_is_refused(tiny_dataset, run_values):
    data = tiny_dataset()
    run(run_values(data, train={"max_steps": 3}))
    with pytest.raises(CheckpointError, match="top_mlp"):
        run(run_values(data, model={"top_mlp": [8, 1]}))
    with pytest.raises(CheckpointError, match=r"data\.batch_size = 32, not 16"):
        run(run_values(data, data={"batch_size": 16}))


def test_stopping_rules_need_a_split_that_exists(tiny_dataset, run_values):
    rules = {"eval_every": 5, "early_stop": {"patience": 1}}
    with pytest.raises(CrosslaneError, match="no split 'dev'"):
        run(run_values(tiny_dataset(), train=rules, eval={"split": "dev"}))


def test_unknown_tables_in_the_config_are_refused(tiny_dataset, run_values):
    with pytest.raises(ConfigError, match=r"embedding\.tables\.nobody"):
        run(run_values(tiny_dataset(), embedding={"tables": {"nobody": {"pooling": "mean"}}}))


@pytest.mark.ranks
def test_two_and_four_ranks_train_as_one(tiny_dataset, run_values, run_engine):
    """In float64 only the order of sums differs; 403 rows in batches of 33 leave a last batch of 7."""
    data = tiny_dataset()
    root = None
    for ranks in (1, 2, 4):
        values = run_values(data, f"ranks-{ranks}", precision="fp64", data={"batch_size": 33})
        root = Path(values["run"]["directory"]).parent
        code, errors = run_engine(values, ranks=ranks)
        assert code == 0, errors
    alone = tensors_of(root / "ranks-1")
    for ranks in (2, 4):
        for name, values in tensors_of(root / f"ranks-{ranks}").items():
            np.testing.assert_allclose(values, alone[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.ranks
def test_a_graceful_stop_of_two_ranks_resumes_to_the_bit(tiny_dataset, run_values, start_engine, run_engine, records):
    data = tiny_dataset(train=20_000)
    sections = {"train": {"epochs": 1, "progress_every": 1}, "deterministic": True}
    whole = run_values(data, "whole", **sections)
    code, errors = run_engine(whole, ranks=2)
    assert code == 0, errors
    values = run_values(data, "stopped", **sections)
    process = start_engine(values, ranks=2)
    progress = Path(values["run"]["directory"]) / "progress.jsonl"
    wait_for(lambda: progress.exists() and progress.read_text().count('"type":"step"') > 2)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    stopped = records(values["run"]["directory"], "end")[-1]
    assert stopped["reason"] == "stopped"
    assert stopped["step"] < 625
    code, errors = run_engine(values, ranks=2)
    assert code == 0, errors
    root = progress.parent.parent
    assert_bit_equal(tensors_of(root / "whole"), tensors_of(root / "stopped"))


def test_a_single_process_stops_on_sigterm_with_75(tiny_dataset, run_values, start_engine):
    values = run_values(tiny_dataset(train=20_000), train={"epochs": 200})
    process = start_engine(values, plain=True)
    progress = Path(values["run"]["directory"]) / "progress.jsonl"
    wait_for(lambda: progress.exists() and '"type":"step"' in progress.read_text())
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert list((progress.parent / "checkpoints").glob("step-*"))


@pytest.mark.ranks
def test_a_killed_rank_ends_all_ranks(tiny_dataset, run_values, start_engine):
    values = run_values(tiny_dataset(train=20_000), train={"epochs": 500, "progress_every": 1})
    process = start_engine(values, ranks=2)
    progress = Path(values["run"]["directory"]) / "progress.jsonl"
    wait_for(lambda: progress.exists() and '"type":"step"' in progress.read_text())
    ranks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "pipeline.train" in child.cmdline()
    ]
    assert len(ranks) == 2
    start = time.monotonic()
    os.kill(ranks[1].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - start < 10  # as promised; half a second is usual
    assert process.returncode != 0
    assert "rank 1" in errors or "rank 0" in errors
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


@pytest.mark.ranks
@pytest.mark.parametrize("plain", [True, False])
def test_an_error_of_one_rank_ends_all_with_its_message(tiny_dataset, run_values, start_engine, tmp_path, plain):
    """Rank 1 alone meets a damaged row: its error is told once, with its exit code, and nobody waits for it."""
    data = tiny_dataset()
    rows = np.memmap(next(data.glob("train*")), dtype="<i4", mode="r+").reshape(403, -1)
    rows[31, 3] = 50  # a key beyond the 50 users, in rank 1's half of the first batch
    rows.flush()
    # A forced plan counts nothing, so that rank 0 does not meet the row before rank 1 does.
    forced = {"placement": "table_wise", "deduplicate": False, "all_to_all": "flat"}
    values = run_values(data, data={"shuffle": False}, embedding=forced)
    process = start_engine(values, ranks=2, plain=plain)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert messages[0].startswith("error: rank 1: ")
    assert "50" in messages[0]
    assert "user" in messages[0]
    assert "Traceback" not in errors


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)
