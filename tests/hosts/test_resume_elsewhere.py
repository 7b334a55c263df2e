"""A run loses a host, ends, and goes on from its last checkpoint on the host that is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.checkpoint import latest_checkpoint, open_checkpoint
from pipeline.synthetic import SyntheticTable, generate

sys.path.insert(0, str(Path(__file__).resolve().parent))
from virtual_hosts import VirtualHosts, why_not

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "CROSSLANE_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
LIMIT_S = 30
"""Within which a run must have ended everywhere."""


def config_of(folder: Path) -> Path:
    """A run that takes longer than any test, over tables of every kind."""
    data = generate(folder / "data", rows=4000, tables=[SyntheticTable(rows=400)] * 4, num_dense=2, seed=1)
    kinds = {"C1": {"placement": "hybrid", "threshold": 30}, "C2": {"placement": "table_wise"}}
    values = {
        "data": {"path": str(data), "batch_size": 64},
        "model": {"embedding_dim": 8, "bottom_mlp": [8], "top_mlp": [8, 1]},
        "embedding": {"placement": "row_wise", "deduplicate": True, "all_to_all": "hierarchical", "tables": kinds},
        "optimizer": {"kind": "adagrad", "lr": 0.02},
        "train": {"epochs": 100_000, "checkpoint_every": 20, "progress_every": 20},
        "run": {"directory": str(folder / "run")},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.ranks
@pytest.mark.slow
def test_the_last_checkpoint_resumes_on_the_host_that_is_left(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(f"virtual hosts: {reason}")
    engine = [sys.executable, "-m", "mpi4py", "-m", "pipeline.train", str(config_of(tmp_path))]
    checkpoints, output = tmp_path / "run" / "checkpoints", tmp_path / "output"
    with VirtualHosts(2) as hosts, output.open("wb") as file:
        process = hosts.start([2, 2], engine, ENVIRONMENT, stdout=file.fileno(), stderr=file.fileno())
        deadline = time.monotonic() + 240
        while latest_checkpoint(checkpoints) is None:
            assert time.monotonic() < deadline, output.read_text()
            assert process.poll() is None, output.read_text()
            time.sleep(0.1)
        hosts.vanish(1)
        began = time.monotonic()
        while process.poll() is None or hosts.pids(0):
            assert time.monotonic() - began < LIMIT_S, hosts.pids(0)
            time.sleep(0.1)
        assert process.returncode != 0
        assert f"error: node 1 (host {hosts.names[1]}, ranks 2 to 3): no sign of life" in output.read_text()
        last = latest_checkpoint(checkpoints)
        assert last is not None
        step = open_checkpoint(last).step
        mpirun = [str(Path(sys.executable).with_name("mpirun")), "-np", "2", "--map-by", ":OVERSUBSCRIBE"]
        again = [*mpirun, "--bind-to", "none", *engine, "--set", f"train.max_steps={step + 10}"]
        done = subprocess.run(
            hosts.on(0, again), env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "progress.jsonl").read_text().splitlines()]
    starts = [record for record in records if record["type"] == "start"]
    assert [(start["ranks"], start["step"]) for start in starts] == [(4, 0), (2, step)]
    finished = latest_checkpoint(checkpoints)
    assert finished is not None
    assert open_checkpoint(finished).step == step + 10
