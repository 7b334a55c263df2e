"""Ranks with a GPU each over NCCL, and ranks that share one through the host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def _gpus() -> int:
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    except (ImportError, RuntimeError):
        return 0


@pytest.mark.parametrize(("carrier", "ranks"), [("nccl", 2), ("nccl", 4), ("nccl", 8), ("staged", 2), ("staged", 4)])
def test_tables_over_ranks_with_gpus(carrier: str, ranks: int) -> None:
    gpus = _gpus()
    if gpus < (ranks if carrier == "nccl" else 1):
        pytest.skip(f"{ranks} ranks over {carrier} need {ranks if carrier == 'nccl' else 1} GPUs; {gpus} are visible")
    beside = Path(sys.executable).with_name("mpirun")
    launcher = str(beside) if beside.exists() else shutil.which("mpirun")
    if launcher is None:
        pytest.skip("there is no mpirun")
    done = subprocess.run(
        [launcher, "-np", str(ranks), "--oversubscribe", "--bind-to", "none", sys.executable, "-m", "mpi4py",
         str(HERE / "exchange_on_gpus.py"), carrier],
        env={**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
             "CROSSLANE_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all exchanges hold on {ranks} ranks over {carrier}" in done.stdout
