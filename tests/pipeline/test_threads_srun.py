"""Ranks and their cores under ``srun --mpi=pmix``, from the variables that it sets."""

from __future__ import annotations

import numpy as np

from pipeline.threads import launched_ranks, threads_per_rank


def test_ranks_of_srun(rng: np.random.Generator) -> None:
    tasks, cores = int(rng.integers(2, 2000)), int(rng.integers(1, 200))
    job = {"SLURM_NTASKS": str(tasks + 1), "SLURM_CPUS_PER_TASK": str(cores)}
    step = job | {"SLURM_STEP_NUM_TASKS": str(tasks), "PMIX_RANK": "0"}
    assert launched_ranks(step) == tasks
    assert launched_ranks(job) == 1  # a batch script, no rank
    assert launched_ranks(step | {"OMPI_COMM_WORLD_SIZE": "3"}) == 3  # mpirun inside a job
    assert threads_per_rank(step) == cores
    assert threads_per_rank(step | {"CROSSLANE_THREADS": "7"}) == 7
    alone = threads_per_rank({})
    assert threads_per_rank(job) == alone
    shared = {name: value for name, value in step.items() if name != "SLURM_CPUS_PER_TASK"}
    assert threads_per_rank(shared | {"SLURM_NTASKS_PER_NODE": "2"}) == max(1, alone // 2)
