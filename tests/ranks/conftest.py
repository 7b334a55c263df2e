"""Modules beside the tests can be imported: they are programs of ranks, too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


@pytest.fixture
def mpirun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start a program on MPI ranks, more of them than cores if need be, and wait for its end."""

    def start(ranks: int, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        options = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        program = [sys.executable, "-m", "mpi4py", *arguments]
        launcher = Path(sys.executable).with_name("mpirun")
        environment = {
            **os.environ,
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "CROSSLANE_THREADS": "1",
            "PYTHONPATH": str(HERE.parents[1]),
        }
        return subprocess.run(
            [str(launcher), "-np", str(ranks), *options, *program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return start
