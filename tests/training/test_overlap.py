"""Overlapped runs are sequential runs, to the bit, at every depth."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dlrm.config import parse_run_config
from embedding.comm import SingleComm
from pipeline.checkpoint import open_checkpoint
from pipeline.engine import build_engine
from pipeline.evaluator import Evaluator
from pipeline.train import train

ROOT = Path(__file__).parents[2]
mpirun = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["mpirun"]


def outcome(values):
    """Everything that a run leaves: weights, optimiser state, the losses and the metrics of every evaluation."""
    result = train(parse_run_config(values))
    checkpoint = open_checkpoint(max((Path(result.directory) / "checkpoints").glob("step-*")))
    tensors = {name: checkpoint.read(name) for name in checkpoint.names}
    return tensors, {name: result.report[name] for name in ("auc", "log_loss", "samples")}


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_one_ranks_overlapped_run_equals_its_sequential_one(tiny_dataset, run_values, records, depth):
    data = tiny_dataset()
    results, losses = [], []
    for name, overlap in (("sequential", False), ("overlapped", "always")):
        values = run_values(
            data,
            name,
            overlap={"train": overlap, "eval": overlap, "depth": depth},
            train={"eval_every": 9},
            eval={"batch_size": 31},
        )
        results.append(outcome(values))
        losses.append([record["loss"] for record in records(values["run"]["directory"], "step")])
    (one, metrics), (other, other_metrics) = results
    assert metrics == other_metrics
    assert losses[0] == losses[1]
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert np.isfinite(tensor).all()
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "placements"), [(2, ["table_wise", "hybrid", "hierarchical"]), (3, ["hybrid", "replicated"])]
)
def test_overlapped_runs_of_several_ranks_equal_their_sequential_ones(tiny_dataset, tmp_path, ranks, placements):
    """Real ranks: each lane's collectives meet in their own order."""
    program = ROOT / "tests" / "ranks" / "overlap_main.py"
    folder = tmp_path / "runs"
    environment = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "CROSSLANE_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        mpirun(ranks, sys.executable, "-m", "mpi4py", program, tiny_dataset(), folder, *placements),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"every depth equals the sequential run on {ranks} ranks" in done.stdout


def test_without_a_rule_metrics_come_behind_the_training_and_none_is_lost(tiny_dataset, run_values, records):
    """A run whose end no metric decides has the same evaluations as one that waits for each of them."""
    data = tiny_dataset()
    found = []
    for name, rule in (("behind", {}), ("waits", {"target": {"metric": "auc", "value": 1.5}})):
        values = run_values(data, name, train={"eval_every": 4, **rule})
        train(parse_run_config(values))
        evaluations = records(values["run"]["directory"], "eval")
        assert all(record["scoring_seconds"] < record["seconds"] for record in evaluations)
        found.append({(record["step"], record["split"]): record["metrics"] for record in evaluations})
    behind, waits = found
    assert {(step, "validation") for step in range(4, 26, 4)} <= behind.keys()
    assert behind == {key: waits[key] for key in behind}


def test_a_split_is_read_once_and_its_second_evaluation_is_the_first(tiny_dataset, run_values):
    engine = build_engine(parse_run_config(run_values(tiny_dataset())), comm=SingleComm(), threads=1)
    evaluator = Evaluator(engine, engine.dataset.split("test"), "test")
    first = evaluator.run()
    assert evaluator.cached is not None
    assert sum(batch.host.num_rows for batch in evaluator.cached) == 90
    evaluator.split = SimpleNamespace(rows=90)  # nothing is left to read from
    assert evaluator.run().metrics == first.metrics


def test_a_split_that_is_not_to_be_kept_is_read_again(tiny_dataset, run_values):
    values = run_values(tiny_dataset(), eval={"cache": False})
    engine = build_engine(parse_run_config(values), comm=SingleComm(), threads=1)
    evaluator = Evaluator(engine, engine.dataset.split("test"), "test")
    assert evaluator.run().metrics == evaluator.run().metrics
    assert evaluator.cached is None
