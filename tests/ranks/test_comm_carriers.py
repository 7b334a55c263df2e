"""One body, three carriers: a single rank, threads, MPI."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import comm_cases
import embedding_cases
import pytest
import rank_threads

from dlrm.errors import CommError
from embedding.comm import SingleComm
from embedding.comm_mpi import world


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_comm_in_one_process(size: int) -> None:
    rank_threads.run_ranks(size, comm_cases.run_all)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_embedding_on_threads_equals_one_rank(size: int) -> None:
    for case in embedding_cases.CASES:
        results = rank_threads.run_ranks(size, lambda comm, case=case: embedding_cases.check(case, comm))
        owned = [name for tables in results for name in tables if "." not in name]
        assert sorted(owned) == [f"t{i}" for i in range(len(case.rows))]


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_comm_and_embedding_over_mpi(ranks: int, mpirun: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = mpirun(ranks, str(embedding_cases.__file__).replace("embedding_cases", "mpi_main"))
    assert done.returncode == 0, done.stderr
    assert f"all cases hold on {ranks} ranks" in done.stdout


@pytest.mark.ranks
def test_a_wait_leaves_the_core_and_a_wrong_dtype_is_refused(
    mpirun: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = mpirun(2, str(embedding_cases.__file__).replace("embedding_cases", "mpi_waits"))
    assert done.returncode == 0, done.stderr


def test_alone_means_no_mpi() -> None:
    assert isinstance(world(1), SingleComm)


def test_a_launcher_that_counts_other_ranks_is_named() -> None:
    # Not under mpirun, MPI counts one rank; in a process of its own, as MPI can start only once.
    program = (
        "from embedding.comm_mpi import world\n"
        "try:\n    world(3)\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.startswith(CommError.__name__), done.stderr
    assert "started 3 ranks, but MPI counts 1" in done.stdout
