"""Overlapped runs are sequential runs, to the bit, at every depth."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dlrm.config import parse_run_config
from pipeline.checkpoint import open_checkpoint
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
