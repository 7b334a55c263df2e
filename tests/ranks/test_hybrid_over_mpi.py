"""Placed tables over real ranks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_placement_over_mpi(ranks: int, mpirun: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = mpirun(ranks, str(Path(__file__).with_name("hybrid_main.py")))
    assert done.returncode == 0, done.stderr
    assert f"all plans hold on {ranks} ranks" in done.stdout
